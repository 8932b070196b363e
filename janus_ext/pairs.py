"""LoRA factors that somebody else owns, and whether their layer computes what protection presumes: W x + s B (A x).

A layer of PEFT is known by its attributes (`lora_A`, `scaling`, ... by adapter name), so that PEFT need not be there.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from janus_ext.arguments import check_tensor, shown
from janus_ext.errors import ArgumentError
from janus_ext.lora_arguments import ROUNDED_WEIGHTS, check_scale
from janus_ext.ops import WORKING_DTYPES


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
        raise ArgumentError(f"{name}: must be a LoRA layer or (A, B[, scale[, module]]), got {found}")
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
    if pair.module is not None and not isinstance(pair.module, nn.Module):
        raise ArgumentError(f"{name}: module must be a torch.nn.Module or None, got {shown(pair.module)}")
    _check_adapter(name, pair)
    return pair


def is_merged(A: Tensor, module: nn.Module | None) -> bool:
    """Whether PEFT has added the adapter of `A` to the weight, and computes it no more."""
    return _adapter(A, module) in getattr(module, "merged_adapters", ())


def warn_of_rounded_weights(modules: Mapping[str, nn.Module | None]) -> None:
    """One warning where a module by that name keeps W in less than float32: merging will round W + s B A."""
    weights = {name: _weight(module) for name, module in modules.items()}
    coarse = [name for name, weight in weights.items() if weight is not None and weight.dtype not in WORKING_DTYPES]
    if coarse:
        others = f" (and {len(coarse) - 1} more)" if len(coarse) > 1 else ""
        warnings.warn(
            f"{coarse[0]}{others}: hold W in float32, got {_short(weights[coarse[0]].dtype)}; {ROUNDED_WEIGHTS}",
            stacklevel=3,
        )


def _check_shapes(name: str, A: Tensor, B: Tensor) -> None:
    shapes = f"{list(A.shape)} and {list(B.shape)}"
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ArgumentError(f"{name}: A and B must be [r, n] and [m, r], got {shapes}")
    if not 1 <= A.shape[0] <= A.shape[1]:
        raise ArgumentError(f"{name}: A and B must be [r, n] and [m, r] with r from 1 to n, got {shapes}")
    if A.dtype != B.dtype or A.device != B.device:
        found = f"{_short(A.dtype)} on {A.device} and {_short(B.dtype)} on {B.device}"
        raise ArgumentError(f"{name}: A and B must be of one dtype on one device, got {found}")


def _check_adapter(name: str, pair: LoRAPair) -> None:
    """Refuse a PEFT layer that computes something else with this pair's adapter, or trains more than the pair."""
    module, adapter = pair.module, _adapter(pair.A, pair.module)
    if adapter is None:
        return
    variant = _variant(module, adapter)
    if variant is not None:
        cure = "make it with use_dora=False" if variant == "DoRA" else "make it as plain LoRA"
        raise ArgumentError(f"{name}: the adapter must compute W x + s B A x, but {variant} computes otherwise: {cure}")
    if getattr(module.lora_B[adapter], "bias", None) is not None:
        raise ArgumentError(f"{name}: B has a bias, which moves protected outputs: make it with lora_bias=False")
    trained = [key for key, p in _base(module).named_parameters(recurse=False) if p.requires_grad]
    if trained:
        raise ArgumentError(
            f"{name}: the layer's own {trained[0]} is trained, which moves protected outputs: make the adapter with "
            "bias='none' (lora_only and all train it), or freeze it"
        )
    scaling = module.scaling[adapter]
    if not math.isclose(scaling, pair.scale, rel_tol=1e-6):
        raise ArgumentError(f"{name}: scale must be the adapter's scaling, {scaling:g}, got {pair.scale:g}")
    if is_merged(pair.A, module):
        raise ArgumentError(f"{name}: the adapter is merged, so that it is not trained: call unmerge_adapter() first")


def _adapter(A: Tensor, module: nn.Module | None) -> str | None:
    """Name of the adapter of a PEFT layer that has A as its factor."""
    adapters = getattr(module, "lora_A", None)
    if not isinstance(adapters, (nn.ModuleDict, nn.ParameterDict)):
        return None
    return next((name for name, factor in adapters.items() if getattr(factor, "weight", factor) is A), None)


def _variant(module: nn.Module, adapter: str) -> str | None:
    """What the adapter is instead of plain LoRA."""
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if getattr(module, "use_dora", {}).get(adapter) or adapter in getattr(module, "lora_magnitude_vector", ()):
        return "DoRA"
    if adapter in getattr(module, "lora_E", ()):
        return "AdaLoRA"
    return None if variant is None else getattr(variant, "__name__", type(variant).__name__)


def _base(module: nn.Module) -> nn.Module:
    """The module that holds W."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _weight(module: nn.Module | None) -> Tensor | None:
    weight = None if module is None else getattr(_base(module), "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
