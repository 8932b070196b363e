"""The registry of kernel benchmarks: a stable name, what is timed, and what it is timed against."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_ext import ops, reference


@dataclass(frozen=True)
class Case:
    """One comparison: `build(device)` returns the two functions, which must give the same tensors."""

    name: str
    against: str
    build: Callable[[str], tuple[Callable[[], Any], Callable[[], Any]]]
    tolerance: float = 1e-4


def _orthonormal(n: int, k: int, device: str) -> Tensor:
    return torch.linalg.qr(torch.randn(n, k, device=device)).Q.contiguous()


def _gram(rows: int, n: int) -> Callable[[str], tuple[Callable[[], Any], Callable[[], Any]]]:
    def build(device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        x = torch.randn(rows, n, device=device)
        ours, theirs = torch.zeros(n, n, device=device), torch.zeros(n, n, device=device)
        return (
            lambda: ops.gram_update_(ours, x, 0.5),  # decay: repeats converge instead of growing
            lambda: theirs.mul_(0.5).addmm_(x.mT, x),
        )

    return build


def _rectify(device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """24 pairs 768 x 10 exact, k = 384; K and V of a block share V."""
    n, r, k, blocks = 768, 10, 384, 12
    bases = [_orthonormal(n, k, device) for _ in range(blocks)]
    V = [v for v in bases for _ in range(2)]
    A = [ops.project(torch.randn(r, n, device=device), v) for v in V]
    B = [torch.randn(n, r, device=device) for _ in V]
    grad_A, grad_B = [torch.randn_like(a) for a in A], [torch.randn_like(b) for b in B]

    def call(function: Callable[..., None]) -> Callable[[], Any]:
        def run() -> list[Tensor]:
            gA, gB = [g.clone() for g in grad_A], [g.clone() for g in grad_B]
            function(A, B, gA, gB, V, [1.0] * len(V))
            return gA + gB

        return run

    return call(ops.rectify_), call(torch.no_grad()(reference.rectify_))


def _lora_linear(device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward, x 12608 x 768, r = 10, k = 384 exact, against the plain layer x A^T B^T under autograd."""
    n, r = 768, 10
    linear = nn.Linear(n, n, device=device).requires_grad_(False)
    V = _orthonormal(n, 384, device)
    A = ops.project(torch.randn(r, n, device=device), V).requires_grad_()
    B = torch.randn(n, r, device=device, requires_grad=True)
    x = torch.randn(12608, n, device=device, requires_grad=True)
    seed = torch.randn(12608, n, device=device)

    def run(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        def step() -> Tensor:
            A.grad = B.grad = x.grad = None
            y = forward()
            y.backward(seed)
            return y

        return step

    ours = run(lambda: ops.lora_linear(x, linear.weight, linear.bias, A, B, V))
    return ours, run(lambda: linear(x) + F.linear(F.linear(x, A), B))


def _margin(device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
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


def _commit(device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """n = 768, k = 200, against the plain-torch reference."""
    x = torch.randn(4096, 768, device=device) * torch.logspace(0, -2, 768, device=device)
    gram, V = x.mT @ x, _orthonormal(768, 200, device)
    return tuple(lambda f=f: _projector(f(V, gram, 0.95, 758)) for f in (ops.extend_basis, reference.extend_basis))


def _projector(V: Tensor) -> Tensor:
    return V @ V.mT


CASES = [
    Case("gram-768", "C.mul_(d).addmm_(X.T, X)", _gram(12608, 768)),
    Case("gram-384", "C.mul_(d).addmm_(X.T, X)", _gram(6304, 384)),
    Case("rectify", "plain-torch reference, layer by layer", _rectify),
    Case("lora-linear", "plain LoRA layer under autograd, forward + backward", _lora_linear),
    Case("margin", "eager formula, forward + backward", _margin),
    Case("commit", "plain-torch reference", _commit),
]
