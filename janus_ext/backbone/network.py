"""What a backbone is, in a few JSON values: enough to make it again when the source of its weights is gone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from janus_ext.backbone.sources import Source
from janus_ext.backbone.torchvision_guard import prepare_torchvision
from janus_ext.errors import ArgumentError, CheckpointError

DROP_RATES = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
CALLED = ("forward_features", "forward_head", "num_features", "reset_classifier")  # of a backbone, as timm's have them


def attach(model: nn.Module, mean: Sequence[float], std: Sequence[float], size: int, network: dict) -> nn.Module:
    """Tells ``model`` what images must look like and what it is; dropout is switched off.

    ``network`` has "name" and "options" of what timm makes, and "cfg" of the weights where that is not timm's.
    """
    without_dropout(model)
    model.input_mean, model.input_std, model.input_size = tuple(mean), tuple(std), int(size)
    model.description = network | {"mean": list(mean), "std": list(std), "size": int(size)}
    return model


def rebuild(network: dict[str, Any]) -> nn.Module:
    """The backbone that was so described, with random weights; CheckpointError where that is no description."""
    prepare_torchvision()
    try:
        kind = {key: network[key] for key in ("name", "options", "cfg")}
        model = Source("of this run", kind["name"], kind["cfg"], kind["options"]).create()
        return attach(model, network["mean"], network["std"], network["size"], kind)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"no backbone can be made as it is described here: {network} ({error})") from error


def make_vision_transformer(options: dict[str, Any]) -> nn.Module:
    """timm's VisionTransformer with these options, random weights, no dropout of any kind and no classifier."""
    prepare_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**(options | dict.fromkeys(DROP_RATES, 0.0) | {"num_classes": 0}))


def adopt(model: nn.Module) -> nn.Module:
    """A copy of somebody's timm model as a backbone: without its classifier, dropout off, told what images it takes.

    Its ``description`` is None unless timm makes a network of the same tensors from the name and image size it has.

    Raises:
        ArgumentError: it is none of timm's models.
    """
    missing = [name for name in CALLED if not hasattr(model, name)]
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(model, nn.Module) or missing or not cfg:
        lacking = ", ".join(missing) or "pretrained_cfg"
        raise ArgumentError(
            f"backbone must be a name or a model of timm's, got {type(model).__name__} without {lacking}"
        )
    model = copy.deepcopy(model)
    known = getattr(model, "description", None)
    model.reset_classifier(0)
    if known is not None:
        return model
    size = _image_size(model)
    attach(model, cfg["mean"], cfg["std"], size, {})
    model.description = _recognised(model, size)
    return model


def without_dropout(model: nn.Module) -> None:
    """No dropout and no stochastic depth, which some of timm's networks have by default (Swin 0.1, Nest 0.5).

    The published protocols train without; and what a layer's estimator observes in training should be what it gets.
    """
    from timm.layers import DropPath, PatchDropout

    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, PatchDropout):
            module.prob = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0


def _image_size(model: nn.Module) -> int:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][-1]
    return size if isinstance(size, int) else size[0]


def _recognised(model: nn.Module, size: int) -> dict[str, Any] | None:
    """The description of a network of timm's with the same names and shapes of tensors; None where none is found."""
    name = model.pretrained_cfg.get("architecture")
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    for options in ({}, {"img_size": size}):
        try:
            with torch.device("meta"):
                other = Source("", name, None, options).create()
        except Exception:  # timm refuses in any way what is no name of its, or no option of that network
            continue
        if {key: tensor.shape for key, tensor in other.state_dict().items()} == shapes:
            cfg = model.pretrained_cfg
            described = {"mean": list(cfg["mean"]), "std": list(cfg["std"]), "size": size}
            return {"name": name, "options": options, "cfg": None, **described}
    return None
