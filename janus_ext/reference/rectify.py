"""Gradient Rectification of factor gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from janus_ext.rectification import Rectification, rectification_of
from janus_ext.reference.basis import is_empty, project
from janus_ext.reference.checks import (
    check_factors,
    check_scale,
    require,
    require_apart,
    require_device,
    require_dtype,
    require_shape,
    require_writable,
)
from janus_ext.reference.precision import full_float32

DAMPING_FLOOR = 1e-12  # the mean eigenvalue that the damping assumes at least: B = 0 at the start of a task
BASIS_TOLERANCE = 1e-3  # |A V|_F <= this times |A|_F counts as A V = 0


def damped_inverse(S: Tensor, damping: float) -> Tensor:
    """(S + d I)^-1 for Gram matrices S [..., r, r], d = max(damping, 4 r eps) * max(tr S / r, floor), by Cholesky."""
    r = S.shape[-1]
    relative = max(damping, 4 * r * torch.finfo(S.dtype).eps)
    d = relative * mean_eigenvalue(S).clamp_min(DAMPING_FLOOR)
    L, _ = torch.linalg.cholesky_ex(S + d[..., None, None] * torch.eye(r, dtype=S.dtype, device=S.device))
    return torch.cholesky_inverse(L)


def mean_eigenvalue(S: Tensor) -> Tensor:
    """tr(S) / r for S [..., r, r]."""
    return S.diagonal(dim1=-2, dim2=-1).mean(-1)


def rectified(
    A: Tensor,
    B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    basis: Tensor | None,
    scale: float,
    rectify: str | Rectification = "exact",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Factor gradients -> rectified factor gradients, A [..., r, n], B [..., m, r]; see `Rectification`.

    "tangent" and "exact" give the update of the tangent space {s (B dA + dB A)} closest to G_safe = G P:
        dA = (1/s) B^+ G_safe + Z A,   dB = (1/s) (I - P_B) G_safe A^+ - B Z,   Z = -(share/s) B^+ G_safe A^+
    with damped pseudo-inverses. `grad_A` is s B^T G, `grad_B` s G P A^T: the plain gradient of B when A V = 0.
    """
    how = rectification_of("rectified", rectify, options, balance=False)
    if how.rectify == "none":
        return grad_A, grad_B
    grad_A = project(grad_A, basis)
    if how.rectify == "project":
        return grad_A, grad_B
    gram_A, gram_B = A @ A.mT, B.mT @ B
    inverse_A, inverse_B = damped_inverse(gram_A, how.damping), damped_inverse(gram_B, how.damping)
    right = grad_B @ inverse_A  # s G_safe A^+
    common = inverse_B @ (B.mT @ right)  # s^2 B^+ G_safe A^+ / s
    dA = inverse_B @ grad_A - how.share * common @ A
    dB = right - (1 - how.share) * B @ common
    if how.balance:
        return dA * mean_eigenvalue(gram_B)[..., None, None], dB * mean_eigenvalue(gram_A)[..., None, None]
    return dA / scale / scale, dB / scale / scale  # s^2 may be no float32


def rectify_(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    basis: Sequence[Tensor],
    scale: Sequence[float],
    rectify: str | Rectification = "exact",
    **options: Any,
) -> None:
    """Rectify the factor gradients of many layers in place; see `janus_ext.ops.rectify_`."""
    op = "rectify_"
    check_lengths(op, A, B, grad_A, grad_B, basis, scale)
    how = rectification_of(op, rectify, options, balance=False)
    for i in range(len(A)):
        check_scale(op, scale[i])
        check_pair(op, i, A[i], B[i], grad_A[i], grad_B[i], basis[i], how)
    written, read = {"grad_A": grad_A, "grad_B": grad_B}, {"A": A, "B": B, "basis": basis}
    require_apart(op, *({f"{name}[{i}]": t for name in d for i, t in enumerate(d[name])} for d in (written, read)))
    with full_float32():
        for a, b, ga, gb, v, s in zip(A, B, grad_A, grad_B, basis, scale, strict=True):
            dA, dB = rectified(a, b, ga, gb, v, float(s), how)
            ga.copy_(dA)
            gb.copy_(dB)


def check_lengths(op: str, *lists: Sequence[Any]) -> None:
    """The lists of `rectify_`, one entry a layer each."""
    counts = [len(values) for values in lists]
    names = "A, B, grad_A, grad_B, basis and scale"
    require(len(set(counts)) == 1, f"{op}: {names} must have equal lengths, got {counts}")


def check_pair(
    op: str, i: int, A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, basis: Tensor, how: Rectification
) -> None:
    """One layer of `rectify_`; the message names its index."""
    where = f"{op}: layer {i}"
    require(
        A.dim() == B.dim(),
        f"{where}: A and B must be [r, n] and [m, r], or [g, r, n] and [g, m, r], "
        f"got {list(A.shape)} and {list(B.shape)}",
    )
    check_factors(where, A[None] if A.dim() == 2 else A, B[None] if B.dim() == 2 else B, basis)
    for name, grad, like in (("grad_A", grad_A, A), ("grad_B", grad_B, B)):
        require_dtype(where, name, grad, (A.dtype,))
        require_shape(where, name, grad, like.shape)
    require_device(where, A, grad_A=grad_A, grad_B=grad_B)
    require_writable(where, "grad_A", grad_A)
    require_writable(where, "grad_B", grad_B)
    if is_empty(basis):
        return
    require(
        how.rectify != "tangent",
        f"{where}: rectify='tangent' with a basis needs G V, which factor gradients do not hold; "
        "use it in the backward of lora_linear or lora_qkv",
    )
    if how.rectify == "exact":
        with full_float32():
            inside, whole = (A @ basis).norm(), A.norm()
        require(
            not bool(inside > BASIS_TOLERANCE * whole),
            f"{where}: rectify='exact' presumes A V = 0, got |A V| = {float(inside):g} with |A| = {float(whole):g}",
        )
