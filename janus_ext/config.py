"""Everything a training run can be told: one dataclass, one sentence per field (the command line's help texts)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from janus_ext.errors import ArgumentError

BenchmarkName = Literal["emoji", "imagenet-r", "cifar100", "imagenet-100", "domainnet", "folder"]
Domain = Literal["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
Split = Literal["auto", "inflora", "coda", "folders", "random"]
MethodName = Literal["janus", "lora"]
Rectify = Literal["auto", "none", "project", "tangent", "exact"]
Estimator = Literal["auto", "gram", "isvd", "none"]


@dataclass(frozen=True)
class TrainConfig:
    """Trains one vision transformer on the tasks of a benchmark, one task after another."""

    benchmark: BenchmarkName = "emoji"
    """Images to learn; emoji is embedded: 200 concepts in eight art styles; folder is any tree of class folders."""
    data_dir: Path | None = None
    """Folder of the images, for all benchmarks but emoji; left out, the exact files wanted are shown."""
    check_data: bool = False
    """Decode every image, report all that is missing, empty, unreadable or in no list, and do not train."""
    domains: tuple[Domain, ...] = ("clipart", "infograph", "painting", "real", "sketch")
    """Domains of domainnet, mixed in every task; the papers leave quickdraw out."""
    split: Split = "auto"
    """Training and test images: inflora, coda or folders (imagenet-r, auto: inflora), folders or random (folder)."""
    split_files: tuple[Path, ...] = ()
    """The two yaml files of --split coda, training first; by default imagenet-r_{train,test}.yaml in --data-dir."""
    method: MethodName = "janus"
    """Continual-learning method: janus (OE + GR + DML) or lora (sequential LoRA fine-tuning)."""
    rectify: Rectify = "auto"
    """Gradient rectification (GR); auto: exact with --method janus, none with --method lora."""
    estimator: Estimator = "auto"
    """Online estimation (OE) of the protected inputs: gram (exact), isvd (wide layers), none; auto: the method's."""
    estimator_rank: int | None = None
    """Directions that --estimator isvd keeps of each layer; by default 256, or the layer's width where that is less."""
    margin_weight: float | None = None
    """Weight of the decoupled margin loss (DML), 0 leaves it out; by default 0.5 with --method janus."""
    margin: float = 0.2
    """Cosine similarity to an old prototype above which the margin loss pushes."""
    temperature: float = 16.0
    """Sharpness (tau) of the margin loss."""
    tasks: int | None = None
    """Number of tasks the classes are divided into; by default the benchmark's own (domainnet 5, else 10)."""
    class_list: str | None = None
    """Classes of imagenet-100: a file with one wnid a line, or first100 (the first hundred of all sorted wnids)."""
    shuffle_classes: bool = False
    """Draw the order of the classes from the seed instead of the benchmark's fixed order."""
    limit_per_class: int | None = None
    """At most so many images of each class, in training and in test, for trial runs."""
    workers: int | None = None
    """Processes that decode images, 0: none; by default one a core for a GPU (16 at most), half the cores for a CPU."""
    cache_images: bool = False
    """Keep all decoded images in memory, for small data sets."""
    backbone: str = "emoji"
    """Backbone: emoji (embedded, 64 px) or the name of any vision transformer of timm."""
    weights: str = "pretrained"
    """Backbone weights: pretrained, none (random), or a local file."""
    rank: int = 8
    """Rank of the LoRA factors on the K and V projections of every block."""
    scale: float = 1.0
    """Factor s in W + s B A."""
    energy_start: float = 0.9
    """Share of input energy protected after the first task."""
    energy_end: float = 0.97
    """Share of input energy towards which the protected share grows with the tasks."""
    energy_power: Literal[1, 2] = 1
    """1 measures energy by squared activations (GPM), 2 by their squares again (InfLoRA's code)."""
    damping: float = 0.1
    """Damping of the r x r inverses of the rectification, relative to their mean eigenvalue."""
    share: float = 0.5
    """How the update that both factors can carry is divided: 0 leaves it to A, 0.5 is symmetric, 1 leaves it to B."""
    balance: bool = True
    """Rescale rectified factor gradients to the plain gradients' scale."""
    epochs: int = 12
    """Passes over the training images of each task."""
    batch_size: int = 32
    """Images per step."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimizer; its state starts fresh with every task; sgd has momentum 0.9."""
    lr: float = 8e-3
    """Learning rate of the factors at the start of each task."""
    head_lr: float = 1e-2
    """Learning rate of the task's head at its start; it learns from nothing and needs larger steps than the factors."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over the epochs of a task."""
    clip_norm: float | None = None
    """Largest global gradient norm, clipped after rectification; by default no clipping."""
    seed: tuple[int, ...] = (0,)
    """Random seeds; several make one run each under <output>/seed-<n>."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """Autocast of the backbone to bfloat16 (factors and weights stay float32); auto: if the hardware multiplies it."""
    output: Path | None = None
    """Run folder; by default runs/<benchmark>-<method>-<seed>, numbered if that holds a finished run."""
    plots: bool = True
    """Draw plots/*.png at the end."""

    def resolved(self) -> TrainConfig:
        """The checked configuration with the method's own defaults filled in; raises ArgumentError naming the flag."""
        defaults = METHOD_DEFAULTS[self.method]
        missing = {name: value for name, value in defaults.items() if getattr(self, name) in (None, "auto")}
        config = replace(self, **missing)
        config._check_ranges()
        config._check_data_flags()
        config._check_combinations()
        return config

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of all fields."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def _check_ranges(self) -> None:
        for name, low, high in RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ArgumentError(f"{_flag(name)} must lie in [{low:g}, {high:g}], got {value:g}")
        for name in ("lr", "head_lr", "scale", "temperature", "damping", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ArgumentError(f"{_flag(name)} must be a positive number, got {value:g}")
        if not self.seed or len(set(self.seed)) != len(self.seed):
            raise ArgumentError(f"--seed needs one or more different numbers, got {list(self.seed)}")

    def _check_data_flags(self) -> None:
        for name, benchmarks in DATA_FLAGS.items():
            value = getattr(self, name)
            if value != TrainConfig.__dataclass_fields__[name].default and self.benchmark not in benchmarks:
                raise ArgumentError(
                    f"--benchmark {self.benchmark} has no {_flag(name)}; it belongs to {', '.join(benchmarks)}"
                )
        if self.split_files and (self.split != "coda" or len(self.split_files) != 2):
            raise ArgumentError(
                f"--split-files are the training and the test file of --split coda, got {len(self.split_files)} files "
                f"and --split {self.split}"
            )
        if not self.domains or len(set(self.domains)) != len(self.domains):
            raise ArgumentError(f"--domains needs one or more different names, got {list(self.domains)}")
        if self.split not in SPLITS.get(self.benchmark, (self.split,)):
            raise ArgumentError(
                f"--split {self.split} is none of {self.benchmark}'s: {', '.join(SPLITS[self.benchmark])}"
            )

    def _check_combinations(self) -> None:
        if self.energy_end < self.energy_start:
            raise ArgumentError(
                f"--energy-end {self.energy_end:g} is below --energy-start {self.energy_start:g}: "
                "what one task protects cannot be given up by the next"
            )
        if self.estimator_rank is not None and self.estimator != "isvd":
            raise ArgumentError(f"--estimator-rank belongs to --estimator isvd, got --estimator {self.estimator}")
        if self.estimator == "isvd" and self.energy_power == 2:
            raise ArgumentError("--energy-power 2 needs the Gram matrix: use --estimator gram, not isvd")
        if self.rectify == "project" and self.estimator == "none":
            raise ArgumentError(
                "--rectify project removes what --estimator found; with --estimator none it does nothing"
            )
        for name, value in METHOD_DEFAULTS["lora"].items():
            if self.method == "lora" and getattr(self, name) != value:
                raise ArgumentError(
                    f"--method lora is plain fine-tuning and has no {_flag(name)} {getattr(self, name)}; "
                    "use --method janus"
                )


METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "janus": {"rectify": "exact", "estimator": "gram", "margin_weight": 0.5},
    "lora": {"rectify": "none", "estimator": "none", "margin_weight": 0.0},
}

DATA_FLAGS: dict[str, tuple[BenchmarkName, ...]] = {  # flags that only some benchmarks have
    "data_dir": ("imagenet-r", "cifar100", "imagenet-100", "domainnet", "folder"),
    "domains": ("domainnet",),
    "split": ("imagenet-r", "folder"),
    "split_files": ("imagenet-r",),
    "class_list": ("imagenet-100",),
}

SPLITS: dict[str, tuple[Split, ...]] = {
    "imagenet-r": ("auto", "inflora", "coda", "folders"),
    "folder": ("auto", "folders", "random"),
}

RANGES: tuple[tuple[str, float, float], ...] = (
    ("margin_weight", 0, float("inf")),
    ("margin", -1, 1),
    ("tasks", 1, float("inf")),
    ("limit_per_class", 1, float("inf")),
    ("workers", 0, 1024),
    ("rank", 1, float("inf")),
    ("estimator_rank", 1, float("inf")),
    ("energy_start", 0, 1),
    ("energy_end", 0, 1),
    ("share", 0, 1),
    ("epochs", 1, float("inf")),
    ("batch_size", 1, float("inf")),
)


def _flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def _plain(value: Any) -> Any:
    """``value`` as JSON knows it: paths as text, tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
