"""The adapted linear map and its backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from janus_ext.rectification import Rectification
from janus_ext.reference.basis import is_empty, project
from janus_ext.reference.checks import (
    INPUT_DTYPES,
    check_factors,
    check_rectify,
    require,
    require_device,
    require_dtype,
    require_last,
    require_shape,
)
from janus_ext.reference.precision import full_float32
from janus_ext.reference.rectify import rectified


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
) -> tuple[Tensor, Tensor, Tensor]:
    """y, x A_s^T and A_s of one adapted linear map; see `janus_ext.ops.lora_linear`."""
    op = "lora_linear"
    how = check_rectify(op, scale, rectify, **options)
    check_factors(op, one_target(A), one_target(B), basis)
    check_linear(op, x, weight, bias, A)
    require_shape(op, "weight", weight, (B.shape[0], A.shape[1]))
    return lora_forward(x, weight, bias, A[None], B[None], basis, float(scale), how.rectify, [0])


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
    targets: Sequence[int] = (1, 2),
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, x A_s^T and A_s of a fused qkv projection; see `janus_ext.ops.lora_qkv`."""
    op = "lora_qkv"
    how = check_rectify(op, scale, rectify, **options)
    check_factors(op, A, B, basis)
    check_linear(op, x, weight, bias, A)
    require(
        len(targets) == A.shape[0] and len(set(targets)) == len(targets) and all(0 <= t < 3 for t in targets),
        f"{op}: targets must be distinct slices 0 (q), 1 (k), 2 (v), one for each of A's {A.shape[0]}, "
        f"got {list(targets)}",
    )
    m = B.shape[1]
    require_shape(op, "weight", weight, (3 * m, A.shape[2]))
    return lora_forward(x, weight, bias, A, B, basis, float(scale), how.rectify, [t * m for t in targets])


def one_target(factor: Tensor) -> Tensor:
    """[r, n] -> [1, r, n]; None, which the dispatcher lets pass, stays for the check of dtypes."""
    return factor if factor is None else factor[None]


def padded_rank(r: int, dtype: torch.dtype) -> int:
    """Columns of x A^T for one target: for 16-bit dtypes the next multiple of 8, with zeros; csrc/lora.h says why."""
    return -(-r // 8) * 8 if dtype.itemsize == 2 else r


def _padded(factor: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """`factor` in the dtype, with zeros up to the padded rank along `dim`, -1 or -2."""
    missing = padded_rank(factor.shape[dim], dtype) - factor.shape[dim]
    return F.pad(factor.to(dtype), (0, missing) if dim == -1 else (0, 0, 0, missing))


def lora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    basis: Tensor | None,
    scale: float,
    rectify: str,
    offsets: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x W^T + b, and y[off_i : off_i + m] += s (x A_i^T) B_i^T; A is A P for "exact". A [g, r, n], B [g, m, r]."""
    kept = rectify != "exact" or is_empty(basis)
    effective = A.clone(memory_format=torch.contiguous_format) if kept else project(A, basis)
    g, _, n = A.shape
    m = B.shape[1]
    y = F.linear(x, weight, bias)
    xA = x @ _padded(effective, -2, x.dtype).reshape(-1, n).mT
    for offset, inner, b in zip(offsets, xA.chunk(g, dim=-1), _padded(B, -1, x.dtype), strict=True):
        y[..., offset : offset + m] += scale * (inner @ b.mT)
    return y, xA, effective


def lora_backward(
    grad_y: Tensor,
    x: Tensor,
    xA: Tensor,
    effective: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    basis: Tensor | None,
    scale: float,
    rectify: str | Rectification,
    *,
    offsets: Sequence[int],
    need_x: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dx [..., n] (empty unless `need_x`) and the rectified gradients of A [g, r, n] and B [g, m, r]."""
    op = "lora_backward"
    how = check_rectify(op, scale, rectify, **options)
    check_factors(op, A, B, basis)
    check_linear(op, x, weight, None, A)
    check_saved(op, grad_y, x, xA, effective, weight, A, B, offsets)
    g, r, n = A.shape
    m, scale = B.shape[1], float(scale)
    gy, rows = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, n)
    slices = [gy[:, offset : offset + m] for offset in offsets]
    wide_B = _padded(B, -1, x.dtype)
    through = torch.cat([scale * (s @ b) for s, b in zip(slices, wide_B, strict=True)], dim=1)  # [N, g r], r padded
    grad_x = x.new_empty(0)
    if need_x:
        grad_x = (gy @ weight + through @ _padded(effective, -2, x.dtype).reshape(-1, n)).reshape(x.shape)
    grad_A = (through.mT @ rows).reshape(g, -1, n)[:, :r].to(A.dtype)
    with full_float32():
        inner = xA.reshape(-1, xA.shape[-1])
        if how.rectify == "tangent" and not is_empty(basis):  # G P A^T needs only x (A P)^T, not G V
            inner = rows @ _padded(project(A, basis), -2, x.dtype).reshape(-1, n).mT
        products = [scale * (s.mT @ t) for s, t in zip(slices, inner.chunk(g, dim=1), strict=True)]
        grad_B = torch.stack(products)[..., :r].to(B.dtype)
        grad_A, grad_B = rectified(effective, B, grad_A, grad_B, basis, scale, how)
    return grad_x, grad_A, grad_B


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor) -> None:
    """x [..., n], weight [m, n], bias [m]: one dtype, on the device of A [..., n]."""
    require_dtype(op, "x", x, INPUT_DTYPES)
    require_last(op, "x", x, A.shape[-1])
    require_dtype(op, "weight", weight, (x.dtype,))
    n = A.shape[-1]
    require(weight.dim() == 2 and weight.shape[1] == n, f"{op}: weight must be [m, {n}], got {list(weight.shape)}")
    if bias is not None:
        require_dtype(op, "bias", bias, (x.dtype,))
        require_shape(op, "bias", bias, (weight.shape[0],))
    require_device(op, A, x=x, weight=weight, bias=bias)


def check_saved(
    op: str,
    grad_y: Tensor,
    x: Tensor,
    xA: Tensor,
    effective: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Sequence[int],
) -> None:
    """What the forward saved, and a gradient of its output."""
    require_dtype(op, "effective", effective, (A.dtype,))
    require_shape(op, "effective", effective, A.shape)
    require_device(op, A, effective=effective)
    rank = padded_rank(A.shape[1], x.dtype)
    for name, rows, width in (("grad_y", grad_y, weight.shape[0]), ("xA", xA, A.shape[0] * rank)):
        require_dtype(op, name, rows, (x.dtype,))
        require_shape(op, name, rows, (*x.shape[:-1], width))
        require_device(op, A, **{name: rows})
    last = weight.shape[0] - B.shape[1]
    require(
        len(offsets) == A.shape[0] and all(0 <= o <= last for o in offsets),
        f"{op}: offsets must be {A.shape[0]} numbers from 0 to {last}, got {list(offsets)}",
    )
