"""The protected subspace span(V): what a basis must be, factors that leave it alone, and how far an update does not."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from janus_ext import ops
from janus_ext.errors import ArgumentError

ORTHONORMALITY = 1e-3  # |V^T V - I|_F that protect() takes for rounding, half precision's of a few columns even
LEAST_KEPT = 1e-2  # of a row's norm: rescaled from less, rounding within span(V) would be no rounding any more


def orthonormal(basis: Tensor, dtype: torch.dtype) -> Tensor:
    """The orthonormal matrix nearest to `basis`, which is that itself up to rounding of `dtype`."""
    if checked_defect(basis) <= basis.shape[1] * torch.finfo(dtype).eps:
        return basis
    U, _, Vh = torch.linalg.svd(basis.double(), full_matrices=False)
    return U @ Vh


def checked_defect(basis: Tensor) -> float:
    """|V^T V - I|_F, how far a basis V [n, k] is from orthonormal; ArgumentError where that is not from rounding."""
    V = basis.detach().double()
    defect = float((V.mT @ V - torch.eye(V.shape[1], dtype=V.dtype, device=V.device)).norm())
    if not defect <= ORTHONORMALITY:
        raise ArgumentError(f"basis must be orthonormal, |V^T V - I| <= {ORTHONORMALITY:g}, got {defect:g}")
    return defect


@torch.no_grad()
def project_rows_(A: Tensor, basis: Tensor) -> None:
    """A <- A P in place for A [..., r, n], each row rescaled to its old norm; in float64, rounded once.

    Rows that lie in span(V), as starts that are drawn from data may, become random ones of their norm outside of it:
    the same ones in every process.
    """
    safe = ops.project(A.double(), basis.double())
    before, after = A.double().norm(dim=-1, keepdim=True), safe.norm(dim=-1, keepdim=True)
    if bool((lost := after <= LEAST_KEPT * before).any()):
        noise = torch.randn(A.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        safe = torch.where(lost, ops.project(noise.to(A.device), basis.double()), safe)
        after = safe.norm(dim=-1, keepdim=True)
    A.copy_(safe * (before / after))


def violation(change: Tensor, basis: Tensor) -> float:
    """|dW V|_F / |dW|_F of a change dW [..., m, n] and a basis V [n, k]; 0 without either."""
    change = change.double()
    whole = change.norm()
    return float((change @ basis.double()).norm() / whole) if whole > 0 else 0.0


def violation_rounding(change: Tensor, weights: Sequence[Tensor]) -> float:
    """What rounding alone can make of the violation of a merged change dW: eps/2 |W|_F / |dW|_F, 0 without a change.

    ``weights`` are the parts of W that were changed, each entry of which was rounded by at most eps/2 of itself. A
    violation that is no larger says nothing of the update that was merged.
    """
    whole = float(change.double().norm())
    errors = [torch.finfo(weight.dtype).eps / 2 * float(weight.double().norm()) for weight in weights]
    return math.hypot(*errors) / whole if whole > 0 else 0.0
