"""Everything a learner, a run and its data can be told, in parts: one sentence per field (the command line's help)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from tyro.conf import arg

from janus_ext.config.annotations import fit
from janus_ext.errors import ArgumentError

NO_GUARD = 1e9  # the largest drift_budget

T = TypeVar("T")
Maybe = Annotated[T | None, arg(help_behavior_hint="")]  # the field's sentence says what holds where it is left out

BenchmarkName = Literal[
    "emoji",
    "imagenet-r",
    "cifar100",
    "fashion-mnist",
    "imagenet-100",
    "imagenet-a",
    "cub",
    "cars",
    "domainnet",
    "folder",
]
Domain = Literal["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
Split = Literal["auto", "inflora", "coda", "folders", "random"]
MethodName = Literal["janus", "lora", "lora-gpm", "inflora", "lora-drs", "bilora", "joint"]
Target = Literal["q", "k", "v", "proj", "fc1", "fc2"]
Rectify = Literal["auto", "none", "project", "tangent", "exact"]
Estimator = Literal["auto", "gram", "isvd", "none"]
HeadName = Literal["linear", "ncm", "lda", "ridge", "aligned"]
BENCHMARK_NAMES = f"{{{','.join(get_args(BenchmarkName))}}}|MODULE:FUNCTION"  # as the help has them
METHOD_NAMES = f"{{{','.join(get_args(MethodName))}}}|MODULE:CLASS"
HEAD_NAMES = f"{{{','.join(get_args(HeadName))}}}|MODULE:FUNCTION"
TRAINED_HEADS = ("linear", "aligned")  # what epochs serve, even where the backbone stays as it is; others are fitted
HeadInit = Literal["auto", "default", "small"]
Normalize = Literal["auto", "identity", "model"]


@dataclass(frozen=True)
class Settings:
    """What all parts share, and the settings of a method of one's own: values of the fields' types, as JSON has them.

    A field is bool, int, float, str, Path, a Literal, a tuple of these, or one of them or None, and has a default; the
    text below it is the command line's help.
    """

    def __post_init__(self) -> None:
        """Brings every value to its field's type; ArgumentError where the meaning of another type is not clear."""
        for name, hint in _hints(type(self)).items():
            try:
                value = fit(hint, getattr(self, name))
            except TypeError as error:
                raise ArgumentError(f"{flag(name)} {error}") from error
            object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of all fields."""
        return {key: _plain(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class DataConfig(Settings):
    """Which images are learned, in which tasks."""

    benchmark: Annotated[str, arg(metavar=BENCHMARK_NAMES)] = "emoji"
    """Images to learn: emoji is embedded, folder any tree of class folders; of your own: package.module:function."""
    data_dir: Maybe[Path] = None
    """Folder of the images, for all benchmarks but emoji; left out, the exact files wanted are shown."""
    tasks: Maybe[int] = None
    """Number of tasks the classes are divided into; by default the benchmark's own (5 or 10, folder 10 at most)."""
    task_list: Maybe[Path] = None
    """File that says which classes form which task: one class a line, a blank line between tasks, all of them named."""
    shuffle_classes: bool = False
    """Draw the order of the classes from the seed instead of the benchmark's fixed order."""
    limit_per_class: Maybe[int] = None
    """At most so many images of each class, in training and in test, for trial runs; by default all."""
    validation: Maybe[float] = None
    """Share of each class's training images that is held out and measured, instead of test images; by default none."""
    domains: tuple[Domain, ...] = ("clipart", "infograph", "painting", "real", "sketch")
    """Domains of domainnet, mixed in every task; the papers leave quickdraw out."""
    split: Split = "auto"
    """Test images by inflora (auto), coda, folders (imagenet-r); folders, random (folder); coda, too (domainnet)."""
    split_files: Annotated[tuple[Path, ...], arg(help_behavior_hint="")] = ()
    """The two yaml files of --split coda, training first; by default <benchmark>_{train,test}.yaml in --data-dir."""
    class_list: Maybe[str] = None
    """Classes, which imagenet-100 needs: a file with one wnid a line, or first100 (the first of all sorted wnids)."""


@dataclass(frozen=True)
class MethodConfig(Settings):
    """How a task is learned without losing what came before."""

    method: Annotated[str, arg(metavar=METHOD_NAMES)] = "janus"
    """Continual-learning method: lora is fine-tuning, joint an upper bound; one of your own: package.module:Class."""
    targets: tuple[Target, ...] = ("k", "v")
    """What learns of every block: q, k, v and proj of its attention, fc1 and fc2 of its MLP; see docs/backbones.md."""
    rectify: Rectify = "auto"
    """Gradient rectification (GR) of janus, lora-gpm and lora-drs; auto: exact, project and none."""
    estimator: Estimator = "auto"
    """Statistics of the inputs: gram (exact), isvd (wide layers), none (janus without OE); auto: the method's."""
    energy_start: Maybe[float] = None
    """Share of input energy protected after the first task; the default is the method's, for janus 0.95 to 0.999."""
    energy_end: Maybe[float] = None
    """Share of input energy towards which that grows with the tasks; by default the method's, for janus 0.99 to 1."""
    margin_weight: Maybe[float] = None
    """Weight of the margin loss of janus (DML, by default 0.5) or the triplet loss of lora-drs (0.05), 0: without."""
    margin: Maybe[float] = None
    """Cosine to an old prototype above which janus pushes (0.2); distance that lora-drs puts between classes (1)."""
    temperature: float = 16.0
    """Sharpness (tau) of the margin loss."""
    energy_power: Maybe[Literal[1, 2]] = None
    """1 measures energy by squared activations (GPM; emoji), 2 by their squares again (InfLoRA's code; else)."""
    estimator_rank: Maybe[int] = None
    """Directions that --estimator isvd keeps of each layer; by default 256, or the layer's width where that is less."""
    damping: float = 0.1
    """Damping of the r x r inverses of the rectification, relative to their mean eigenvalue."""
    share: float = 0.5
    """How the update that both factors can carry is divided: 0 leaves it to A, 0.5 is symmetric, 1 leaves it to B."""
    balance: bool = True
    """Rescale rectified factor gradients to the plain gradients' scale."""
    gpm: Literal["auto", "dual", "plain"] = "auto"
    """Memory of inflora: dual (DualGPM) or plain (GPM); auto: plain for domainnet, as in its code, else dual."""
    frequencies: int = 3000
    """Fourier coefficients that bilora trains of each K and V projection in a task."""
    learn: Literal["all", "first", "none"] = "all"
    """Tasks in which the backbone learns: all, the first alone, or none (frozen; the heads alone learn)."""
    merge_scale: float = 1.0
    """Share of a task's update that is merged: less moves old features less."""
    drift_budget: Maybe[float] = None
    """Deviations by which a task may move features, the first ten times as far; by default 0.1, linear heads: none."""
    drift: Literal["none", "ridge"] = "none"
    """Move what is kept of old classes along with the features, by a ridge regression on the task's own images."""

    @property
    def guard(self) -> float:
        """``drift_budget`` as a limit: infinite where there is none, which its largest value says as well."""
        return math.inf if self.drift_budget is None or self.drift_budget >= NO_GUARD else self.drift_budget


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The network, its factors and its classifier."""

    backbone: Maybe[str] = None
    """Backbone: emoji (embedded, 64 px), a timm name, hf-hub:owner/name, local-dir:FOLDER; ViT-B/16 but for emoji."""
    weights: str = "pretrained"
    """Backbone weights: pretrained, none (random), or a local file: .safetensors, .pth (tensors only), .npz (JAX)."""
    image_size: Maybe[int] = None
    """Side of the images in pixels, a multiple of the backbone's patches; by default what it was pretrained with."""
    rank: Maybe[int] = None
    """Rank of the LoRA factors on each of the --targets of every block; by default 8 for emoji, else 10 to 40."""
    head: Annotated[str, arg(metavar=HEAD_NAMES)] = "auto"
    """Classifier: lda (the default), linear (--preset paper), ncm (of lora-drs); your own: package.module:function."""
    head_width: Maybe[int] = None
    """Random ReLU features beside the network's own, for --head lda or ridge (after RanPAC): 2000, say; else none."""
    normalize: Normalize = "auto"
    """Colours of the images: as the backbone was pretrained (model), or in [0, 1] (identity, --preset paper)."""
    scale: Maybe[float] = None
    """Factor s in W + s B A, by default 1; of the inverse Fourier transform in bilora, by default 300."""
    head_init: HeadInit = "auto"
    """Start of a task's linear head: small (deviation 0.01, bias 0) or default (PyTorch's, --preset paper)."""


@dataclass(frozen=True)
class OptimizationConfig(Settings):
    """The steps of a task."""

    epochs: Maybe[int] = None
    """Passes over the training images of each task; by default 12 for emoji, else 5 to 50."""
    batch_size: Maybe[int] = None
    """Images per step; by default 32 for emoji, else 128."""
    lr: Maybe[float] = None
    """Learning rate of the factors as each task starts; the default is the method's, for janus 0.0005 to 0.016."""
    head_lr: Maybe[float] = None
    """Learning rate of the task's head at its start; by default 0.01 for emoji and domainnet, else 0.0005."""
    optimizer: Literal["auto", "adam", "adamw", "sgd"] = "auto"
    """Optimizer, its state starts fresh with every task; sgd (momentum 0.9) by default for domainnet, else adam."""
    schedule: Literal["auto", "cosine", "quarter", "step", "constant"] = "auto"
    """Learning rate in a task: half a cosine (emoji's), a quarter of one (InfLoRA's), steps (domainnet's), constant."""
    milestones: Maybe[tuple[int, ...]] = None
    """Epochs after which --schedule step divides the learning rates by ten; by default 4 of domainnet's 5."""
    clip_norm: Maybe[float] = None
    """Largest global gradient norm, clipped after rectification; by default no clipping."""
    accumulate: int = 1
    """Pieces in which a batch is computed, to save memory; lora-drs' triplet loss then looks within a piece."""


@dataclass(frozen=True)
class MachineConfig(Settings):
    """Where it is computed."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Autocast of the backbone to bfloat16, or float16 with scaled gradients; auto: bf16 if the hardware has it."""
    workers: Maybe[int] = None
    """Processes that decode images, 0: none; by default one a core for a GPU (16 at most), half the cores for a CPU."""
    cache_images: bool = False
    """Keep all decoded images in memory, for small data sets."""
    checkpointing: bool = False
    """Compute each block a second time in the backward pass instead of keeping what is within it: less memory."""
    compile: bool = False
    """Compile the backbone with torch.compile, which takes minutes at the start and needs a C++ compiler."""


@dataclass(frozen=True)
class RunConfig(Settings):
    """What is kept of it, and where."""

    output: Maybe[Path] = None
    """Run folder; by default runs/<benchmark>-<method>-<seed>, numbered if that holds a finished run."""
    resume: bool = False
    """Go on with the run in --output where it was kept last; with several seeds, with each of them."""
    save_every: str = "1"
    """How often a run is kept within a task: behind every so many epochs, or minutes (10m); signals keep it at once."""
    seed: Maybe[tuple[int, ...]] = None
    """Random seeds, by default 0 (--preset paper: 0 to 4); several make one run each under <output>/seed-<n>."""
    preset: Literal["default", "paper"] = "default"
    """Where the values come from that are not given: default, or paper, the published protocol of the benchmark."""
    check_data: bool = False
    """Decode every image, report all that is missing, empty, unreadable or in no list, and do not train."""
    plots: bool = True
    """Draw plots/*.png at the end."""
    tensorboard: bool = False
    """Write the scalars of every epoch and task to <output>/tensorboard, too (pip install tensorboard)."""


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


@cache
def _hints(part: type[Settings]) -> dict[str, Any]:
    """The types of all fields."""
    return get_type_hints(part)


def _plain(value: Any) -> Any:
    """``value`` as JSON knows it: paths as text, tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
