"""Every op in plain PyTorch: the oracle of the tests, and what runs where no compiled kernel exists.

Notation of the whole project: an adapted linear map y = x W^T + b with W [m, n], factors A [r, n] and B [m, r], scale
s, and V [n, k], an orthonormal basis of the protected input subspace. P = I - V V^T is applied, never formed. "The
paper" is Chen et al., "Janus-LoRA", ICML 2026, arXiv 2605.28495; what is not marked so is this project's definition.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

RECTIFY = ("none", "project", "tangent", "exact")
DAMPING = (
    0.1  # relative to the mean eigenvalue of B^T B or A A^T; chosen on the embedded benchmark (REPRODUCIBILITY.md)
)
DAMPING_FLOOR = 1e-12  # the mean eigenvalue that the damping assumes at least: B = 0 at the start of a task
SHARE = 0.5  # of the part P_B G P_A that both factors could carry, B carries this much
BASIS_TOLERANCE = 1e-3  # |A V|_F <= this times |A|_F counts as A V = 0
WORKING_DTYPES = (torch.float32, torch.float64)
INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# --------------------------------------------------------------------------------------------------------------- checks


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    found = None if tensor is None else tensor.dtype  # the dispatcher lets None pass for a tensor
    if found not in allowed:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} must be {wanted}, got {str(found).removeprefix('torch.')}")


def _require_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    _require(list(tensor.shape) == list(shape), f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")


def _require_device(op: str, like: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None:
            _require(tensor.device == like.device, f"{op}: {name} must be on {like.device}, got {tensor.device}")


def _require_last(op: str, name: str, tensor: Tensor, n: int) -> None:
    _require(
        tensor.dim() >= 1 and tensor.shape[-1] == n,
        f"{op}: {name} must be [..., n] with n = {n}, got {list(tensor.shape)}",
    )


def _require_writable(op: str, name: str, tensor: Tensor) -> None:
    """What is rewritten in place must hold each element once; an expanded tensor does not."""
    _require(
        all(stride != 0 or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)),
        f"{op}: {name} must hold every element once, got an expanded tensor of strides {list(tensor.stride())}",
    )


def check_rectify(op: str, scale: float, rectify: str, damping: float, share: float) -> None:
    """The options that `lora_linear`, `lora_qkv` and `rectify_` share."""
    _require(rectify in RECTIFY, f"{op}: rectify must be one of none, project, tangent, exact, got '{rectify}'")
    _require(scale != 0 and abs(scale) < float("inf"), f"{op}: scale must be finite and not zero, got {scale:g}")
    _require(0 < damping < float("inf"), f"{op}: damping must be positive and finite, got {damping:g}")
    _require(0 <= share <= 1, f"{op}: share must be in [0, 1], got {share:g}")


def check_factors(op: str, A: Tensor, B: Tensor, basis: Tensor | None) -> None:
    """A [g, r, n], B [g, m, r] and V [n, k]: float32 or float64, alike, on one device, k <= n."""
    _require_dtype(op, "A", A, WORKING_DTYPES)
    _require_dtype(op, "B", B, (A.dtype,))
    _require(A.dim() == 3, f"{op}: A must be [r, n] for each target, got {A.dim() - 1} dimensions")
    _require(B.dim() == 3, f"{op}: B must be [m, r] for each target, got {B.dim() - 1} dimensions")
    g, r, n = A.shape
    _require(r > 0 and n > 0, f"{op}: A must be [r, n] with r > 0 and n > 0, got {list(A.shape[1:])}")
    _require_shape(op, "B", B, (g, B.shape[1], r))
    if basis is not None:
        _require_dtype(op, "basis", basis, (A.dtype,))
        _require(
            basis.dim() == 2 and basis.shape[0] == n and basis.shape[1] <= n,
            f"{op}: basis must be [n, k] with n = {n} and k <= n, got {list(basis.shape)}",
        )
    _require_device(op, A, B=B, basis=basis)


# ------------------------------------------------------------------------------------------------------------ precision


class _FullFloat32:
    """The process-wide setting behind `full_float32`: the first thread in changes it, the last one out restores it."""

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.saved: list[tuple[Any, str]] = []

    def enter(self) -> None:
        with self.lock:
            if self.inside == 0:
                backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
                settings = [(backend, backend.fp32_precision) for backend in backends]
                self.saved = [(b, precision) for b, precision in settings if precision not in ("ieee", "none")]
                for backend, _ in self.saved:
                    backend.fp32_precision = "ieee"
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for backend, precision in self.saved:
                    backend.fp32_precision = precision


_full_float32 = _FullFloat32()


@contextmanager
def full_float32() -> Iterator[None]:
    """Products inside are IEEE float32, whatever TF32 or `set_float32_matmul_precision` settings say."""
    _full_float32.enter()
    try:
        yield
    finally:
        _full_float32.leave()


def is_empty(basis: Tensor | None) -> bool:
    """Whether nothing is protected."""
    return basis is None or basis.shape[-1] == 0


def project(M: Tensor, basis: Tensor | None) -> Tensor:
    """M P = M - (M V) V^T for M [..., n], in full precision."""
    if is_empty(basis):
        return M
    with full_float32():
        return M - (M @ basis) @ basis.mT


# --------------------------------------------------------------------------------------------------- Online Estimation


def gram_update_(gram: Tensor, x: Tensor, decay: float = 1.0) -> None:
    """gram <- decay * gram + x^T x, exactly symmetric; see `janus_ext.ops.gram_update_`."""
    op = "gram_update_"
    _require_dtype(op, "gram", gram, WORKING_DTYPES)
    _require(
        gram.dim() == 2 and gram.shape[0] == gram.shape[1] and gram.shape[0] > 0,
        f"{op}: gram must be [n, n] with n > 0, got {list(gram.shape)}",
    )
    _require_writable(op, "gram", gram)
    _require_dtype(op, "x", x, INPUT_DTYPES)
    _require_last(op, "x", x, gram.shape[0])
    _require_device(op, gram, x=x)
    _require(0 < decay <= 1, f"{op}: decay must be in (0, 1], got {decay:g}")
    rows = x.reshape(-1, x.shape[-1]).to(gram.dtype)
    update = torch.triu(rows.mT @ rows)
    gram.mul_(decay).add_(update + torch.triu(update, 1).mT)


def check_basis(op: str, basis: Tensor) -> None:
    """V [n, k], float32 or float64, k <= n."""
    _require_dtype(op, "basis", basis, WORKING_DTYPES)
    _require(
        basis.dim() == 2 and basis.shape[1] <= basis.shape[0] and basis.shape[0] > 0,
        f"{op}: basis must be [n, k] with k <= n and n > 0, got {list(basis.shape)}",
    )


def check_growth(op: str, basis: Tensor, energy: float, max_rank: int) -> None:
    """How far a basis [n, k] may grow."""
    n, k = basis.shape
    _require(0 <= energy <= 1, f"{op}: energy must be in [0, 1], got {energy:g}")
    _require(k <= max_rank <= n, f"{op}: max_rank must be from k = {k} to n = {n}, got {max_rank}")


def check_factor(op: str, name_U: str, U: Tensor, name_S: str, S: Tensor) -> None:
    """U [n, l] and S [l] of an incremental SVD, alike: float32 or float64, on one device, 1 <= l <= n."""
    _require_dtype(op, name_U, U, WORKING_DTYPES)
    _require(
        U.dim() == 2 and 0 < U.shape[1] <= U.shape[0],
        f"{op}: {name_U} must be [n, l] with 0 < l <= n, got {list(U.shape)}",
    )
    _require_dtype(op, name_S, S, (U.dtype,))
    _require_shape(op, name_S, S, (U.shape[1],))
    _require_device(op, U, **{name_S: S})


def isvd_update(
    basis: Tensor, singular_values: Tensor, x: Tensor, decay: float = 1.0, shrink: bool = False
) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors and values of [diag(S) U^T; X], by blocks; see `janus_ext.ops.isvd_update`."""
    op = "isvd_update"
    check_factor(op, "basis", basis, "singular_values", singular_values)
    n, l = basis.shape  # noqa: E741 - the paper's letter
    _require_dtype(op, "x", x, INPUT_DTYPES)
    _require_last(op, "x", x, n)
    _require_device(op, basis, x=x)
    _require(0 < decay <= 1, f"{op}: decay must be in (0, 1], got {decay:g}")
    U, S = basis.clone(memory_format=torch.contiguous_format), singular_values * decay**0.5
    rows = x.reshape(-1, n)
    for block in rows.split(l) if len(rows) else ():
        M = torch.cat([S[:, None] * U.mT, block.to(U.dtype)])
        _require(bool(torch.isfinite(M).all()), f"{op}: x and the state must be finite, got NaN or infinite entries")
        _, values, rows = torch.linalg.svd(M.double(), full_matrices=False)
        squares = values[:l] ** 2
        squares = squares - squares[-1] if shrink else squares
        U, S = rows[:l].mT.to(U), squares.sqrt().to(S)
    return U.contiguous(), S


def extend_basis(basis: Tensor, gram: Tensor, energy: float, max_rank: int, energy_power: int = 1) -> Tensor:
    """Grow V by the fewest directions that capture `energy` of C^p; see `janus_ext.ops.extend_basis`."""
    op = "extend_basis"
    check_basis(op, basis)
    n, k = basis.shape
    _require_dtype(op, "gram", gram, WORKING_DTYPES)
    _require_shape(op, "gram", gram, (n, n))
    _require_device(op, basis, gram=gram)
    check_growth(op, basis, energy, max_rank)
    _require(energy_power in (1, 2), f"{op}: energy_power must be 1 or 2, got {energy_power}")
    C = gram.double()
    _require(bool(torch.isfinite(C).all()), f"{op}: gram must be finite, got NaN or infinite entries")
    trace = C.trace()
    _require(bool(trace > 0), f"{op}: gram must have a positive trace, got {float(trace):g}")

    C = C / trace  # energy shares do not change; C^2 cannot overflow
    C = C @ C if energy_power == 2 else C
    V = orthonormal(basis)
    rest = project(project(C, V).mT, V)  # P C^p P
    values, vectors = torch.linalg.eigh((rest + rest.mT) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    inside = V.mT @ C @ V
    largest = max(float(values[0]), float(torch.linalg.eigvalsh(inside)[-1]) if k else 0.0)
    candidates = values[values > n * torch.finfo(gram.dtype).eps * largest]
    added = directions_needed(candidates, inside.trace(), C.trace(), energy, max_rank - k)
    return grown(basis, V, vectors[:, :added])


def extend_basis_factor(basis: Tensor, U: Tensor, S: Tensor, total: Tensor, energy: float, max_rank: int) -> Tensor:
    """The same for C = U diag(S^2) U^T, truncated from trace `total`; see `janus_ext.ops.extend_basis_factor`."""
    op = "extend_basis_factor"
    check_basis(op, basis)
    n, k = basis.shape
    check_factor(op, "U", U, "S", S)
    _require(U.shape[0] == n, f"{op}: U must be [n, l] with n = {n}, got {list(U.shape)}")
    _require_device(op, basis, U=U)
    _require_dtype(op, "total", total, (torch.float64,))
    _require_shape(op, "total", total, ())
    check_growth(op, basis, energy, max_rank)
    trace, largest = float(total), float(S.amax())
    _require(
        math.isfinite(trace) and math.isfinite(largest) and bool(torch.isfinite(U).all()),
        f"{op}: U, S and total must be finite, got NaN or infinite entries",
    )
    _require(
        trace > 0 and largest > 0,
        f"{op}: total and the largest of S must be positive, got {trace:g} and {largest:g}",
    )
    V, scaled = orthonormal(basis), U.double() * (S.double() / largest)
    vectors, values, _ = torch.linalg.svd(project(scaled.mT, V).mT, full_matrices=False)
    # Rounding of the factor, and of squaring it in float64, as the compiled op does; its largest singular value is 1.
    noise = n * max(n * torch.finfo(U.dtype).eps ** 2, torch.finfo(torch.float64).eps)
    squares = values[values**2 > noise] ** 2
    inside, whole = (V.mT @ scaled).square().sum(), total / largest**2
    added = directions_needed(squares, inside, whole, energy, max_rank - k)
    return grown(basis, V, vectors[:, :added])


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


# ----------------------------------------------------------------------------------------------- Gradient Rectification


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
    rectify: str,
    damping: float,
    share: float,
    balance: bool,
) -> tuple[Tensor, Tensor]:
    """Factor gradients -> rectified factor gradients, A [..., r, n], B [..., m, r].

    "tangent" and "exact" give the update of the tangent space {s (B dA + dB A)} closest to G_safe = G P:
        dA = (1/s) B^+ G_safe + Z A,   dB = (1/s) (I - P_B) G_safe A^+ - B Z,   Z = -(share/s) B^+ G_safe A^+
    with damped pseudo-inverses. `grad_A` is s B^T G, `grad_B` s G P A^T: the plain gradient of B when A V = 0.
    `balance` gives both factors the scale of the plain gradient: dA times s^2 tr(B^T B)/r, dB times s^2 tr(A A^T)/r.
    """
    if rectify == "none":
        return grad_A, grad_B
    grad_A = project(grad_A, basis)
    if rectify == "project":
        return grad_A, grad_B
    gram_A, gram_B = A @ A.mT, B.mT @ B
    inverse_A, inverse_B = damped_inverse(gram_A, damping), damped_inverse(gram_B, damping)
    right = grad_B @ inverse_A  # s G_safe A^+
    common = inverse_B @ (B.mT @ right)  # s^2 B^+ G_safe A^+ / s
    dA = inverse_B @ grad_A - share * common @ A
    dB = right - (1 - share) * B @ common
    if balance:
        return dA * mean_eigenvalue(gram_B)[..., None, None], dB * mean_eigenvalue(gram_A)[..., None, None]
    return dA / scale**2, dB / scale**2


def rectify_(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    basis: Sequence[Tensor],
    scale: Sequence[float],
    rectify: str = "exact",
    damping: float = DAMPING,
    share: float = SHARE,
    balance: bool = False,
) -> None:
    """Rectify the factor gradients of many layers in place; see `janus_ext.ops.rectify_`."""
    op = "rectify_"
    counts = [len(B), len(grad_A), len(grad_B), len(basis), len(scale)]
    _require(
        all(c == len(A) for c in counts),
        f"{op}: A, B, grad_A, grad_B, basis and scale must have equal lengths, got {[len(A), *counts]}",
    )
    for i in range(len(A)):
        check_rectify(op, scale[i], rectify, damping, share)
        check_pair(op, i, A[i], B[i], grad_A[i], grad_B[i], basis[i], rectify)
    with full_float32():
        for a, b, ga, gb, v, s in zip(A, B, grad_A, grad_B, basis, scale, strict=True):
            dA, dB = rectified(a, b, ga, gb, v, s, rectify, damping, share, balance)
            ga.copy_(dA)
            gb.copy_(dB)


def check_pair(
    op: str, i: int, A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, basis: Tensor, rectify: str
) -> None:
    """One layer of `rectify_`; the message names its index."""
    where = f"{op}: layer {i}"
    check_factors(where, A[None] if A.dim() == 2 else A, B[None] if B.dim() == 2 else B, basis)
    for name, grad, like in (("grad_A", grad_A, A), ("grad_B", grad_B, B)):
        _require_dtype(where, name, grad, (A.dtype,))
        _require_shape(where, name, grad, like.shape)
    _require_device(where, A, grad_A=grad_A, grad_B=grad_B)
    _require_writable(where, "grad_A", grad_A)
    _require_writable(where, "grad_B", grad_B)
    if is_empty(basis):
        return
    _require(
        rectify != "tangent",
        f"{where}: rectify='tangent' with a basis needs G V, which factor gradients do not hold; "
        "use it in the backward of lora_linear or lora_qkv",
    )
    if rectify == "exact":
        with full_float32():
            inside, whole = (A @ basis).norm(), A.norm()
        _require(
            not bool(inside > BASIS_TOLERANCE * whole),
            f"{where}: rectify='exact' presumes A V = 0, got |A V| = {float(inside):g} with |A| = {float(whole):g}",
        )


# ----------------------------------------------------------------------------------------------------- adapted linear


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    basis: Tensor | None = None,
    scale: float = 1.0,
    rectify: str = "exact",
    damping: float = DAMPING,
    share: float = SHARE,
    balance: bool = False,
    defer: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, x A_s^T and A_s of one adapted linear map; see `janus_ext.ops.lora_linear`."""
    op = "lora_linear"
    check_rectify(op, scale, rectify, damping, share)
    check_factors(op, A[None], B[None], basis)
    check_linear(op, x, weight, bias, A)
    _require_shape(op, "weight", weight, (B.shape[0], A.shape[1]))
    return lora_forward(x, weight, bias, A[None], B[None], basis, scale, rectify, [0])


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    basis: Tensor | None = None,
    scale: float = 1.0,
    rectify: str = "exact",
    damping: float = DAMPING,
    share: float = SHARE,
    balance: bool = False,
    defer: bool = False,
    targets: Sequence[int] = (1, 2),
) -> tuple[Tensor, Tensor, Tensor]:
    """y, x A_s^T and A_s of a fused qkv projection; see `janus_ext.ops.lora_qkv`."""
    op = "lora_qkv"
    check_rectify(op, scale, rectify, damping, share)
    check_factors(op, A, B, basis)
    check_linear(op, x, weight, bias, A)
    _require(
        len(targets) == A.shape[0] and len(set(targets)) == len(targets) and all(0 <= t < 3 for t in targets),
        f"{op}: targets must be distinct slices 0 (q), 1 (k), 2 (v), one for each of A's {A.shape[0]}, "
        f"got {list(targets)}",
    )
    m = B.shape[1]
    _require_shape(op, "weight", weight, (3 * m, A.shape[2]))
    return lora_forward(x, weight, bias, A, B, basis, scale, rectify, [t * m for t in targets])


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor) -> None:
    """x [..., n], weight [m, n], bias [m]: one dtype, on the device of A [..., n]."""
    _require_dtype(op, "x", x, INPUT_DTYPES)
    _require_last(op, "x", x, A.shape[-1])
    _require_dtype(op, "weight", weight, (x.dtype,))
    _require(weight.dim() == 2, f"{op}: weight must be [m, n], got {list(weight.shape)}")
    if bias is not None:
        _require_dtype(op, "bias", bias, (x.dtype,))
        _require_shape(op, "bias", bias, (weight.shape[0],))
    _require_device(op, A, x=x, weight=weight, bias=bias)


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
    effective = project(A, basis) if rectify == "exact" and not is_empty(basis) else A.clone()
    g, r, n = A.shape
    m = B.shape[1]
    y = F.linear(x, weight, bias)
    xA = x @ effective.reshape(g * r, n).mT.to(x.dtype)
    for i, offset in enumerate(offsets):
        y[..., offset : offset + m] += scale * (xA[..., i * r : (i + 1) * r] @ B[i].mT.to(x.dtype))
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
    rectify: str,
    damping: float,
    share: float,
    balance: bool,
    offsets: Sequence[int],
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dx [..., n] (empty unless `need_x`) and the rectified gradients of A [g, r, n] and B [g, m, r]."""
    op = "lora_backward"
    check_rectify(op, scale, rectify, damping, share)
    check_factors(op, A, B, basis)
    check_linear(op, x, weight, None, A)
    check_saved(op, grad_y, x, xA, effective, weight, A, B, offsets)
    g, r, n = A.shape
    m = B.shape[1]
    gy, rows = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, n)
    slices = [gy[:, offset : offset + m] for offset in offsets]
    through = torch.cat([scale * (s @ b.to(x.dtype)) for s, b in zip(slices, B, strict=True)], dim=1)  # [N, g r]
    grad_x = x.new_empty(0)
    if need_x:
        grad_x = (gy @ weight + through @ effective.reshape(g * r, n).to(x.dtype)).reshape(x.shape)
    grad_A = (through.mT @ rows).to(A.dtype).reshape(g, r, n)
    with full_float32():
        inner = xA.reshape(-1, g * r)
        if rectify == "tangent" and not is_empty(basis):  # G P A^T needs only x (A P)^T, not G V
            inner = rows @ project(A, basis).reshape(g * r, n).mT.to(x.dtype)
        grad_B = torch.stack([scale * (s.mT @ inner[:, i * r : (i + 1) * r]) for i, s in enumerate(slices)]).to(B.dtype)
        grad_A, grad_B = rectified(effective, B, grad_A, grad_B, basis, scale, rectify, damping, share, balance)
    return grad_x, grad_A, grad_B


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
    _require_dtype(op, "effective", effective, (A.dtype,))
    _require_shape(op, "effective", effective, A.shape)
    _require_device(op, A, effective=effective)
    for name, rows, width in (("grad_y", grad_y, weight.shape[0]), ("xA", xA, A.shape[0] * A.shape[1])):
        _require_dtype(op, name, rows, (x.dtype,))
        _require_shape(op, name, rows, (*x.shape[:-1], width))
        _require_device(op, A, **{name: rows})
    last = weight.shape[0] - B.shape[1]
    _require(
        len(offsets) == A.shape[0] and all(0 <= o <= last for o in offsets),
        f"{op}: offsets must be {A.shape[0]} numbers from 0 to {last}, got {list(offsets)}",
    )


# ------------------------------------------------------------------------------------------------ Decoupled Margin Loss


def margin_loss(features: Tensor, prototypes: Tensor, margin: float, temperature: float) -> tuple[Tensor, Tensor]:
    """mean_i (1/tau) log(1 + sum_c exp(tau (f^_i . p_c - margin))) and its gradient; see `ops.margin_loss`."""
    op = "margin_loss"
    _require_dtype(op, "features", features, INPUT_DTYPES)
    _require(features.dim() == 2, f"{op}: features must be [N, d], got {list(features.shape)}")
    _require_dtype(op, "prototypes", prototypes, WORKING_DTYPES)
    _require(
        prototypes.dim() == 2 and prototypes.shape[1] == features.shape[1],
        f"{op}: prototypes must be [C, d] with d = {features.shape[1]}, got {list(prototypes.shape)}",
    )
    _require_device(op, features, prototypes=prototypes)
    _require(-1 <= margin <= 1, f"{op}: margin must be a cosine in [-1, 1], got {margin:g}")
    _require(0 < temperature < float("inf"), f"{op}: temperature must be positive and finite, got {temperature:g}")
    dtype = torch.promote_types(prototypes.dtype, features.dtype)
    N, C = features.shape[0], prototypes.shape[0]
    if N == 0 or C == 0:
        return features.new_zeros((), dtype=dtype), torch.zeros_like(features)
    f, p = features.to(dtype), prototypes.to(dtype)
    norm = f.norm(dim=1, keepdim=True).clamp_min(torch.finfo(dtype).tiny ** 0.5)
    unit = f / norm
    z = temperature * (unit @ p.mT - margin)
    log_sum = torch.logsumexp(torch.cat([z.new_zeros(N, 1), z], dim=1), dim=1, keepdim=True)
    pull = torch.exp(z - log_sum) @ p  # d loss_i / d f^_i
    grad = (pull - (pull * unit).sum(1, keepdim=True) * unit) / (norm * N)
    return log_sum.mean() / temperature, grad.to(features.dtype)
