"""timm: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` and `load_backbone` take.

``model.safetensors`` has timm's names, so that ``checkpoint_path`` takes it, too; ``config.json`` is in the layout of
timm's hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from janus_ext.errors import ArgumentError
from janus_ext.exports import card, usage
from janus_ext.exports.contents import Contents
from janus_ext.exports.folder import check_same, new_folder, random_images
from janus_ext.exports.plain import plain_model
from janus_ext.runs.checkpoint import write_json, write_tensors

KEPT = ("fixed_input_size", "pool_size", "first_conv", "classifier")  # of timm's description of the architecture
WEIGHTS = "model.safetensors"


def export(contents: Contents, folder: Path) -> None:
    """Writes model.safetensors, config.json and README.md; ``folder`` is new or empty.

    Raises:
        ArgumentError: timm cannot make this network, or it has no linear classifier.
        CheckpointError: the folder cannot be written, or what timm reads from it is not what was written.
    """
    plain = plain_model(contents.model, *contents.decision.rows())
    architecture, options = call_of(contents.model)
    with new_folder(folder) as made:
        write_tensors(made / WEIGHTS, plain.state_dict(), {"format": "pt"})
        found = _read(made / WEIGHTS, architecture, options, len(contents.class_names))
        pixels = (random_images(contents.model.input_size) / 255).float()
        with torch.no_grad():
            check_same("timm computes otherwise", found(pixels).softmax(-1), plain(pixels).softmax(-1), 1e-5)
        write_json(made / "config.json", _config(contents, architecture, options, found))
        card.write(made, contents, usage.timm())


def call_of(model: Any) -> tuple[str, dict[str, Any]]:
    """(name, arguments) with which `timm.create_model` makes the network of a ContinualClassifier's backbone.

    `load_backbone` knows; of a network that came from elsewhere, timm's own description and the size of its images.
    """
    backbone = model.backbone
    network = getattr(backbone, "description", None)
    if network is not None and network["name"] is not None:
        return network["name"].partition(".")[0], network["options"]
    described = getattr(backbone, "pretrained_cfg", None) or {}
    if "architecture" not in described:
        raise ArgumentError(f"this format needs a network of timm's, got {type(backbone).__name__}")
    other_size = described["input_size"][-1] != model.input_size
    return described["architecture"], {"img_size": model.input_size} if other_size else {}


def _read(weights: Path, architecture: str, options: dict[str, Any], classes: int) -> nn.Module:
    """The network as its user will have it from timm."""
    import timm

    with torch.random.fork_rng(devices=[]):
        try:
            model = timm.create_model(architecture, num_classes=classes, checkpoint_path=str(weights), **options)
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ArgumentError(
                f"timm's {architecture} with {options} is another network than this: {reason}"
            ) from error
    return model.eval()


def _config(contents: Contents, architecture: str, options: dict[str, Any], made: nn.Module) -> dict[str, Any]:
    size, model = contents.model.input_size, contents.model
    described = {key: made.pretrained_cfg[key] for key in KEPT if made.pretrained_cfg.get(key) is not None}
    return {
        "architecture": architecture,
        "num_classes": len(contents.class_names),
        "num_features": made.num_features,
        "label_names": list(contents.class_names),
        "model_args": options,
        "pretrained_cfg": described
        | {
            "custom_load": False,
            "num_classes": len(contents.class_names),
            "input_size": [3, size, size],
            "interpolation": contents.view.interpolation,
            "crop_pct": contents.view.crop_pct,
            "crop_mode": contents.view.crop_mode,
            "mean": [round(float(value) / 255, 6) for value in model.mean.flatten()],
            "std": [round(float(value) / 255, 6) for value in model.std.flatten()],
        },
    }
