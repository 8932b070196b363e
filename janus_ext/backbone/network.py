"""What a backbone is, in a few JSON values: enough to make it again when the source of its weights is gone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from janus_ext.arguments import called
from janus_ext.backbone.files import first_line
from janus_ext.backbone.sources import Source
from janus_ext.backbone.torchvision_guard import prepare_torchvision
from janus_ext.errors import ArgumentError, CheckpointError

DROP_RATES = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
LARGEST = 13376  # pixels of a side: Pillow makes no square that is larger, and the positions of a ViT take gigabytes
CALLED = ("forward_features", "forward_head", "num_features", "reset_classifier")  # of a backbone, as timm's have them


def attach(model: nn.Module, mean: Sequence[float], std: Sequence[float], size: int, network: dict) -> nn.Module:
    """Tells ``model`` what images must look like and what it is; dropout is switched off.

    ``network`` has "name" and "options" of what timm makes, and "cfg" of the weights where that is not timm's.
    ValueError unless images can be brought to that.
    """
    _check_input(mean, std, size)
    if missing := [name for name in CALLED if not hasattr(model, name)]:
        raise ValueError(f"it is no classifier of timm's: it lacks {', '.join(missing)}")
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
    except CheckpointError:
        raise
    except Exception as error:  # the models of timm refuse in any way
        raise CheckpointError(
            f"no backbone can be made as it is described here: {network!r:.200} ({first_line(error)})"
        ) from error


def _check_input(mean: Any, std: Any, size: Any) -> None:
    numbers = [*mean, *std]
    if len(mean) != 3 or len(std) != 3 or not all(isinstance(n, (int, float)) and isfinite(n) for n in numbers):
        raise ValueError("mean and std must be three numbers each")
    if max(map(abs, numbers)) > 1e6 or min(std) < 1e-6:
        raise ValueError("mean must be from -1e6 to 1e6, and std from 1e-6 to 1e6")
    if not isinstance(size, int) or not 1 <= size <= LARGEST:
        raise ValueError(f"size must be from 1 to {LARGEST} pixels")


def make_vision_transformer(options: dict[str, Any]) -> nn.Module:
    """timm's VisionTransformer with these options, random weights, no dropout of any kind and no classifier."""
    prepare_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**(options | dict.fromkeys(DROP_RATES, 0.0) | {"num_classes": 0}))


def recompute_blocks(model: nn.Module) -> None:
    """From now on ``model`` computes its blocks again in the backward pass; ArgumentError where timm's cannot."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ArgumentError(f"--checkpointing: timm's {type(model).__name__} knows none") from error


@called
def adopt(model: nn.Module) -> nn.Module:
    """A copy of somebody's timm model as a backbone: float32, without its classifier, dropout off.

    It is told what images it takes. The name in its ``description`` is None unless timm makes a network of that name
    and image size that computes the same from the same weights.

    Raises:
        ArgumentError: it is none of timm's models, or does not make one feature of a square image in three colours.
    """
    return adopted("model", model)


def adopted(argument: str, model: Any, wanted: str = "a model of timm's") -> nn.Module:
    """What `adopt` gives, of an argument of that name."""
    missing = [name for name in CALLED if not hasattr(model, name)]
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(model, nn.Module) or missing or not cfg:
        lacking = ", ".join(missing) or "pretrained_cfg"
        raise ArgumentError(f"{argument} must be {wanted}, got {type(model).__name__} without {lacking}")
    model = copy.deepcopy(model).float()
    model.reset_classifier(0)
    if isinstance(getattr(model, "description", None), dict):  # of load_backbone
        return model
    size = _image_size(argument, model)
    try:
        attach(model, cfg["mean"], cfg["std"], size, {"name": None, "options": {}, "cfg": None})
    except (KeyError, TypeError, ValueError) as error:
        reason = f"must say in pretrained_cfg what images it takes: {first_line(error)}"
        raise ArgumentError(f"{argument} {reason}") from error
    features = _features(argument, model)
    name = cfg.get("architecture")
    found = next((options for options in ({}, {"img_size": size}) if _makes(name, options, model, features)), None)
    if found is not None:
        model.description |= {"name": name, "options": found}
    return model


@torch.no_grad()
def probe(model: nn.Module) -> Tensor:
    """float64 [2, d]: what a backbone makes of two images of noise, always the same; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, model.input_size, model.input_size)
    pixels = torch.randn(shape, generator=generator, dtype=torch.float32)  # whatever the caller's default is
    device, mode = next(model.parameters()).device, {module: module.training for module in model.modules()}
    features = model.eval().forward_head(model.forward_features(pixels.to(device)), pre_logits=True)
    for module, training in mode.items():
        module.training = training
    return features.double().cpu()


def _features(argument: str, model: nn.Module) -> Tensor:
    """The probe of somebody's model; ArgumentError in one line where it takes or gives something else."""
    kind = type(model).__name__
    try:
        features = probe(model)
    except Exception as error:  # models of timm refuse in any way
        raise ArgumentError(
            f"{argument} must take square images in three colours; {kind} does not take {model.input_size} pixels: "
            f"{first_line(error)}"
        ) from error
    if features.shape != (2, model.num_features):
        wanted, found = [model.num_features], list(features.shape[1:])
        raise ArgumentError(f"{argument} must make one feature {wanted} of an image, {kind} makes {found}")
    return features


def _makes(name: str | None, options: dict[str, Any], model: nn.Module, wanted: Tensor) -> bool:
    """Whether timm's network of that name and options is this one: the same tensors, and features from them."""
    if name is None:
        return False
    with torch.random.fork_rng(devices=[]):
        try:
            other = Source("", name, None, options).create()
            other.load_state_dict(model.state_dict())
            attach(other, (0, 0, 0), (1, 1, 1), model.input_size, {})
            found = probe(other)
        except Exception:  # timm refuses in any way what is no name of its, or no option of that network
            return False
    return found.shape == wanted.shape and float((found - wanted).norm()) <= 1e-4 * float(wanted.norm())


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


def _image_size(argument: str, model: nn.Module) -> int:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][-1]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ArgumentError(f"{argument} must take square images, {type(model).__name__} takes {list(size)}")
    return sides.pop()
