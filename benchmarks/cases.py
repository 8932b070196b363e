"""The registry of benchmarks: a stable name, what is timed, what it is timed against, and the target."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from head_cases import DIM, lda_fit, ridge_fit, scores
from program import Stepper, run_tasks
from torch import Tensor, nn
from torch.nn import functional as F

from janus_ext import ops, reference

Run = Callable[[], Any]


@dataclass(frozen=True)
class InPlace:
    """A function that overwrites its inputs: `refill`, which restores them before every call, is not timed."""

    refill: Callable[[], None]
    run: Run


Side = Run | InPlace
Build = Callable[[str], tuple[Side, Side]]


@dataclass(frozen=True)
class Case:
    """One comparison: `build(device)` returns the two sides, which must give the same tensors, or nothing."""

    name: str
    against: str
    build: Build
    targets: dict[str, float] = field(default_factory=dict)
    """Ratio to reach, by device; "narrow cpu" where one without AVX-512 has another."""
    tolerance: float = 1e-4
    """Largest relative difference of the two results."""
    repeats: int = 15
    """At least so many interleaved pairs, and two seconds of ours, if both sides together leave the time for it."""


def _orthonormal(n: int, k: int, device: str) -> Tensor:
    return torch.linalg.qr(torch.randn(n, k, device=device)).Q.contiguous()


def _gram(rows: int, n: int) -> Build:
    def build(device: str) -> tuple[Run, Run]:
        x = torch.randn(rows, n, device=device)
        ours, theirs = torch.zeros(n, n, device=device), torch.zeros(n, n, device=device)
        return (
            lambda: ops.gram_update_(ours, x, 0.5),  # decay: repeats converge instead of growing
            lambda: theirs.mul_(0.5).addmm_(x.mT, x),
        )

    return build


def _gram_bf16(rows: int, n: int) -> Build:
    """bfloat16 x, float32 Gram matrix. The library has this product on a GPU; on a CPU x is cast first."""

    def build(device: str) -> tuple[Run, Run]:
        x = torch.randn(2 * rows if device == "cuda" else rows, n, device=device).bfloat16()
        ours, theirs = torch.zeros(n, n, device=device), torch.zeros(n, n, device=device)

        def library() -> Tensor:
            if device == "cuda":
                return theirs.mul_(0.5).add_(torch.mm(x.mT, x, out_dtype=torch.float32))
            upcast = x.float()
            return theirs.mul_(0.5).addmm_(upcast.mT, upcast)

        _check_accumulation(ops.gram_update_(torch.zeros_like(ours), x), x)
        return lambda: ops.gram_update_(ours, x, 0.5), library

    return build


def _bf16(name: str, rows: int, n: int, targets: dict[str, float]) -> Case:
    """Each side may have the error of its float32 sums, over twice as many rows on a GPU."""
    against, tolerance = "upcast, addmm_ (GPU: mm to float32)", 2 * _accumulated(2 * rows)
    return Case(name, against, _gram_bf16(rows, n), targets, tolerance)


def _accumulated(rows: int) -> float:
    """Largest relative error of float32 sums of so many exact products: rows / 8 times 2^-23.

    Products of bfloat16 are exact in float32, and matrix units add 16 of them to the running sum at a time. A GPU's
    cut the aligned summands off instead of rounding the sum, so that errors do not cancel out: they grow with the
    number of additions, rows / 16, and not with its root. The sum being half as large on average, the bound leaves four
    units in its last place to each of them. A result rounded to bfloat16 (1.5e-3) is above it for the rows here.
    """
    return max(rows / 8, 1) * torch.finfo(torch.float32).eps


def _check_accumulation(gram: Tensor, x: Tensor) -> None:
    """Raises unless gram is x^T x, as float64 has it, with no more error than float32 sums make."""
    exact = x.double().mT @ x.double()
    error, bound = float((gram.double() - exact).norm() / exact.norm()), _accumulated(len(x))
    if not error <= bound:
        raise ValueError(
            f"gram_update_ of {len(x)} bfloat16 rows has error {error:.1e}, float32 sums at most {bound:.1e}"
        )


def _rectify(device: str) -> tuple[Side, Side]:
    """24 pairs 768 x 10 exact, k = 384; K and V of a block share V."""
    n, r, k, blocks = 768, 10, 384, 12
    bases = [_orthonormal(n, k, device) for _ in range(blocks)]
    V = [v for v in bases for _ in range(2)]
    A = [ops.project(torch.randn(r, n, device=device), v) for v in V]
    B = [torch.randn(n, r, device=device) for _ in V]
    grad_A, grad_B = [torch.randn_like(a) for a in A], [torch.randn_like(b) for b in B]

    def side(function: Callable[..., None]) -> InPlace:
        gA, gB = [torch.empty_like(g) for g in grad_A], [torch.empty_like(g) for g in grad_B]

        def refill() -> None:
            torch._foreach_copy_(gA + gB, grad_A + grad_B)

        def run() -> list[Tensor]:
            function(A, B, gA, gB, V, [1.0] * len(V))
            return gA + gB

        return InPlace(refill, run)

    return side(ops.rectify_), side(torch.no_grad()(reference.rectify_))


def _lora_linear(device: str) -> tuple[Run, Run]:
    """Forward and backward, x 12608 x 768, r = 10, k = 384 exact, against the plain layer x A^T B^T under autograd."""
    n, r = 768, 10
    linear = nn.Linear(n, n, device=device).requires_grad_(False)
    V = _orthonormal(n, 384, device)
    A = ops.project(torch.randn(r, n, device=device), V).requires_grad_()
    B = torch.randn(n, r, device=device, requires_grad=True)
    x = torch.randn(12608, n, device=device, requires_grad=True)
    return (
        _step(lambda: ops.lora_linear(x, linear.weight, linear.bias, A, B, V), x, A, B),
        _step(lambda: linear(x) + F.linear(F.linear(x, A), B), x, A, B),
    )


def _lora_qkv(device: str) -> tuple[Run, Run]:
    """The same on K and V of a fused qkv, against two plain LoRA layers beside it."""
    n, r = 768, 10
    linear = nn.Linear(n, 3 * n, device=device).requires_grad_(False)
    V = _orthonormal(n, 384, device)
    A = ops.project(torch.randn(2, r, n, device=device), V).requires_grad_()
    B = torch.randn(2, n, r, device=device, requires_grad=True)
    x = torch.randn(12608, n, device=device, requires_grad=True)

    def plain() -> Tensor:
        q, k, v = linear(x).split(n, dim=1)
        k, v = k + F.linear(F.linear(x, A[0]), B[0]), v + F.linear(F.linear(x, A[1]), B[1])
        return torch.cat([q, k, v], dim=1)

    return _step(lambda: ops.lora_qkv(x, linear.weight, linear.bias, A, B, V), x, A, B), _step(plain, x, A, B)


def _step(forward: Callable[[], Tensor], x: Tensor, *factors: Tensor) -> Run:
    """Forward, and backward from a fixed gradient: y and dL/dx, which both sides must agree on.

    The factors' gradients are timed but differ by design: ours come rectified.
    """
    generator = torch.Generator(x.device).manual_seed(1)
    seed = torch.randn(forward().shape, generator=generator, device=x.device)

    def run() -> list[Tensor]:
        for leaf in (x, *factors):
            leaf.grad = None
        y = forward()
        y.backward(seed)
        return [y, x.grad]

    return run


def _margin(device: str) -> tuple[Run, Run]:
    """Forward and backward, 128 x 768 features, 345 prototypes."""
    features = torch.randn(128, 768, device=device, requires_grad=True)
    prototypes = F.normalize(torch.randn(345, 768, device=device), dim=1)

    def eager() -> Tensor:
        z = 16 * (F.normalize(features, dim=1) @ prototypes.mT - 0.2)
        return F.softplus(torch.logsumexp(z, dim=1)).mean() / 16

    def run(loss: Callable[[], Tensor]) -> Callable[[], Any]:
        def step() -> Tensor:
            features.grad = None
            loss().backward()
            return features.grad

        return step

    return run(lambda: ops.margin_loss(features, prototypes, 0.2, 16.0)), run(eager)


def _commit(device: str) -> tuple[Run, Run]:
    """n = 768, k = 200, energy 0.99 of the squared eigenvalues, as InfLoRA's DualGPM grows its basis."""
    x = torch.randn(4096, 768, device=device) * torch.logspace(0, -2, 768, device=device)
    gram, V = x.mT @ x / len(x), _orthonormal(768, 200, device)
    H, F0 = gram.cpu().numpy(), V.cpu().numpy()
    return (
        lambda: _projector(ops.extend_basis(V, gram, 0.99, 758, energy_power=2)),
        lambda: _projector(torch.from_numpy(_dual_gpm(H, F0, 0.99)).to(device)),
    )


def _dual_gpm(H: np.ndarray, basis: np.ndarray, threshold: float) -> np.ndarray:
    """DualGPM's growing step (Liang & Li 2024): two singular value decompositions of n x n matrices."""
    total = (np.linalg.svd(H, full_matrices=False)[1] ** 2).sum()
    U, S, _ = np.linalg.svd(H - basis @ (basis.T @ H), full_matrices=False)
    share = (total - (S**2).sum()) / total
    added = 0
    while share < threshold:
        share += S[added] ** 2 / total
        added += 1
    return np.hstack([basis, U[:, :added]])


def _projector(V: Tensor) -> Tensor:
    return V @ V.mT


def _isvd(device: str) -> tuple[Run, Run]:
    """n = 8192, l = 256, 2048 rows of rank 128: both are exact then, and give the same products C z."""
    n, l = 8192, 256  # noqa: E741
    x = torch.randn(2048, 128, device=device) @ torch.randn(128, n, device=device) / 128
    z = torch.randn(n, 4, device=device)
    start = torch.zeros(n, l, device=device), torch.zeros(l, device=device)
    gram = torch.zeros(n, n, device=device)

    def sketch() -> Tensor:
        U, S = ops.isvd_update(*start, x)
        return U @ (S[:, None] ** 2 * (U.mT @ z))

    return sketch, lambda: ops.gram_update_(gram.zero_(), x) @ z


def _steps(first: dict[str, Any], second: dict[str, Any]) -> Build:
    """Training steps of a ViT-S/16 in float32 with batches of 16 on a CPU; a ViT-B/16, bfloat16, 128 on a GPU.

    Each layer protects half of its inputs, and there are 345 old classes, where the two do not say otherwise.
    """

    def build(device: str) -> tuple[Run, Run]:
        model = ("vit_base_patch16_224", 128, "bf16") if device == "cuda" else ("vit_small_patch16_224", 16, "off")
        width = 768 if device == "cuda" else 384
        steppers = []
        for settings in (first, second):
            state = {"protected": width // 2 if settings["method"] == "janus" else 0, "old_classes": 345} | settings
            steppers.append(Stepper(device, *model[:2], amp=model[2], **state))
        return steppers[0].step, steppers[1].step

    return build


JANUS, LORA = {"method": "janus"}, {"method": "lora"}
OBSERVE, FIRST = {"observe": True}, {"protected": 0, "old_classes": 0}


def _task(device: str) -> tuple[Run, Run]:
    """Two tasks at DomainNet's preset; what they learn differs by design."""
    return lambda: run_tasks(device, "janus"), lambda: run_tasks(device, "inflora")


KERNELS = [
    Case("gram-768", "C.mul_(d).addmm_(X.T, X), N = 12608", _gram(12608, 768), {"cpu": 1.4, "cuda": 1.3}),
    Case("gram-384", "C.mul_(d).addmm_(X.T, X), N = 6304", _gram(6304, 384), {"cpu": 1.4}),
    _bf16("gram-bf16-768", 12608, 768, {"cpu": 2.0, "narrow cpu": 1.4, "cuda": 1.3}),
    _bf16("gram-bf16-384", 6304, 384, {"cpu": 2.0, "narrow cpu": 1.4}),
    Case("rectify", "plain-torch reference, layer by layer", _rectify, {"cpu": 2.0, "cuda": 10.0}),
    Case("lora-linear", "plain LoRA layer under autograd", _lora_linear, {"cpu": 1.0, "cuda": 1.0}),
    Case("lora-qkv", "two plain LoRA layers beside a fused qkv", _lora_qkv, {"cpu": 1.0, "cuda": 1.0}),
    Case("margin", "eager formula", _margin, {"cpu": 1.15}),
    Case("commit", "DualGPM's SVD route in NumPy", _commit, {"cpu": 3.0}, tolerance=1e-3),
    Case("isvd", "gram_update_ of the same rows, n = 8192", _isvd, tolerance=1e-3),
]
PROGRAM = [
    Case("step", "the step of plain LoRA", _steps(JANUS, LORA), {"cpu": 1 / 1.03, "cuda": 1 / 1.02}),
    Case(
        "step-observing", "the step of plain LoRA", _steps(JANUS | OBSERVE, LORA), {"cpu": 1 / 1.07, "cuda": 1 / 1.05}
    ),
    Case("flatness", "the step of the first task", _steps(JANUS, JANUS | FIRST), {"cpu": 1 / 1.05, "cuda": 1 / 1.05}),
    Case("task", "the task of InfLoRA", _task, {"cpu": 1 / 0.85, "cuda": 1 / 0.85}, repeats=3),
]
HEADS = [
    Case("lda-fit", "its formula in NumPy, d = 768, 345 classes", lda_fit, tolerance=1e-3),
    Case("ridge-fit", "NumPy: a solve for each strength", ridge_fit, tolerance=1e-3),
    Case("lda-fit-2000", "the same, 2,000 features more", partial(lda_fit, dim=DIM + 2000), tolerance=1e-3),
    Case("ridge-fit-2000", "the same, 2,000 features more", partial(ridge_fit, dim=DIM + 2000), tolerance=1e-3),
    Case("head-scores", "five linear heads side by side", scores, {"cpu": 1.0, "cuda": 1.0}),
    Case("head-scores-2000", "five linear heads side by side", partial(scores, width=2000)),
]
GROUPS = {"kernels": KERNELS, "heads": HEADS, "program": PROGRAM}
CASES = [*KERNELS, *HEADS, *PROGRAM]
