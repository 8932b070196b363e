"""lora_linear and lora_qkv.

docs/method.md, properties 1, 2, 4, 8, 10 and 12.
"""

import pytest
import torch
from conftest import assert_close, orthonormal, relative_error
from torch import nn

from janus_ext import LoRALinear, ops

MODES = ["none", "project", "tangent", "exact"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TINY = 1e-14  # damping that a float64 solution does not notice


def case(n: int = 20, m: int = 24, r: int = 3, k: int = 6, rows: int = 50) -> dict[str, torch.Tensor]:
    """Random float64 x, weight, bias, A, B, basis."""
    d = torch.float64
    return {
        "x": torch.randn(rows, n, dtype=d),
        "weight": torch.randn(m, n, dtype=d) / n**0.5,
        "bias": torch.randn(m, dtype=d),
        "A": torch.randn(r, n, dtype=d) / n**0.5,
        "B": torch.randn(m, r, dtype=d) / r**0.5,
        "basis": orthonormal(n, k),
    }


def factor_gradients(
    c: dict[str, torch.Tensor], G: torch.Tensor, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """dA, dB that the backward of lora_linear returns when dL/dW_eff is G: rows x = I make it so."""
    eye = torch.eye(c["A"].shape[1], dtype=torch.float64)
    A, B = c["A"].clone().requires_grad_(), c["B"].clone().requires_grad_()
    y = ops.lora_linear(eye, c["weight"], None, A, B, c["basis"], **options)
    y.backward(G.mT.contiguous())
    return A.grad, B.grad


def composite(c: dict[str, torch.Tensor], dA: torch.Tensor, dB: torch.Tensor, scale: float) -> torch.Tensor:
    A = ops.project(c["A"], c["basis"])
    return scale * (c["B"] @ dA + dB @ A)


def brute_force(B: torch.Tensor, A: torch.Tensor, G_safe: torch.Tensor, scale: float) -> torch.Tensor:
    """min over (dA, dB) of |s (B dA + dB A) - G_safe|_F by one dense least-squares problem; the minimising update."""
    (m, r), n = B.shape, A.shape[1]
    d = torch.float64
    from_A = torch.einsum("ia,jb->ijab", B, torch.eye(n, dtype=d)).reshape(m * n, r * n)
    from_B = torch.einsum("ia,bj->ijab", torch.eye(m, dtype=d), A).reshape(m * n, m * r)
    system = scale * torch.cat([from_A, from_B], dim=1)
    solution = torch.linalg.lstsq(system, G_safe.reshape(-1, 1), driver="gelsd").solution
    return (system @ solution).reshape(m, n)


# ----------------------------------------------------------------------------------- the closest reachable update


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(9, 7, 2, 3), (6, 11, 3, 4), (8, 8, 1, 0), (5, 7, 2, 5)], ids=str)
def test_tangent_is_the_least_squares_solution(shape: tuple[int, int, int, int], share: float) -> None:
    m, n, r, k = shape
    c = case(n=n, m=m, r=r, k=k)
    G = torch.randn(m, n, dtype=torch.float64)
    dA, dB = factor_gradients(c, G, scale=0.7, rectify="tangent", damping=TINY, share=share)
    update = 0.7 * (c["B"] @ dA + dB @ c["A"])
    want = brute_force(c["B"], c["A"], ops.project(G, c["basis"]), 0.7)
    assert relative_error(update, want) <= 1e-9


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_exact_is_the_least_squares_solution_with_the_safe_factor(share: float) -> None:
    c = case(n=11, m=9, r=3, k=4)
    G = torch.randn(9, 11, dtype=torch.float64)
    dA, dB = factor_gradients(c, G, scale=0.7, rectify="exact", damping=TINY, share=share)
    want = brute_force(c["B"], ops.project(c["A"], c["basis"]), ops.project(G, c["basis"]), 0.7)
    assert relative_error(composite(c, dA, dB, 0.7), want) <= 1e-9


def test_exact_is_closer_to_the_safe_gradient_than_tangent() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        c = case(n=30, m=24, r=4, k=10)
        G_safe = ops.project(torch.randn(24, 30, dtype=torch.float64), c["basis"])
        errors = {}
        for mode, A in (("tangent", c["A"]), ("exact", ops.project(c["A"], c["basis"]))):
            dA, dB = factor_gradients(c, G_safe, rectify=mode, damping=TINY)
            errors[mode] = float((c["B"] @ dA + dB @ A - G_safe).norm())
        assert errors["exact"] <= errors["tangent"] * (1 + 1e-12)


def test_exact_composite_leaves_the_basis_alone_and_tangent_does_not() -> None:
    c = case(n=30, m=24, r=4, k=10)
    G = torch.randn(24, 30, dtype=torch.float64)
    dA, dB = factor_gradients(c, G, rectify="exact")
    update = composite(c, dA, dB, 1.0)
    assert (update @ c["basis"]).norm() <= 1e-13 * update.norm()
    dA, dB = factor_gradients(c, G, rectify="tangent")
    update = c["B"] @ dA + dB @ c["A"]
    assert (update @ c["basis"]).norm() >= 0.05 * update.norm()


@pytest.mark.parametrize("mode", MODES)
def test_linear_in_the_gradient(mode: str) -> None:
    c = case()
    G1, G2 = torch.randn(2, 24, 20, dtype=torch.float64)
    options = {"rectify": mode, "scale": 0.5, "balance": True}
    together = factor_gradients(c, 2 * G1 - 3 * G2, **options)
    apart = zip(factor_gradients(c, G1, **options), factor_gradients(c, G2, **options), strict=True)
    for got, (first, second) in zip(together, apart, strict=True):
        assert_close(got, 2 * first - 3 * second, torch.float64)


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_accumulate_to_the_large_batch(device: str, mode: str) -> None:
    c = {name: t.to(device) for name, t in case().items()}
    layer = LoRALinear(nn.Linear(20, 24, dtype=torch.float64, device=device), 3, rectify=mode)
    layer.protect(c["basis"])
    with torch.no_grad():
        layer.B.copy_(c["B"])
    layer(c["x"]).square().sum().backward()
    want = [p.grad.clone() for p in (layer.A, layer.B)]
    layer.zero_grad()
    for chunk in c["x"].split(13):
        layer(chunk).square().sum().backward()
    for p, w in zip((layer.A, layer.B), want, strict=True):
        assert_close(p.grad, w, torch.float64)


def test_first_step_moves_B_by_the_damped_formula_and_leaves_A_finite() -> None:
    c = case()
    c["B"] = torch.zeros_like(c["B"])
    G = torch.randn(24, 20, dtype=torch.float64)
    dA, dB = factor_gradients(c, G, scale=0.5, rectify="exact", damping=TINY)
    A = ops.project(c["A"], c["basis"])
    assert not dA.any()
    assert_close(dB, 0.5 * G @ A.mT @ torch.linalg.inv(A @ A.mT) / 0.25, torch.float64, 100)


def test_balance_is_the_stated_factor() -> None:
    c = case()
    G = torch.randn(24, 20, dtype=torch.float64)
    A = ops.project(c["A"], c["basis"])
    dA, dB = factor_gradients(c, G, scale=0.5, rectify="exact")
    balanced_A, balanced_B = factor_gradients(c, G, scale=0.5, rectify="exact", balance=True)
    assert_close(balanced_A, dA * 0.25 * c["B"].square().sum() / 3, torch.float64)
    assert_close(balanced_B, dB * 0.25 * A.square().sum() / 3, torch.float64)


# ---------------------------------------------------------------------------------------- forward and plain gradients


@pytest.mark.parametrize("mode", ["none", "exact"])
def test_gradcheck_of_plain_gradients(device: str, mode: str) -> None:
    c = {name: t.to(device) for name, t in case(n=6, m=5, r=2, k=2, rows=4).items()}
    leaves = [c[name].requires_grad_() for name in ("x", "A", "B")]

    def function(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        safe = ops.project(A, c["basis"])  # with A_s as the leaf, deferred gradients are the true ones
        basis = c["basis"] if mode == "exact" else None
        return ops.lora_linear(x, c["weight"], c["bias"], safe, B, basis, 0.7, mode, defer=True)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("targets", [("k", "v"), ("q",), ("v", "q", "k")], ids=str)
def test_qkv_equals_separate_linears(device: str, targets: tuple[str, ...]) -> None:
    n = m = 12
    c = {name: t.to(device) for name, t in case(n=n, m=3 * m, k=4).items()}
    x = c["x"].reshape(5, 10, n).requires_grad_()
    A = torch.randn(len(targets), 3, n, dtype=torch.float64, device=device, requires_grad=True)
    B = torch.randn(len(targets), m, 3, dtype=torch.float64, device=device, requires_grad=True)
    y = ops.lora_qkv(x, c["weight"], c["bias"], A, B, c["basis"], 0.7, targets=targets)
    seed = torch.randn_like(y)
    y.backward(seed)
    got = [x.grad, A.grad, B.grad]
    x2, A2, B2 = (t.detach().requires_grad_() for t in (x, A, B))
    slices = list((x2 @ c["weight"].mT + c["bias"]).split(m, dim=-1))
    for i, target in enumerate(targets):
        j = "qkv".index(target)
        W, b = c["weight"][j * m : (j + 1) * m], c["bias"][j * m : (j + 1) * m]
        slices[j] = ops.lora_linear(x2, W, b, A2[i], B2[i], c["basis"], 0.7)
    want = torch.cat(slices, dim=-1)
    want.backward(seed)
    assert_close(y, want, torch.float64)
    for g, p in zip(got, (x2, A2, B2), strict=True):
        assert_close(g, p.grad, torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(20, 24, 3, 6), (20, 24, 1, 0), (20, 24, 5, 15)], ids=str)
def test_every_dtype_equals_float64(device: str, dtype: torch.dtype, mode: str, shape: tuple[int, ...]) -> None:
    n, m, r, k = shape
    working = torch.promote_types(dtype, torch.float32)
    c = case(n=n, m=m, r=r, k=k)
    kinds = {"x": dtype, "weight": dtype, "bias": dtype, "A": working, "B": working, "basis": working}
    c = {name: t.to(kinds[name]) for name, t in c.items()}
    seed = torch.randn(50, m).to(dtype)
    results = []
    for where, wide in ((device, False), ("cpu", True)):
        t = {name: (v.double() if wide else v).to(where, copy=True) for name, v in c.items()}
        leaves = [t[name].requires_grad_() for name in ("x", "A", "B")]
        y = ops.lora_linear(**t, scale=0.7, rectify=mode, balance=True)
        y.backward(seed.to(where, y.dtype))
        results.append([y, *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, dtype, factor=10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "k"), [(30, 9), (30, 0), (0, 5)], ids=str)  # r = 3, n = 12: k = n - r, none, no rows
def test_qkv_of_every_dtype_equals_float64(device: str, dtype: torch.dtype, mode: str, rows: int, k: int) -> None:
    working = torch.promote_types(dtype, torch.float32)
    n = m = 12
    c = case(n=n, m=3 * m, k=k, rows=rows)
    c |= {"A": torch.randn(2, 3, n, dtype=torch.float64) / 3, "B": torch.randn(2, m, 3, dtype=torch.float64)}
    kinds = {"x": dtype, "weight": dtype, "bias": dtype, "A": working, "B": working, "basis": working}
    c = {name: t.to(kinds[name]) for name, t in c.items()}
    seed = torch.randn(rows, 3 * m).to(dtype)
    results = []
    for where, wide in ((device, False), ("cpu", True)):
        t = {name: (v.double() if wide else v).to(where, copy=True) for name, v in c.items()}
        t["x"] = t["x"].mT.contiguous().mT  # columns first
        leaves = [t[name].requires_grad_() for name in ("x", "A", "B")]
        y = ops.lora_qkv(**t, scale=0.7, rectify=mode, balance=True)
        y.backward(seed.to(where, y.dtype))
        results.append([y, *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, dtype, factor=10)


def test_empty_batch_and_non_contiguous_input(device: str) -> None:
    c = {name: t.to(device) for name, t in case().items()}
    empty = dict(c, x=torch.zeros(0, 20, dtype=torch.float64, device=device), A=c["A"].clone().requires_grad_())
    y = ops.lora_linear(**empty)
    y.sum().backward()
    assert y.shape == (0, 24) and not empty["A"].grad.any()
    strided = {name: t.mT.contiguous().mT if t.dim() == 2 else t for name, t in c.items()}
    assert_close(ops.lora_linear(**strided), ops.lora_linear(**c), torch.float64)


def test_expanded_gradient(device: str) -> None:
    c = {name: t.to(device) for name, t in case().items()}
    c["A"].requires_grad_()
    ops.lora_linear(**c).sum().backward()  # the gradient of a sum is an expanded scalar
    assert torch.isfinite(c["A"].grad).all()


def test_reduced_matmul_precision_does_not_reach_the_projection(device: str) -> None:
    layer = LoRALinear(nn.Linear(64, 64, device=device), 4)
    layer.protect(orthonormal(64, 20, torch.float32, device))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        _, _, effective = torch.ops.janus_ext.lora_linear(
            torch.randn(3, 64, device=device),
            layer.linear.weight,
            None,
            torch.randn(4, 64, device=device),
            layer.B,
            layer.basis,
        )
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert (effective @ layer.basis).norm() <= 1e-6 * effective.norm()


@pytest.mark.parametrize("name", ["weight", "bias", "basis"])
def test_what_gets_no_gradient_is_refused_where_it_asks_for_one(name: str) -> None:
    c = case()
    c[name].requires_grad_()
    with pytest.raises(ValueError, match=f"lora_linear: {name} must be frozen"):
        ops.lora_linear(**c)
    with torch.no_grad():
        ops.lora_linear(**c)
