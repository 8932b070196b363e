"""The protected basis V grows by what was estimated."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from janus_ext import reference
from janus_ext.ops.registry import define
from janus_ext.reference.checks import as_float


def extend_basis(basis: Tensor, gram: Tensor, energy: float, max_rank: int, energy_power: int = 1) -> Tensor:
    """Grow an orthonormal basis by the fewest directions that capture `energy` of a Gram matrix (GPM).

    With C the Gram matrix, p the power and V the basis, as in Saha et al. 2021: the leading eigenvectors of P C^p P are
    appended until tr(V^T C^p V) >= energy * tr(C^p). Directions u with u^T C u below n * eps * (the largest eigenvalue
    of C) never count, eps that of gram's dtype; with p = 2 nor do those below 1.5e-8 sqrt(n) of it, whose squares are
    lost in float64.

    Args:
        basis: [n, k], float32 or float64, orthonormal; k = 0 starts from nothing.
        gram: [n, n], float32 or float64, symmetric positive semidefinite, finite, not zero.
        energy: share to capture, in [0, 1].
        max_rank: the basis never exceeds this many columns, k <= max_rank <= n.
        energy_power: 1 (energy as GPM defines it) or 2 (squared eigenvalues, as InfLoRA's code thresholds).

    Returns:
        [n, k'], k <= k' <= max_rank, basis's dtype: the old columns as they are, then new ones; computed in float64.
    """
    with torch.no_grad():
        return torch.ops.janus_ext.extend_basis(basis, gram, energy, max_rank, energy_power)


def extend_basis_factor(
    basis: Tensor, U: Tensor, S: Tensor, total: float | Tensor, energy: float, max_rank: int
) -> Tensor:
    """`extend_basis` from an incremental SVD, C = U diag(S^2) U^T; no n x n matrix is formed.

    Directions whose singular value is below n * eps or 1.5e-8 sqrt(n) times the largest of S never count. A sketch has
    lost energy: where it cannot reach the share of `total` that is asked for, all it holds is taken.

    Args:
        basis: [n, k], float32 or float64, orthonormal; k = 0 starts from nothing.
        U, S: [n, l] and [l] as `isvd_update` returns them, float32 or float64, finite, not all zero.
        total: sum |x|^2 of all rows seen (decayed as they were), a positive number or a float64 scalar tensor.
        energy, max_rank: as in `extend_basis`.

    Returns:
        As `extend_basis`.
    """
    if isinstance(total, Real) and isinstance(basis, Tensor):
        number = as_float("extend_basis_factor", "total", "finite", total)
        total = torch.tensor(number, dtype=torch.float64, device=basis.device)
    with torch.no_grad():
        return torch.ops.janus_ext.extend_basis_factor(basis, U, S, total, energy, max_rank)


def _fake(basis: Tensor, *_: Any, **__: Any) -> Tensor:
    if not isinstance(basis, FakeTensor):
        raise ValueError("extend_basis: basis must hold numbers, which decide on the new columns, got a meta tensor")
    return basis.new_empty(basis.shape[0], torch.library.get_ctx().new_dynamic_size())


define(
    "extend_basis(Tensor basis, Tensor gram, float energy, int max_rank, int energy_power=1) -> Tensor",
    reference.extend_basis,
    _fake,
)
define(
    "extend_basis_factor(Tensor basis, Tensor U, Tensor S, Tensor total, float energy, int max_rank) -> Tensor",
    reference.extend_basis_factor,
    _fake,
)
