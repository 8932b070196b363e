"""Decoupled Margin Loss."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from janus_ext import reference
from janus_ext.ops.registry import define, require_frozen, require_reverse_mode


def margin_loss(features: Tensor, prototypes: Tensor, margin: float, temperature: float) -> Tensor:
    """Push new features away from old prototypes: mean_i (1/tau) log(1 + sum_c exp(tau (f^_i . p_c - margin))).

    The Decoupled Margin Loss of the paper, in this project's form (a smooth hinge on the cosine). The gradient is
    computed in the forward pass; differentiable once, in features. No prototypes: exactly zero, and no gradient.

    Args:
        features: [N, d], float64, float32, bfloat16 or float16; only their direction f^ = f / |f| matters,
            as long as |f| is from 1e-19 to 1e19 (in float64 from 1e-154 to 1e154): shorter ones have none.
        prototypes: [C, d], float32 or float64, unit rows, frozen: class means of old tasks.
        margin: cosine beyond which a feature is too close, in [-1, 1].
        temperature: tau > 0; the larger, the sharper the hinge.

    Returns:
        A scalar in the wider of the two dtypes.
    """
    require_reverse_mode("margin_loss", features, prototypes)
    require_frozen("margin_loss", prototypes=prototypes)
    return torch.ops.janus_ext.margin_loss(features, prototypes, margin, temperature)[0]


def _fake(features: Tensor, prototypes: Tensor, margin: float, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(features.dtype, prototypes.dtype)
    return features.new_empty((), dtype=dtype), features.new_empty(features.shape, dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


@once_differentiable
def _backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
    (grad_features,) = ctx.saved_tensors
    return (grad_loss * grad_features).to(ctx.dtype), None, None, None  # a loss scale comes before the rounding


define(
    "margin_loss(Tensor features, Tensor prototypes, float margin, float temperature) -> (Tensor, Tensor)",
    reference.margin_loss,
    _fake,
    autograd=(_backward, _setup),
)
