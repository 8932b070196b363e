"""Everything a training run can be told: one dataclass, one sentence per field (the command line's help texts)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from tyro.conf import arg

from janus_ext.config import presets
from janus_ext.config.annotations import fit
from janus_ext.errors import ArgumentError

T = TypeVar("T")
Maybe = Annotated[T | None, arg(help_behavior_hint="")]  # the field's sentence says what holds where it is left out

BenchmarkName = Literal["emoji", "imagenet-r", "cifar100", "imagenet-100", "domainnet", "folder"]
Domain = Literal["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
Split = Literal["auto", "inflora", "coda", "folders", "random"]
MethodName = Literal["janus", "lora", "lora-gpm", "inflora", "lora-drs", "bilora", "joint"]
Rectify = Literal["auto", "none", "project", "tangent", "exact"]
Estimator = Literal["auto", "gram", "isvd", "none"]
Head = Literal["auto", "linear", "ncm"]
HeadInit = Literal["auto", "default", "small"]
Normalize = Literal["auto", "identity", "model"]


@dataclass(frozen=True)
class TrainConfig:
    """Trains one vision transformer on the tasks of a benchmark, one task after another."""

    benchmark: BenchmarkName = "emoji"
    """Images to learn; emoji is embedded: 200 concepts in eight art styles; folder is any tree of class folders."""
    data_dir: Maybe[Path] = None
    """Folder of the images, for all benchmarks but emoji; left out, the exact files wanted are shown."""
    check_data: bool = False
    """Decode every image, report all that is missing, empty, unreadable or in no list, and do not train."""
    domains: tuple[Domain, ...] = ("clipart", "infograph", "painting", "real", "sketch")
    """Domains of domainnet, mixed in every task; the papers leave quickdraw out."""
    split: Split = "auto"
    """Test images by inflora (auto), coda, folders (imagenet-r); folders, random (folder); coda, too (domainnet)."""
    split_files: Annotated[tuple[Path, ...], arg(help_behavior_hint="")] = ()
    """The two yaml files of --split coda, training first; by default <benchmark>_{train,test}.yaml in --data-dir."""
    preset: Literal["default", "paper"] = "default"
    """Where the values come from that are not given: default, or paper, the published protocol of the benchmark."""
    method: MethodName = "janus"
    """Continual-learning method; lora is fine-tuning in sequence, joint learns all classes at once (an upper bound)."""
    rectify: Rectify = "auto"
    """Gradient rectification (GR) of janus, lora-gpm and lora-drs; auto: exact, project and none."""
    estimator: Estimator = "auto"
    """Statistics of the inputs: gram (exact), isvd (wide layers), none (janus without OE); auto: the method's."""
    estimator_rank: Maybe[int] = None
    """Directions that --estimator isvd keeps of each layer; by default 256, or the layer's width where that is less."""
    head: Head = "auto"
    """Classifier at test time: linear heads, or ncm, the nearest class mean; auto: ncm with lora-drs, else linear."""
    head_init: HeadInit = "auto"
    """Start of a task's linear head: small (deviation 0.01, bias 0) or default (PyTorch's, --preset paper)."""
    margin_weight: Maybe[float] = None
    """Weight of the margin loss of janus (DML, by default 0.5) or the triplet loss of lora-drs (0.05), 0: without."""
    margin: Maybe[float] = None
    """Cosine to an old prototype above which janus pushes (0.2); distance that lora-drs puts between classes (1)."""
    temperature: float = 16.0
    """Sharpness (tau) of the margin loss."""
    tasks: Maybe[int] = None
    """Number of tasks the classes are divided into; by default the benchmark's own (domainnet 5, else 10 at most)."""
    task_list: Maybe[Path] = None
    """File that says which classes form which task: one class a line, a blank line between tasks, all of them named."""
    class_list: Maybe[str] = None
    """Classes, which imagenet-100 needs: a file with one wnid a line, or first100 (the first of all sorted wnids)."""
    shuffle_classes: bool = False
    """Draw the order of the classes from the seed instead of the benchmark's fixed order."""
    limit_per_class: Maybe[int] = None
    """At most so many images of each class, in training and in test, for trial runs; by default all."""
    workers: Maybe[int] = None
    """Processes that decode images, 0: none; by default one a core for a GPU (16 at most), half the cores for a CPU."""
    cache_images: bool = False
    """Keep all decoded images in memory, for small data sets."""
    backbone: Maybe[str] = None
    """Backbone: emoji (embedded, 64 px), a timm name, hf-hub:owner/name, local-dir:FOLDER; ViT-B/16 but for emoji."""
    weights: str = "pretrained"
    """Backbone weights: pretrained, none (random), or a local file: .safetensors, .pth (tensors only), .npz (JAX)."""
    image_size: Maybe[int] = None
    """Side of the images in pixels, a multiple of the backbone's patches; by default what it was pretrained with."""
    normalize: Normalize = "auto"
    """Colours of the images: as the backbone was pretrained (model), or in [0, 1] (identity, --preset paper)."""
    rank: Maybe[int] = None
    """Rank of the LoRA factors on the K and V projections of every block; by default 8 for emoji, else 10 or 30."""
    scale: Maybe[float] = None
    """Factor s in W + s B A, by default 1; of the inverse Fourier transform in bilora, by default 300."""
    gpm: Literal["auto", "dual", "plain"] = "auto"
    """Memory of inflora: dual (DualGPM) or plain (GPM); auto: plain for domainnet, as in its code, else dual."""
    frequencies: int = 3000
    """Fourier coefficients that bilora trains of each K and V projection in a task."""
    energy_start: Maybe[float] = None
    """Share of input energy protected after the first task; by default 0.97 for emoji, else 0.95 or 0.98."""
    energy_end: Maybe[float] = None
    """Share of input energy towards which the protected share grows with the tasks; 0.99 for emoji, else 1."""
    energy_power: Maybe[Literal[1, 2]] = None
    """1 measures energy by squared activations (GPM; emoji), 2 by their squares again (InfLoRA's code; else)."""
    damping: float = 0.1
    """Damping of the r x r inverses of the rectification, relative to their mean eigenvalue."""
    share: float = 0.5
    """How the update that both factors can carry is divided: 0 leaves it to A, 0.5 is symmetric, 1 leaves it to B."""
    balance: bool = True
    """Rescale rectified factor gradients to the plain gradients' scale."""
    epochs: Maybe[int] = None
    """Passes over the training images of each task; by default 12 for emoji, else 5 to 50."""
    batch_size: Maybe[int] = None
    """Images per step; by default 32 for emoji, else 128."""
    accumulate: int = 1
    """Pieces in which a batch is computed, to save memory; lora-drs' triplet loss then looks within a piece."""
    optimizer: Literal["auto", "adam", "adamw", "sgd"] = "auto"
    """Optimizer, its state starts fresh with every task; sgd (momentum 0.9) by default for domainnet, else adam."""
    lr: Maybe[float] = None
    """Learning rate of the factors as each task starts; by default 0.016 for janus on emoji, else 0.0005 to 0.016."""
    head_lr: Maybe[float] = None
    """Learning rate of the task's head at its start; by default 0.01 for emoji and domainnet, else 0.0005."""
    schedule: Literal["auto", "cosine", "quarter", "step", "constant"] = "auto"
    """Learning rate in a task: half a cosine (emoji's), a quarter of one (InfLoRA's), steps (domainnet's), constant."""
    milestones: Maybe[tuple[int, ...]] = None
    """Epochs after which --schedule step divides the learning rates by ten; by default 4 of domainnet's 5."""
    clip_norm: Maybe[float] = None
    """Largest global gradient norm, clipped after rectification; by default no clipping."""
    seed: Maybe[tuple[int, ...]] = None
    """Random seeds, by default 0 (--preset paper: 0 to 4); several make one run each under <output>/seed-<n>."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Autocast of the backbone to bfloat16, or float16 with scaled gradients; auto: bf16 if the hardware has it."""
    compile: bool = False
    """Compile the backbone with torch.compile, which takes minutes at the start and needs a C++ compiler."""
    output: Maybe[Path] = None
    """Run folder; by default runs/<benchmark>-<method>-<seed>, numbered if that holds a finished run."""
    resume: bool = False
    """Go on with the run in --output behind the last task that it finished; with several seeds, with each of them."""
    plots: bool = True
    """Draw plots/*.png at the end."""
    tensorboard: bool = False
    """Write the scalars of every epoch and task to <output>/tensorboard, too (pip install tensorboard)."""

    def __post_init__(self) -> None:
        """Brings every value to its field's type; ArgumentError where the meaning of another type is not clear."""
        for name, hint in _hints().items():
            try:
                value = fit(hint, getattr(self, name))
            except TypeError as error:
                raise ArgumentError(f"{flag(name)} {error}") from error
            object.__setattr__(self, name, value)

    def resolved(self) -> TrainConfig:
        """The checked configuration with the preset's values for what was not said; ArgumentError names the flag."""
        defaults = presets.values(self.preset, self.benchmark, self.method)
        if self.schedule not in ("auto", "step"):  # the user's schedule leaves the preset's milestones
            defaults.pop("milestones", None)
        missing = {name: value for name, value in defaults.items() if getattr(self, name) in (None, "auto")}
        config = replace(self, **missing)
        config._check_ranges()
        config._check_data_flags()
        config._check_combinations()
        config._check_method()
        self._check_effect(config.without_effect(), defaults)
        return config

    def _check_effect(self, without: dict[str, str], defaults: dict[str, Any]) -> None:
        """Refuses what the user typed and the run would not read; what a preset or a default says may stand idle."""
        for name, wanted in without.items():
            untouched = (TrainConfig.__dataclass_fields__[name].default, defaults.get(name))
            if getattr(self, name) not in untouched:
                raise ArgumentError(f"{flag(name)} would do nothing here: it needs {wanted}")

    def without_effect(self) -> dict[str, str]:
        """The fields that a run of this resolved configuration does not read, each with what it would take."""
        rectified = (self.rectify in ("tangent", "exact"), "--rectify tangent or exact")
        remembering = (self.estimator != "none", "a method that remembers old inputs, and an --estimator")
        pushing = (self.margin_weight > 0, "--method janus or lora-drs, and a --margin-weight above 0")
        needs = {
            "rank": (self.method != "bilora", "LoRA factors, and --method bilora has --frequencies"),
            "frequencies": (self.method == "bilora", "--method bilora"),
            "gpm": (self.method == "inflora", "--method inflora"),
            "energy_start": remembering,
            "energy_end": remembering,
            "energy_power": remembering,
            "damping": rectified,
            "share": rectified,
            "balance": rectified,
            "margin": pushing,
            "temperature": (self.method == "janus" and pushing[0], "--method janus, and a --margin-weight above 0"),
            "milestones": (max(self.milestones or (0,)) < self.epochs, f"epochs below --epochs {self.epochs}"),
        }
        return {name: wanted for name, (is_read, wanted) in needs.items() if not is_read}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of all fields."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def _check_ranges(self) -> None:
        for name, low, high in RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ArgumentError(f"{flag(name)} must lie in [{low:g}, {high:g}], got {value:g}")
        for name in ("lr", "head_lr", "scale", "temperature", "damping", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ArgumentError(f"{flag(name)} must be a positive number, got {value:g}")
        if not self.seed or len(set(self.seed)) != len(self.seed) or min(self.seed) < 0:
            raise ArgumentError(f"--seed needs one or more different numbers from 0 on, got {list(self.seed)}")

    def _check_data_flags(self) -> None:
        for name, benchmarks in DATA_FLAGS.items():
            value = getattr(self, name)
            if value != TrainConfig.__dataclass_fields__[name].default and self.benchmark not in benchmarks:
                raise ArgumentError(
                    f"--benchmark {self.benchmark} has no {flag(name)}; it belongs to {', '.join(benchmarks)}"
                )
        if self.task_list is not None and self.shuffle_classes:
            raise ArgumentError("--task-list fixes the order of the classes, --shuffle-classes draws it: leave one out")
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
            raise ArgumentError(
                "--energy-power 2 (InfLoRA's, in all presets but emoji's) needs the Gram matrix: use --estimator gram, "
                "or --energy-power 1 with an --energy-start and --energy-end that suit it"
            )
        if self.compile and self.estimator == "isvd":
            raise ArgumentError("--compile makes a graph for every batch size with --estimator isvd: use gram")
        if self.rectify == "project" and self.estimator == "none":
            raise ArgumentError(
                "--rectify project removes what --estimator found; with --estimator none it does nothing"
            )
        if (self.schedule == "step") != bool(self.milestones):
            missing = "--schedule step" if self.milestones else "--milestones, the epochs after which it steps"
            raise ArgumentError(
                f"--milestones and --schedule step belong together, got --schedule {self.schedule} and milestones "
                f"{list(self.milestones or ())}: add {missing}"
            )
        if self.milestones and min(self.milestones) < 1:
            raise ArgumentError(f"--milestones must be at least 1, got {list(self.milestones)}")

    def _check_method(self) -> None:
        for name, allowed in METHOD_LIMITS.get(self.method, {}).items():
            if getattr(self, name) not in allowed:
                raise ArgumentError(
                    f"--method {self.method} has no {flag(name)} {getattr(self, name)}; "
                    f"it takes {', '.join(map(str, allowed))}"
                )
        if self.method == "janus" and self.margin > 1:
            raise ArgumentError(f"--margin is a cosine with --method janus and at most 1, got {self.margin:g}")


NO_MEMORY: dict[str, tuple[Any, ...]] = {"rectify": ("none",), "estimator": ("none",), "margin_weight": (0.0,)}
METHOD_LIMITS: dict[str, dict[str, tuple[Any, ...]]] = {  # what a method takes of flags that others have, too
    "lora": NO_MEMORY,
    "lora-gpm": {"rectify": ("project", "tangent", "exact"), "estimator": ("gram", "isvd"), "margin_weight": (0.0,)},
    "inflora": {"rectify": ("none",), "estimator": ("gram",), "margin_weight": (0.0,), "energy_power": (2,)},
    "lora-drs": {"estimator": ("gram",), "energy_power": (1,)},
    "bilora": NO_MEMORY,
    "joint": NO_MEMORY | {"tasks": (1,)},
}

DATA_FLAGS: dict[str, tuple[BenchmarkName, ...]] = {  # flags that only some benchmarks have
    "data_dir": ("imagenet-r", "cifar100", "imagenet-100", "domainnet", "folder"),
    "domains": ("domainnet",),
    "split": ("imagenet-r", "domainnet", "folder"),
    "split_files": ("imagenet-r", "domainnet"),
    "class_list": ("imagenet-100",),
    "workers": ("imagenet-r", "cifar100", "imagenet-100", "domainnet", "folder"),
    "cache_images": ("imagenet-r", "imagenet-100", "domainnet", "folder"),  # the others are in memory anyway
}

SPLITS: dict[str, tuple[Split, ...]] = {
    "imagenet-r": ("auto", "inflora", "coda", "folders"),
    "domainnet": ("auto", "coda"),
    "folder": ("auto", "folders", "random"),
}

RANGES: tuple[tuple[str, float, float], ...] = (
    ("margin_weight", 0, float("inf")),
    ("margin", -1, 2),
    ("tasks", 1, float("inf")),
    ("limit_per_class", 1, float("inf")),
    ("workers", 0, 1024),
    ("image_size", 1, float("inf")),
    ("rank", 1, float("inf")),
    ("frequencies", 1, float("inf")),
    ("estimator_rank", 1, float("inf")),
    ("energy_start", 0, 1),
    ("energy_end", 0, 1),
    ("share", 0, 1),
    ("epochs", 1, float("inf")),
    ("batch_size", 1, float("inf")),
    ("accumulate", 1, float("inf")),
)


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


@cache
def _hints() -> dict[str, Any]:
    """The types of all fields."""
    return get_type_hints(TrainConfig)


def _plain(value: Any) -> Any:
    """``value`` as JSON knows it: paths as text, tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
