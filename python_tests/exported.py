"""Runs and models to be exported, and what their scores are."""

from pathlib import Path

import pytest
import torch
from conftest import make_trainer
from torch import Tensor, nn

from janus_ext import ContinualLearner, inject
from janus_ext.backbone import prepare_torchvision
from janus_ext.classifier import ContinualClassifier
from janus_ext.data.images import View
from janus_ext.exports import onnx, peft, pt2, timm
from janus_ext.exports.contents import Contents
from janus_ext.heads.base import Decision
from janus_ext.runs.checkpoint import write_json

PACKAGES = {"timm": (), "pt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "peft": ("peft",)}
EXPORTS = {"timm": timm.export, "onnx": onnx.export, "pt2": pt2.export, "peft": peft.export}
METHODS = {
    "janus": {"scale": 0.7, "head": "linear"},
    "janus, ncm": {"head": "ncm"},
    "janus, lda": {"head": "lda"},
    "janus, ridge": {"head": "ridge"},
    "janus, lda of random features": {"head": "lda", "head_width": 40},
    "janus, aligned": {"head": "aligned"},
    "janus, all targets": {"targets": ("fc2", "q", "v", "proj", "fc1"), "scale": 0.7},
    "janus, one map": {"targets": ("proj",)},
    "janus, in the first task": {"learn": "first", "head": "lda"},
    "janus, half merged, moved along": {"merge_scale": 0.5, "drift": "ridge", "head": "lda"},
    "lora": {},
    "lora-gpm": {},
    "inflora": {},
    "lora-drs": {},
    "bilora": {"frequencies": 100},
}


def needs(name: str) -> None:
    prepare_torchvision()
    for package in PACKAGES[name]:
        pytest.importorskip(package)


def run_of(case: str, patterns, weights, path: Path) -> Path:
    """The folder of a finished run on three tasks."""
    trainer = make_trainer(patterns, weights, path, method=case.split(",")[0], epochs=2, **METHODS[case])
    trainer.run()
    write_json(path / "config.json", trainer.config.to_json() | {"tasks": 3})
    return path


def contents_of(run: Path) -> Contents:
    """What the command exports."""
    return ContinualLearner.load(run, device="cpu").contents()


@torch.no_grad()
def scores_of(contents: Contents, images: Tensor) -> Tensor:
    """The scores of the run itself, adapters and all."""
    features = contents.model.eval().features(images)
    return contents.decision.scores(features).softmax(-1)


def assert_untouched(contents: Contents, before: dict[str, Tensor]) -> None:
    after = contents.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, before[key]) for key, value in after.items())


def state(contents: Contents) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in contents.model.state_dict().items()}


def contents_on(backbone: nn.Module, classes: int = 3, **settings) -> Contents:
    """A model that has learned nothing yet, with random heads."""
    model = ContinualClassifier(backbone)
    inject(backbone, rank=2)
    model.add_task(classes, "default")
    names = tuple(f"class {index}" for index in range(classes))
    decision = Decision(model.heads[0].weight.detach(), model.heads[0].bias.detach())
    return Contents(
        model.eval(), decision, names, {"method": "janus", "backbone": "x"} | settings, view=View(model.input_size)
    )
