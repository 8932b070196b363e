"""Gradient Rectification of the factor gradients of all layers at once."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from janus_ext import reference
from janus_ext.arguments import shown
from janus_ext.ops.registry import RECTIFICATION, define
from janus_ext.rectification import Rectification, rectification_of
from janus_ext.reference.checks import check_scale


def rectify_(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    basis: Sequence[Tensor | None],
    scale: float | Sequence[float] = 1.0,
    rectify: str | Rectification = "exact",
    **options: Any,
) -> None:
    """Rectify the factor gradients of all layers in place, in one call before the optimizer's step.

    The gradients that `lora_linear` and `lora_qkv` return in their backward, from plain ones: g_A = s B^T G and
    g_B = s G A^T. Linear in the gradients for fixed A, B, V: accumulation, averaging and loss scaling commute with it.

    Args:
        A, B: lists, one entry a layer, [r, n] and [m, r] ([g, r, n] and [g, m, r] for layers with several targets).
        grad_A, grad_B: lists of the same shapes, float32 or float64 like A; rewritten.
        basis: list of V [n, k]; None or k = 0 protects nothing. On the CPU layers with the very same V share a product
            with it, so that copies of V give other last bits.
        scale: a number, or one a layer.
        rectify: a `Rectification`, or the name of one. "exact" presumes A V = 0 (checked: |A V| <= 1e-3 |A|);
            "tangent" with a basis raises, since factor gradients do not hold G V: use it in the backward. On a GPU the
            check of A V = 0 costs no wait: where it fails, the gradients of these factors are set to 0, and the
            next call raises, with the layer's index in the call that found it; so nothing is said of the last call of a
            process, or of a CUDA graph that is only replayed. Float64 and ranks above 64 wait, and raise at once.
        options: as in `lora_linear`.
    """
    how = rectification_of("rectify_", rectify, options, balance=False)
    lists = {"A": A, "B": B, "grad_A": grad_A, "grad_B": grad_B, "basis": basis}
    lists["scale"] = [scale] * len(A) if isinstance(scale, Real) and isinstance(A, Sequence) else scale
    for name, values in lists.items():
        if not isinstance(values, Sequence):
            raise TypeError(f"rectify_: {name} must be a list, one entry a layer, got {shown(values)}")
    reference.check_lengths("rectify_", *lists.values())
    lists["basis"] = [_nothing(a) if v is None else v for a, v in zip(A, basis, strict=True)]
    lists["scale"] = [check_scale("rectify_", s) if isinstance(s, Real) else s for s in lists["scale"]]
    with torch.no_grad():
        torch.ops.janus_ext.rectify_(*map(list, lists.values()), *how.values)


def _nothing(A: Any) -> Tensor | None:
    """The basis [n, 0] of factors [..., r, n]."""
    return A.new_empty(*A.shape[-1:], 0) if isinstance(A, Tensor) else None


def _fake(*_: Any, **__: Any) -> None:
    return None


define(
    "rectify_(Tensor[] A, Tensor[] B, Tensor(a!)[] grad_A, Tensor(b!)[] grad_B, Tensor[] basis, float[] scale, "
    f"{RECTIFICATION}) -> ()",
    reference.rectify_,
    _fake,
)
