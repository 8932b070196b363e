"""``janus_ext.export``: writes what a run has learned for timm, ONNX, PEFT or as a program of torch.export."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from janus_ext.backbone import load_backbone
from janus_ext.classifier import ContinualClassifier
from janus_ext.config import TrainConfig
from janus_ext.errors import ArgumentError, JanusError
from janus_ext.exports import onnx, peft, pt2, timm
from janus_ext.exports.contents import PUBLISHED_CROP, Contents, Update, linear_rows, prototype_rows
from janus_ext.methods import METHODS
from janus_ext.runs.checkpoint import read_json, read_tensors
from janus_ext.terminal import escaping, until_closed
from janus_ext.training.trainer import naming_file

FORMATS: dict[str, Callable[[Contents, Path], None]] = {
    "timm": timm.export,
    "onnx": onnx.export,
    "peft": peft.export,
    "pt2": pt2.export,
}
UNCROPPED = ("emoji", "cifar100")  # benchmarks whose images are shown as a whole


@dataclass(frozen=True)
class ExportConfig:
    """Writes what a run has learned so far for use elsewhere, with a model card; the run stays as it is.

    janus_ext.export runs/emoji-janus-0 --format onnx --output flat-icons
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run, of one seed."""
    format: Literal["timm", "onnx", "peft", "pt2"]
    """timm: weights and config.json; onnx, pt2: image to scores in one file; peft: an adapter for every task."""
    output: Path
    """Folder to write, new or empty."""


@escaping()
@until_closed
def main(argv: Sequence[str] | None = None) -> int:
    """Parses ``argv`` and exports; 0 on success, 2 with one line on stderr for what the user can mend."""
    config = tyro.cli(ExportConfig, prog="janus_ext.export", args=argv)
    try:
        FORMATS[config.format](contents_of(config.run), config.output)
        print(f"{config.output}: README.md there says how to load it")
    except BrokenPipeError:  # no error of ours: see until_closed
        raise
    except (JanusError, OSError) as error:  # the system's own errors name the file and what is wrong with it
        print(f"janus_ext.export: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\njanus_ext.export: interrupted, nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def contents_of(run: Path) -> Contents:
    """What a run folder holds behind its last finished task.

    Raises:
        ArgumentError: it is no folder of a run with a finished task.
        CheckpointError: a file of it is damaged.
    """
    path = run / "checkpoints" / "model.safetensors"
    if not path.exists():
        raise ArgumentError(f"{run} is no run with a finished task: it has no checkpoints/model.safetensors")
    settings = read_json(run / "config.json")
    fields = {name: settings[name] for name in TrainConfig.__dataclass_fields__ if name in settings}
    config = replace(TrainConfig(**fields), device="cpu")
    state, about = read_tensors(path)
    updates = _updates(run, len(json.loads(about["results"])["accuracy_matrix"]))
    model = ContinualClassifier(
        load_backbone(config.backbone, config.weights, config.image_size), None, config.normalize
    )
    method = METHODS[config.method](model, config)
    for update in updates:
        model.add_task(len(update.class_names))
    with naming_file(path):
        model.load_state_dict(state)
    kept = run / "checkpoints" / f"method-{len(updates) - 1}.safetensors"
    with naming_file(kept):
        method.load_state_dict(read_tensors(kept)[0])
    names = tuple(name for update in updates for name in update.class_names)
    rows = prototype_rows(method.prototypes, len(names)) if config.head == "ncm" else linear_rows(model.heads)
    crop = 1.0 if config.benchmark in UNCROPPED else PUBLISHED_CROP
    return Contents(model, *rows, names, settings, updates, json.loads(about["results"]), crop)


def _updates(run: Path, tasks: int) -> tuple[Update, ...]:
    updates = []
    for index in range(tasks):
        tensors, about = read_tensors(run / "checkpoints" / f"factors-{index}.safetensors")
        names = json.loads(about["class_names"])
        classes = tuple(names[label] for label in json.loads(about["classes"]))
        updates.append(Update(tensors, float(about["scale"]), classes))
    return tuple(updates)


if __name__ == "__main__":
    sys.exit(main())
