"""The adapted linear map, alone or as slices of a fused qkv projection, with rectified gradients in its backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from janus_ext import reference
from janus_ext.arguments import shown
from janus_ext.ops.registry import RECTIFICATION, define, require_frozen, require_reverse_mode
from janus_ext.rectification import Rectification, rectification_of
from janus_ext.reference.lora import padded_rank

TARGETS = ("q", "k", "v")  # slices of a fused qkv projection, in this order


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    basis: Tensor | None = None,
    scale: float = 1.0,
    rectify: str | Rectification = "exact",
    *,
    defer: bool = False,
    **options: Any,
) -> Tensor:
    """y = x W^T + b + s (x A_s^T) B^T, whose backward returns rectified gradients of A and B (Gradient Rectification).

    A_s = A P with P = I - V V^T for "exact" (so W + s B A_s acts on span(V) as W does, whatever A and B become), and A
    itself otherwise. Differentiable once, in x, A and B; weight, bias and basis are frozen.

    Args:
        x: [..., n], float64, float32, bfloat16 or float16.
        weight, bias: [m, n] and [m] or None, x's dtype, frozen.
        A, B: [r, n] and [m, r], float32 or float64.
        basis: V, [n, k] orthonormal, A's dtype, or None; k = 0 and None protect nothing.
        scale: s, not zero.
        rectify: a `Rectification`, or the name of one: "none", "project", "tangent" or "exact".
        defer: return plain gradients of A_s and B, for one `rectify_` of all layers before the optimizer's step.
        options: damping, share and balance of a `Rectification` that is given by name; here balance is off by default.

    Returns:
        [..., m], x's dtype.
    """
    check_differentiation("lora_linear", x, weight, bias, A, B)
    require_frozen("lora_linear", basis=basis)
    how = rectification_of("lora_linear", rectify, options, balance=False)
    return torch.ops.janus_ext.lora_linear(x, weight, bias, A, B, basis, scale, *how.values, defer)[0]


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    basis: Tensor | None = None,
    scale: float = 1.0,
    rectify: str | Rectification = "exact",
    *,
    defer: bool = False,
    targets: Sequence[str] = ("k", "v"),
    **options: Any,
) -> Tensor:
    """`lora_linear` on slices of a fused qkv projection: one product x A^T for all targets, added into the slices of y.

    Args:
        x: [..., n].
        weight, bias: [3 m, n] and [3 m] or None: q, k and v on top of each other, as timm's ViT stores them.
        A, B: [g, r, n] and [g, m, r], one for each of the g targets.
        targets: distinct names of "q", "k", "v".
        basis, scale, rectify, defer, options: as in `lora_linear`; one V, since the targets share x.

    Returns:
        [..., 3 m], x's dtype.
    """
    check_differentiation("lora_qkv", x, weight, bias, A, B)
    require_frozen("lora_qkv", basis=basis)
    named = isinstance(targets, Sequence)
    unknown = [t for t in targets if not isinstance(t, str) or t not in TARGETS] if named else [targets]
    if unknown:
        raise ValueError(f"lora_qkv: targets must be of q, k, v, got {', '.join(map(shown, unknown))}")
    how = rectification_of("lora_qkv", rectify, options, balance=False)
    slices = [TARGETS.index(t) for t in targets]
    return torch.ops.janus_ext.lora_qkv(x, weight, bias, A, B, basis, scale, *how.values, defer, slices)[0]


def check_differentiation(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> None:
    """Raises what `lora_linear` and `lora_qkv` cannot differentiate: for callers of the raw ops.

    Not of the basis: where that is asked about its gradient, PyTorch 2.11 compiles a graph for every size of it.
    """
    require_reverse_mode(op, x, A, B)
    require_frozen(op, weight=weight, bias=bias)


def _fake_forward(x: Tensor, weight: Tensor, A: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    r, n = A.shape[-2:]
    return (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        x.new_empty(*x.shape[:-1], groups * padded_rank(r, x.dtype)),
        A.new_empty(groups, r, n),
    )


def _fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(x, weight, A, 1)


def _fake_qkv(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(x, weight, A, A.shape[0])


def _fake_backward(
    grad_y: Tensor, x: Tensor, xA: Tensor, effective: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_x = rest[-1]
    return x.new_empty(x.shape if need_x else (0,)), A.new_empty(A.shape), B.new_empty(B.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, A, B, basis, *options = inputs
    _, xA, effective = output
    ctx.mark_non_differentiable(xA, effective)
    ctx.save_for_backward(x, xA, effective, weight, A, B, basis)
    ctx.options = options


@once_differentiable
def _backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
    x, xA, effective, weight, A, B, basis = ctx.saved_tensors
    scale, rectify, damping, share, balance, defer, *targets = ctx.options
    options = (scale, "none" if defer else rectify, damping, share, balance)
    offsets = [t * B.shape[-2] for t in targets[0]] if targets else [0]
    need_x = ctx.needs_input_grad[0]
    grouped = [t if t.dim() == 3 else t[None] for t in (A, B)]
    saved = (x, xA, effective, weight, *grouped, basis)
    grad_x, grad_A, grad_B = torch.ops.janus_ext.lora_backward(grad_y, *saved, *options, offsets, need_x)
    none = (None,) * (1 + len(ctx.options))
    return grad_x if need_x else None, None, None, grad_A.view_as(A), grad_B.view_as(B), *none


_FORWARD = "Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor? basis=None, float scale=1.0"
define(
    f"lora_linear({_FORWARD}, {RECTIFICATION}, bool defer=False) -> (Tensor, Tensor, Tensor)",
    reference.lora_linear,
    _fake_linear,
    autograd=(_backward, _setup),
    cast=3,
)
define(
    f"lora_qkv({_FORWARD}, {RECTIFICATION}, bool defer=False, int[] targets=[1, 2]) -> (Tensor, Tensor, Tensor)",
    reference.lora_qkv,
    _fake_qkv,
    autograd=(_backward, _setup),
    cast=3,
)
define(
    "lora_backward(Tensor grad_y, Tensor x, Tensor xA, Tensor effective, Tensor weight, Tensor A, Tensor B, "
    "Tensor? basis, float scale, str rectify, float damping, float share, bool balance, int[] offsets, "
    "bool need_x) -> (Tensor, Tensor, Tensor)",
    reference.lora_backward,
    _fake_backward,
)
