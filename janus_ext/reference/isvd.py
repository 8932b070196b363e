"""Online Estimation: the incremental SVD of a layer's inputs."""

import torch
from torch import Tensor

from janus_ext.reference.checks import INPUT_DTYPES, check_factor, require, require_device, require_dtype, require_last


def block_rows(n: int, l: int, device: torch.device) -> int:  # noqa: E741
    """How many rows are taken at once; csrc/cpu/isvd.cpp and csrc/cuda/isvd.cpp say why."""
    if device.type == "cuda":
        return (24 << 20) // n if n <= 2048 else max(l, 2048)
    return l


def isvd_update(
    basis: Tensor, singular_values: Tensor, x: Tensor, decay: float = 1.0, shrink: bool = False
) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors and values of [diag(S) U^T; X], by blocks; see `janus_ext.ops.isvd_update`."""
    op = "isvd_update"
    check_factor(op, "basis", basis, "singular_values", singular_values)
    n, l = basis.shape  # noqa: E741 - the paper's letter
    require_dtype(op, "x", x, INPUT_DTYPES)
    require_last(op, "x", x, n)
    require_device(op, basis, x=x)
    require(0 < decay <= 1, f"{op}: decay must be in (0, 1], got {decay:g}")
    U, S = basis.clone(memory_format=torch.contiguous_format), singular_values * decay**0.5
    rows = x.reshape(-1, n)
    for block in rows.split(block_rows(n, l, basis.device)) if len(rows) else ():
        M = torch.cat([S[:, None] * U.mT, block.to(U.dtype)])
        require(bool(torch.isfinite(M).all()), f"{op}: x and the state must be finite, got NaN or infinite entries")
        _, values, rows = torch.linalg.svd(M.double(), full_matrices=False)
        squares = values[:l] ** 2
        squares = squares - squares[-1] if shrink else squares
        U, S = rows[:l].mT.to(U), squares.sqrt().to(S)
    return U.contiguous(), S
