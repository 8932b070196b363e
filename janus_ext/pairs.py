"""LoRA factors that somebody else owns, and whether their layer computes what protection presumes: W x + s B (A x)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from janus_ext.arguments import WIDEST, check_tensor, shown
from janus_ext.errors import ArgumentError, warn
from janus_ext.lora_arguments import ROUNDED_WEIGHTS, check_scale
from janus_ext.ops import WORKING_DTYPES
from janus_ext.peft_layers import base_layer, check_adapter


class LoRAPair(NamedTuple):
    """LoRA factors that somebody else owns: the layer computes W x + s B (A x).

    Attributes:
        A: [r, n] parameter, float32 or float64.
        B: [m, r] parameter.
        scale: s.
        module: the module whose input is x (observed by `GradientRectifier.observe`), or None. For PEFT the LoRA layer
            itself: it also shows whether the adapter is one that can be protected.
    """

    A: nn.Parameter
    B: nn.Parameter
    scale: float = 1.0
    module: nn.Module | None = None


def checked_pair(name: str, item: Any) -> LoRAPair:
    """The pair that `item` is, or an ArgumentError that says why it cannot be rectified."""
    if not isinstance(item, Sequence) or isinstance(item, str) or not 2 <= len(item) <= 4:
        found = f"{len(item)} items" if isinstance(item, (tuple, list)) else shown(item)
        raise ArgumentError(f"{name}: each of layers must be a LoRA layer or (A, B[, scale[, module]]), got {found}")
    pair = LoRAPair(*item)
    for factor, tensor in (("A", pair.A), ("B", pair.B)):
        check_tensor(f"{name}: {factor}", tensor, "of float32 or float64")
        if tensor.dtype not in WORKING_DTYPES:
            raise ArgumentError(
                f"{name}: {factor} must be float32 or float64, got {_short(tensor.dtype)}: "
                "half precision cannot keep A V = 0; hold the adapter in float32"
            )
    _check_shapes(name, pair.A, pair.B)
    check_scale(name, pair.scale)
    pair = pair._replace(scale=float(pair.scale))
    if pair.module is not None and not isinstance(pair.module, nn.Module):
        raise ArgumentError(f"{name}: module must be a torch.nn.Module or None, got {shown(pair.module)}")
    if pair.module is not None:
        check_adapter(name, *pair)
    return pair


def warn_of_rounded_weights(modules: Mapping[str, nn.Module | None]) -> None:
    """One warning where a module by that name keeps W in less than float32: merging will round W + s B A."""
    weights = {name: _weight(module) for name, module in modules.items()}
    coarse = [name for name, weight in weights.items() if weight is not None and weight.dtype not in WORKING_DTYPES]
    if coarse:
        others = f" (and {len(coarse) - 1} more)" if len(coarse) > 1 else ""
        warn(f"{coarse[0]}{others}: hold W in float32, got {_short(weights[coarse[0]].dtype)}; {ROUNDED_WEIGHTS}")


def _check_shapes(name: str, A: Tensor, B: Tensor) -> None:
    shapes = f"{list(A.shape)} and {list(B.shape)}"
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ArgumentError(f"{name}: A and B must be [r, n] and [m, r], got {shapes}")
    if not 1 <= A.shape[0] <= A.shape[1] <= WIDEST:
        raise ArgumentError(f"{name}: A and B must be [r, n] and [m, r] with r from 1 to n <= {WIDEST}, got {shapes}")
    if A.dtype != B.dtype or A.device != B.device:
        found = f"{_short(A.dtype)} on {A.device} and {_short(B.dtype)} on {B.device}"
        raise ArgumentError(f"{name}: A and B must be of one dtype on one device, got {found}")


def _weight(module: nn.Module | None) -> Tensor | None:
    weight = None if module is None else getattr(base_layer(module), "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
