"""What settings must be, each alone and together; a message names the flag, what was wanted and what was found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from janus_ext.arguments import shown
from janus_ext.config.foreign import BENCHMARK, loaded_method
from janus_ext.config.parts import NO_GUARD, BenchmarkName, Settings, Split, flag
from janus_ext.errors import ArgumentError

if TYPE_CHECKING:
    from janus_ext.config.learn import LearnConfig
    from janus_ext.config.train import TrainConfig

MANY = 2**31 - 1  # more than anybody counts, and a number that all of PyTorch takes
LEAST, MOST = 1e-30, 1e30  # float32 has them, and their reciprocals
RANGES: tuple[tuple[str, float, float], ...] = (
    ("margin_weight", 0, MOST),
    ("margin", -1, 2),
    ("tasks", 1, MANY),
    ("limit_per_class", 1, MANY),
    ("workers", 0, 1024),
    ("image_size", 1, 13376),  # beyond it Pillow makes no image, and the positions alone of a ViT take gigabytes
    ("rank", 1, MANY),
    ("frequencies", 1, MANY),
    ("estimator_rank", 1, MANY),
    ("head_width", 1, 2**16),
    ("merge_scale", 0, 1),
    ("drift_budget", 0, NO_GUARD),
    ("energy_start", 0, 1),
    ("energy_end", 0, 1),
    ("share", 0, 1),
    ("epochs", 1, MANY),
    ("batch_size", 1, MANY),
    ("accumulate", 1, MANY),
)
POSITIVE = ("lr", "head_lr", "scale", "temperature", "damping", "clip_norm")
NO_MEMORY: dict[str, tuple[Any, ...]] = {"rectify": ("none",), "estimator": ("none",), "margin_weight": (0.0,)}
METHOD_LIMITS: dict[str, dict[str, tuple[Any, ...]]] = {  # what a method takes of flags that others have, too
    "lora": NO_MEMORY,
    "lora-gpm": {"rectify": ("project", "tangent", "exact"), "estimator": ("gram", "isvd"), "margin_weight": (0.0,)},
    "inflora": {"rectify": ("none",), "estimator": ("gram",), "margin_weight": (0.0,), "energy_power": (2,)},
    "lora-drs": {"estimator": ("gram",), "energy_power": (1,)},
    "bilora": NO_MEMORY,
    "joint": NO_MEMORY | {"tasks": (1,)},
}
FILES: tuple[BenchmarkName, ...] = ("imagenet-r", "imagenet-100", "imagenet-a", "cub", "cars", "domainnet", "folder")
DATA_FLAGS: dict[str, tuple[BenchmarkName, ...]] = {  # flags that only some benchmarks have
    "data_dir": (*FILES, "cifar100", "fashion-mnist"),
    "domains": ("domainnet",),
    "split": ("imagenet-r", "domainnet", "folder"),
    "split_files": ("imagenet-r", "domainnet"),
    "class_list": ("imagenet-100",),
    "workers": (*FILES, "cifar100", "fashion-mnist"),
    "cache_images": FILES,  # the others are in memory anyway
}
FOR_ALL_OTHERS = ("data_dir", "workers", "cache_images")  # of these flags, those that a benchmark from elsewhere has
SPLITS: dict[str, tuple[Split, ...]] = {
    "imagenet-r": ("auto", "inflora", "coda", "folders"),
    "domainnet": ("auto", "coda"),
    "folder": ("auto", "folders", "random"),
}


def check_learning(config: LearnConfig) -> None:
    """ArgumentError unless a task can be learned with these settings."""
    _check_ranges(config)
    _check_targets(config)
    _check_energies(config)
    _check_schedule(config)
    _check_head(config)
    _check_method(config)


def check_data(config: TrainConfig) -> None:
    """ArgumentError unless the benchmark has these flags, in these combinations."""
    _check_seeds(config.seed)
    check_data_flags(config)
    if not re.fullmatch(r"(?=.*[1-9])([0-9]{1,9}|[0-9]{1,9}(\.[0-9]{1,9})?m)", config.save_every):
        raise ArgumentError(f"--save-every must be a number of epochs (2) or minutes (10m), got {config.save_every!r}")
    if config.validation is not None and not 0 < config.validation < 1:
        raise ArgumentError(f"--validation must lie between 0 and 1, got {config.validation:g}")
    if config.task_list is not None and config.shuffle_classes:
        raise ArgumentError("--task-list fixes the order of the classes, --shuffle-classes draws it: leave one out")
    if config.split_files and (config.split != "coda" or len(config.split_files) != 2):
        raise ArgumentError(
            f"--split-files are the training and the test file of --split coda, got {len(config.split_files)} files "
            f"and --split {config.split}"
        )
    if not config.domains or len(set(config.domains)) != len(config.domains):
        raise ArgumentError(f"--domains needs one or more different names, got {list(config.domains)}")
    if config.split not in SPLITS.get(config.benchmark, (config.split,)):
        raise ArgumentError(
            f"--split {config.split} is none of {config.benchmark}'s: {', '.join(SPLITS[config.benchmark])}"
        )


def check_data_flags(config: TrainConfig) -> None:
    """ArgumentError unless the benchmark has the flags that were said."""
    for name, benchmarks in DATA_FLAGS.items():
        if name in FOR_ALL_OTHERS and config.benchmark not in BENCHMARK.ours:
            continue
        if getattr(config, name) != default(config, name) and config.benchmark not in benchmarks:
            raise ArgumentError(
                f"--benchmark {config.benchmark} has no {flag(name)}; it belongs to {', '.join(benchmarks)}"
            )


def check_effect(asked: Settings, without: dict[str, str], defaults: dict[str, Any]) -> None:
    """Refuses what the user typed and nobody would read; what a preset or a default says may stand idle."""
    for name, wanted in without.items():
        if getattr(asked, name) not in (default(asked, name), defaults.get(name)):
            raise ArgumentError(f"{flag(name)} would do nothing here: it needs {wanted}")


def default(config: Settings | type[Settings], name: str) -> Any:
    """The value of a field where nobody says one."""
    return config.__dataclass_fields__[name].default


def _check_ranges(config: Settings) -> None:
    for name, low, high in RANGES:
        value = getattr(config, name, None)  # a learner has no data's
        if value is not None and not low <= value <= high:
            raise ArgumentError(f"{flag(name)} must lie in [{low}, {high}], got {shown(value)}")
    for name in POSITIVE:
        value = getattr(config, name)
        if value is not None and not LEAST <= value <= MOST:
            raise ArgumentError(f"{flag(name)} must be a positive number, {LEAST} to {MOST}, got {shown(value)}")


def _check_seeds(seeds: Iterable[int]) -> None:
    seeds = list(seeds)
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ArgumentError(f"--seed needs one or more different numbers from 0 on, got {seeds}")


def _check_targets(config: LearnConfig) -> None:
    said = " ".join(config.targets)
    if not config.targets or len(set(config.targets)) != len(config.targets):
        raise ArgumentError(f"--targets must be one or more different names, got {said or 'none'}")
    if config.method == "bilora" and set(config.targets) != {"k", "v"}:
        raise ArgumentError(f"--method bilora learns frequencies of k and v alone, got --targets {said}")


def _check_energies(config: LearnConfig) -> None:
    if config.energy_end < config.energy_start:
        raise ArgumentError(
            f"--energy-end must be at least --energy-start {config.energy_start:g}, got {config.energy_end:g}: "
            "what one task protects cannot be given up by the next"
        )
    if config.estimator_rank is not None and config.estimator != "isvd":
        raise ArgumentError(f"--estimator-rank belongs to --estimator isvd, got --estimator {config.estimator}")
    if config.estimator == "isvd" and config.energy_power == 2:
        raise ArgumentError(
            "--energy-power 2 (InfLoRA's, in all presets but emoji's) needs the Gram matrix: use --estimator gram, "
            "or --energy-power 1 with an --energy-start and --energy-end that suit it"
        )
    if config.compile and config.checkpointing:
        raise ArgumentError("--compile makes no graph of blocks that are computed again: leave out --checkpointing")
    if config.compile and config.estimator == "isvd":
        raise ArgumentError("--compile makes a graph for every batch size with --estimator isvd: use gram")
    if config.rectify == "project" and config.estimator == "none":
        raise ArgumentError("--rectify project removes what --estimator found; with --estimator none it does nothing")


def _check_head(config: LearnConfig) -> None:
    if config.head_width is not None and config.head not in ("lda", "ridge"):
        raise ArgumentError(f"--head-width belongs to --head lda or ridge, got --head {config.head}")
    if config.head_width is not None and config.drift != "none":
        raise ArgumentError("--drift moves statistics of features, those of --head-width cannot be: leave one out")


def _check_schedule(config: LearnConfig) -> None:
    if (config.schedule == "step") != bool(config.milestones):
        missing = "--schedule step" if config.milestones else "--milestones, the epochs after which it steps"
        raise ArgumentError(
            f"--milestones and --schedule step belong together, got --schedule {config.schedule} and milestones "
            f"{list(config.milestones or ())}: add {missing}"
        )
    if config.milestones and min(config.milestones) < 1:
        raise ArgumentError(f"--milestones must be at least 1, got {list(config.milestones)}")


def _limits(method: str) -> Mapping[str, tuple[Any, ...]]:
    found = loaded_method(method)
    if found is None:
        return METHOD_LIMITS.get(method, {})
    return METHOD_LIMITS.get(found.like, {}) if found.limits is None else found.limits


def _check_method(config: LearnConfig) -> None:
    for name, allowed in _limits(config.method).items():
        if getattr(config, name, allowed[0]) not in allowed:
            raise ArgumentError(
                f"--method {config.method} has no {flag(name)} {getattr(config, name)}; "
                f"it takes {', '.join(map(str, allowed))}"
            )
    if config.method == "janus" and config.margin > 1:
        raise ArgumentError(f"--margin is a cosine with --method janus and at most 1, got {config.margin:g}")
