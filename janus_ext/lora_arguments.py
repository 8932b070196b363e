"""Checks of what layers and plug-ins are made from: ArgumentError there, and not in the first forward."""

import torch
from torch import nn

from janus_ext.arguments import are_floats, check_integer, check_number
from janus_ext.errors import ArgumentError

ROUNDED_WEIGHTS = (
    "weights in half precision are rounded, and the update with them: 4e-3 of it (float16 5e-4) and more, the smaller "
    "it is beside W, reaches protected inputs, instead of 1e-5 or less"
)


def check_scale(who: str, scale: object) -> None:
    """ArgumentError unless s in W + s B A is a number that the ops take."""
    float32 = torch.finfo(torch.float32)
    check_number(
        f"{who}: scale", scale, lambda s: float32.tiny <= abs(s) <= float32.max, "finite and not zero in float32"
    )


def check_linear(who: str, linear: object) -> None:
    """ArgumentError unless `linear` is an nn.Linear that computes x W^T + b from parameters of its own, and no more."""
    found = type(linear).__name__
    if isinstance(linear, nn.Linear):
        found = f"a {found} " + _oddity(linear)
        if not _oddity(linear):
            return
    raise ArgumentError(f"{who}: linear must be a plain nn.Linear, got {found}")


def _oddity(linear: nn.Linear) -> str:
    """What makes an nn.Linear more than x W^T + b: an adapter around its weight would compute something else."""
    weight = linear._parameters.get("weight")
    if weight is None or weight is not linear.weight:
        return "whose weight is computed from other parameters"
    if isinstance(weight, nn.UninitializedParameter):
        return "that has no weight before its first forward pass"
    if not are_floats(weight):
        return f"with a weight in {str(weight.dtype).removeprefix('torch.')}"
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return "with a forward of its own"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return "with hooks, which would not be called"
    return ""


def check_rank(who: str, linear: nn.Linear, rank: object) -> None:
    """ArgumentError unless factors of this rank fit the layer."""
    room = min(linear.in_features, linear.out_features)
    check_integer(f"{who}: rank", rank, lambda r: 1 <= r <= room, f"from 1 to min(m, n) = {room}")
