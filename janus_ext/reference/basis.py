"""The protected basis V: the projection off it, and its growth from what was estimated."""

import math

import torch
from torch import Tensor

from janus_ext.reference.checks import (
    WORKING_DTYPES,
    check_factor,
    require,
    require_device,
    require_dtype,
    require_shape,
)
from janus_ext.reference.precision import full_float32, without_autocast


def is_empty(basis: Tensor | None) -> bool:
    """Whether nothing is protected."""
    return basis is None or basis.shape[-1] == 0


def project(M: Tensor, basis: Tensor | None) -> Tensor:
    """M P = M - (M V) V^T for M [..., n], in full precision."""
    if is_empty(basis):
        return M
    with full_float32(), without_autocast(M):
        return M - (M @ basis) @ basis.mT


def extend_basis(basis: Tensor, gram: Tensor, energy: float, max_rank: int, energy_power: int = 1) -> Tensor:
    """Grow V by the fewest directions that capture `energy` of C^p; see `janus_ext.ops.extend_basis`."""
    op = "extend_basis"
    check_basis(op, basis)
    n, k = basis.shape
    require_dtype(op, "gram", gram, WORKING_DTYPES)
    require_shape(op, "gram", gram, (n, n))
    require_device(op, basis, gram=gram)
    check_growth(op, basis, energy, max_rank)
    require(energy_power in (1, 2), f"{op}: energy_power must be 1 or 2, got {energy_power}")
    C = gram.double()
    require(bool(torch.isfinite(C).all()), f"{op}: gram must be finite, got NaN or infinite entries")
    require_finite(op, basis)
    trace = C.trace()
    require(bool(trace > 0), f"{op}: gram must have a positive trace, got {float(trace):g}")

    C = (C + C.mT) / (2 * trace)  # energy shares do not change; C^2 cannot overflow
    S = C @ C if energy_power == 2 else C
    V = orthonormal(basis)
    rest = project(project(S, V).mT, V)  # P C^p P
    values, vectors = torch.linalg.eigh((rest + rest.mT) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    inside = V.mT @ S @ V
    largest = max(float(values[0]), float(torch.linalg.eigvalsh(inside)[-1]) if k else 0.0)
    rounding, squaring = (n * torch.finfo(dtype).eps for dtype in (gram.dtype, torch.float64))
    if energy_power == 2:  # the energy of a direction is told from the rounding of C, its square from that of squaring
        outside = project(vectors.mT, V).mT  # what a weak one has of V by rounding, a strong direction there outweighs
        energies = (outside * (C @ outside)).sum(0)
        known = (energies > rounding * math.sqrt(largest)) & (values > squaring * largest)
    else:
        known = values > rounding * largest
    added = directions_needed(values[known], inside.trace(), S.trace(), energy, max_rank - k)
    return grown(basis, V, vectors[:, known][:, :added])


def extend_basis_factor(basis: Tensor, U: Tensor, S: Tensor, total: Tensor, energy: float, max_rank: int) -> Tensor:
    """The same for C = U diag(S^2) U^T, truncated from trace `total`; see `janus_ext.ops.extend_basis_factor`."""
    op = "extend_basis_factor"
    check_basis(op, basis)
    n, k = basis.shape
    check_factor(op, "U", U, "S", S)
    require(U.shape[0] == n, f"{op}: U must be [n, l] with n = {n}, got {list(U.shape)}")
    require_device(op, basis, U=U)
    require_dtype(op, "total", total, (torch.float64,))
    require_shape(op, "total", total, ())
    check_growth(op, basis, energy, max_rank)
    trace, largest = float(total), float(S.amax())
    require(
        math.isfinite(trace) and math.isfinite(largest) and bool(torch.isfinite(U).all()),
        f"{op}: U, S and total must be finite, got NaN or infinite entries",
    )
    require(
        trace > 0 and largest > 0,
        f"{op}: total and the largest of S must be positive, got {trace:g} and {largest:g}",
    )
    require_finite(op, basis)
    V, scaled = orthonormal(basis), U.double() * (S.double() / largest)
    vectors, values, _ = torch.linalg.svd(project(scaled.mT, V).mT, full_matrices=False)
    # Rounding of the factor, and of squaring it in float64, as the compiled op does; its largest singular value is 1.
    noise = n * max(n * torch.finfo(U.dtype).eps ** 2, torch.finfo(torch.float64).eps)
    squares = values[values**2 > noise] ** 2
    inside, whole = (V.mT @ scaled).square().sum(), total / largest**2
    added = directions_needed(squares, inside, whole, energy, max_rank - k)
    return grown(basis, V, vectors[:, :added])


def check_basis(op: str, basis: Tensor) -> None:
    """V [n, k], float32 or float64, k <= n."""
    require_dtype(op, "basis", basis, WORKING_DTYPES)
    require(
        basis.dim() == 2 and basis.shape[1] <= basis.shape[0] and basis.shape[0] > 0,
        f"{op}: basis must be [n, k] with k <= n and n > 0, got {list(basis.shape)}",
    )


def require_finite(op: str, basis: Tensor) -> None:
    """No eigendecomposition converges otherwise."""
    require(bool(torch.isfinite(basis).all()), f"{op}: basis must be finite, got NaN or infinite entries")


def check_growth(op: str, basis: Tensor, energy: float, max_rank: int) -> None:
    """How far a basis [n, k] may grow."""
    n, k = basis.shape
    require(0 <= energy <= 1, f"{op}: energy must be in [0, 1], got {energy:g}")
    require(k <= max_rank <= n, f"{op}: max_rank must be from k = {k} to n = {n}, got {max_rank}")


def directions_needed(values: Tensor, have: Tensor, total: Tensor, energy: float, room: int) -> int:
    """Smallest q with have + l_1 + ... + l_q >= energy * total, at most `room`; all candidates if none reaches it.

    On the CPU, where the running sum is the same in every run; the answer is wanted there anyway.
    """
    held, asked = have.cpu(), energy * total.cpu()
    if bool(held >= asked):
        return 0
    wanted = int((held + values.cpu().cumsum(0) < asked).sum()) + 1
    return min(wanted, values.numel(), room)


def orthonormal(V: Tensor) -> Tensor:
    """V in float64, its columns made orthonormal: P must be a projector to more than V's own rounding."""
    return torch.linalg.qr(V.double()).Q if V.shape[1] else V.double()


def grown(V: Tensor, W: Tensor, u: Tensor) -> Tensor:
    """[V, orth(P u)] for u [n, q] that lies outside V but for rounding, P off the orthonormal W of V's span.

    V itself does not move, nor do the signs of u.
    """
    if u.shape[1] == 0:
        return V.clone(memory_format=torch.contiguous_format)
    Q, R = torch.linalg.qr(project(u.mT, W).mT)
    return torch.cat([V, (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).to(V.dtype)], dim=1).contiguous()
