"""Online Estimation: the incremental SVD of a layer's inputs."""

import torch
from torch import Tensor

from janus_ext import reference
from janus_ext.ops.registry import define


def isvd_update(
    basis: Tensor, singular_values: Tensor, x: Tensor, decay: float = 1.0, shrink: bool = False
) -> tuple[Tensor, Tensor]:
    """Incremental SVD of all rows seen: memory n x l where `gram_update_` takes n x n (Online Estimation).

    Rows X are taken in blocks (of l on a CPU, of thousands on a GPU); of [diag(S) U^T; X] the l leading right singular
    vectors and values are kept. Exact as long as all rows seen have rank l or less, else what is dropped is lost.

    Args:
        basis: U, [n, l], float32 or float64, orthonormal columns (zero columns where the singular value is 0); l <= n.
        singular_values: S, [l], U's dtype, not negative; all zero at the start.
        x: [..., n], float64, float32, bfloat16 or float16; finite.
        decay: in (0, 1], of what was seen before, in its Gram matrix: S is multiplied by its square root.
        shrink: subtract the smallest of the l squared values from each of them, so that l - 1 directions remain
            (Frequent Directions, Liberty 2013; with
            decay 1, M all rows and M_j its best rank-j approximation, for every unit v and every j < l:
            0 <= |M v|^2 - |diag(S) U^T v|^2 <= |M - M_j|_F^2 / (l - j)).

    Returns:
        New U [n, l], orthonormal, and S [l], descending.
    """
    with torch.no_grad():
        return torch.ops.janus_ext.isvd_update(basis, singular_values, x, decay, shrink)


def _fake(
    basis: Tensor, singular_values: Tensor, x: Tensor, decay: float = 1.0, shrink: bool = False
) -> tuple[Tensor, Tensor]:
    return basis.new_empty(basis.shape), singular_values.new_empty(singular_values.shape)


define(
    "isvd_update(Tensor basis, Tensor singular_values, Tensor x, float decay=1.0, bool shrink=False) "
    "-> (Tensor, Tensor)",
    reference.isvd_update,
    _fake,
)
