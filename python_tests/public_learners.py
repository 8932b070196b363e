"""What a public callable's right call is, and those of `ContinualLearner`, on a transformer of one block."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from janus_ext import ContinualLearner, backbone
from janus_ext.data.collect import labelled_as, unlabelled
from janus_ext.data.images import View


@dataclass
class Right:
    """One right call.

    Attributes:
        call: is called with the arguments by name.
        owner: the object whose method it is; it must not change when a call is refused.
        written: arguments that the call may change.
        who: what a refusal names, one of these.
        value: what of arguments and result is determined, where a result of the same worth may be another.
        reference: what gives the right value, if not the call itself on plain copies.
        names: by which a refusal may name an argument, too: the flag of a command, say.
    """

    call: Callable[..., Any]
    arguments: dict[str, Any]
    owner: Any = None
    written: tuple[str, ...] = ()
    who: tuple[str, ...] = ()
    value: Callable[[dict[str, Any], Any], list[Tensor]] | None = None
    reference: Callable[..., Any] | None = None
    names: tuple[str, ...] = ()


def tiny_model() -> nn.Module:
    """A transformer of one block, as timm makes it."""
    backbone.prepare_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, num_classes=3)
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 16, 16)}
    return model


SETTINGS = {"rank": 2, "epochs": 1, "batch_size": 8, "lr": 1e-2, "energy_start": 0.5, "energy_end": 0.5}
SETTINGS |= {"energy_power": 1, "workers": 0, "amp": "off", "device": "cpu"}
A_PATH = "cannot be read"  # what `predict` says of a file that it meets: its path stands for the argument
FLAGS = tuple(name.replace("_", "-") for name in SETTINGS)  # by which settings are named


def _images(*names: str) -> list[tuple[Tensor, str]]:
    return [(torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), names[i % len(names)]) for i in range(4)]


@cache
def _learned() -> ContinualLearner:
    made = ContinualLearner(tiny_model(), **SETTINGS)
    made.learn(_images("ant", "bee"))
    return made


def _learning(name: str, *names: str, **arguments: Any) -> Right:
    """A method of a copy of a learner of two classes."""
    made = copy.deepcopy(_learned())
    return Right(getattr(made, name), arguments, made, who=(f"ContinualLearner.{name}: ",), names=names)


def _classifying() -> Right:
    right = _learning(
        "classify", split=unlabelled([image for image, _ in _images("ant")], View(16)), top=2, temperature=2.0
    )
    classify = right.call
    right.call = lambda **arguments: list(classify(**arguments))
    return right


def _saved() -> Path:
    """The folder of a learner that was saved, made once a process."""
    if not Path("saved").exists():
        _learned().save("saved")
    return Path("saved")


LEARNERS: dict[str, Callable[[], Right]] = {
    "ContinualLearner": lambda: Right(
        ContinualLearner,
        {"backbone": tiny_model(), "method": "janus", "head": "lda", "seed": 1, "planned_tasks": 4, **SETTINGS},
        who=("ContinualLearner: ",), names=FLAGS,
    ),
    "ContinualLearner.from_classifier": lambda: Right(
        ContinualLearner.from_classifier,
        {"model": tiny_model(), "class_names": ["ant", "bee", "cat"], "method": "janus", **SETTINGS},
        who=("ContinualLearner.from_classifier: ",), names=FLAGS,
    ),
    "ContinualLearner.learn": lambda: _learning("learn", images=_images("cat", "dog"), classes=["dog", "cat"]),
    "ContinualLearner.observe": lambda: _learning("observe", images=_images("ant", "bee"), labelled=False),
    "ContinualLearner.predict": lambda: _learning(
        "predict", A_PATH, images=[image for image, _ in _images("ant")], top=2, calibrate=_images("ant", "bee")
    ),
    "ContinualLearner.classify": _classifying,
    "ContinualLearner.temperature": lambda: _learning("temperature", images=_images("ant", "bee")),
    "ContinualLearner.evaluate": lambda: _learning("evaluate", images=_images("ant", "bee")),
    "ContinualLearner.evaluate_split": lambda: _learning(
        "evaluate_split", split=labelled_as(_images("ant", "bee"), ["ant", "bee"], View(16)), class_names=["ant", "bee"]
    ),
    "ContinualLearner.workers": lambda: _learning("workers", asked=1),
    "ContinualLearner.save": lambda: _learning("save", folder="mine"),
    "ContinualLearner.load": lambda: Right(
        ContinualLearner.load,
        {"folder": _saved(), "device": "cpu", "backbone": tiny_model(), "head": "ncm", "method": "janus"},
        who=("ContinualLearner.load: ",),
    ),
}  # fmt: skip
