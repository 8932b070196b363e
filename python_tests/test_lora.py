"""lora_linear, lora_qkv, LoRALinear, LoRAQKV and inject.

docs/method.md, properties 1, 2, 3, 4, 8, 10, 11 and 12.
"""

import copy

import pytest
import torch
from conftest import TOLERANCE, assert_close, orthonormal, relative_error
from torch import nn

from janus_ext import ArgumentError, LoRALinear, LoRAQKV, TaskBoundaryError, inject, ops
from janus_ext.backbone import prepare_torchvision
from janus_ext.backbone.families import declare_stacked
from janus_ext.lora import violation, violation_rounding

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


def test_trainable_weight_is_refused() -> None:
    c = case()
    c["weight"].requires_grad_()
    with pytest.raises(ValueError, match="lora_linear: weight must be frozen"):
        ops.lora_linear(**c)


# -------------------------------------------------------------------------------------------------- exactness (2, 3)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, autocast: bool = False, steps: int = 40) -> None:
    """Many steps toward random targets, inputs inside and outside the protected span."""
    weight = next(layer.parameters())
    for _ in range(steps):
        x = torch.randn(32, 24, dtype=weight.dtype, device=weight.device)
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=autocast):
            y = layer(x)
        loss = (y.to(weight.dtype) - torch.randn_like(y, dtype=weight.dtype)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("autocast", [False, True], ids=["full", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_whole_task_leaves_protected_inputs_alone(device: str, name: str, dtype: torch.dtype, autocast: bool) -> None:
    if autocast and dtype == torch.float64:
        pytest.skip("autocast leaves float64 alone")
    layer = LoRALinear(nn.Linear(24, 30, dtype=dtype, device=device), 4, scale=0.8)
    V = orthonormal(24, 9, dtype, device)
    layer.protect(V)
    protected = torch.randn(64, 9, dtype=dtype, device=device) @ V.mT
    weight_before, outputs_before = layer.linear.weight.double().clone(), layer(protected).detach()
    train(layer, OPTIMIZERS[name]([layer.A, layer.B]), autocast)
    bound = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    delta = layer.delta()
    assert delta.norm() > 0.1 * layer.linear.weight.norm(), "the task moved nothing"
    assert (delta @ V).norm() <= bound * delta.norm()
    assert layer.violation() <= bound
    layer.merge()
    change = layer.linear.weight.double() - weight_before
    eps = torch.finfo(dtype).eps
    assert (change @ V.double()).norm() <= bound * change.norm() + eps * weight_before.norm()
    assert relative_error(layer(protected), outputs_before) <= 1e-5


def test_a_plain_lora_layer_does_violate() -> None:
    layer = LoRALinear(nn.Linear(24, 30), 4, rectify="project")
    layer.protect(orthonormal(24, 9, torch.float32))
    train(layer, OPTIMIZERS["adam"]([layer.A, layer.B]))
    assert layer.violation() > 0.05


def test_a_frozen_vit_block_keeps_its_outputs(device: str) -> None:
    prepare_torchvision()
    from timm.models.vision_transformer import Block

    block = Block(48, 3, qkv_bias=True).double().to(device)
    layer = inject(block, rank=3)["attn.qkv"]
    tokens = torch.randn(2, 5, 48, dtype=torch.float64, device=device)
    before = block(tokens).detach()
    layer.protect(torch.linalg.qr(block.norm1(tokens).flatten(0, 1).T).Q)  # what qkv sees of these tokens
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        block(torch.randn(4, 5, 48, dtype=torch.float64, device=device)).square().sum().backward()
        optimizer.step()
    others = torch.randn_like(tokens)
    moved = block(others).detach()
    assert layer.delta().norm() > 1e-2
    assert relative_error(block(tokens), before) <= 1e-10
    layer.merge()
    assert relative_error(block(tokens), before) <= 1e-10
    assert relative_error(block(others), moved) <= 1e-10


@declare_stacked
class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv, as timm names it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


# ----------------------------------------------------------------------------------------------------------- layers


def test_protect_while_an_update_is_unmerged_raises_and_changes_nothing() -> None:
    layer = LoRALinear(nn.Linear(10, 12), 2)
    layer.protect(orthonormal(10, 3, torch.float32))
    before = layer.basis
    with torch.no_grad():
        layer.B.fill_(0.1)
    with pytest.raises(TaskBoundaryError, match="merge"):
        layer.protect(orthonormal(10, 5, torch.float32))
    assert layer.basis is before
    layer.merge()
    layer.protect(orthonormal(10, 5, torch.float32))


def test_basis_must_leave_room_for_the_factors() -> None:
    layer = LoRALinear(nn.Linear(10, 12), 2)
    layer.protect(orthonormal(10, 8, torch.float32))
    with pytest.raises(ArgumentError, match=r"n = 10 and k <= n - r = 8, got \[10, 9\]"):
        layer.protect(orthonormal(10, 9, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_merge_returns_the_change_that_was_made(device: str, mode: str, dtype: torch.dtype) -> None:
    layer = LoRAQKV(nn.Linear(12, 36, device=device, dtype=dtype), 3, scale=0.6, rectify=mode)
    layer.protect(orthonormal(12, 4, dtype, device))
    with torch.no_grad():
        layer.B.normal_()
    delta, before = layer.delta(), layer.linear.weight.double().clone()
    change = layer.merge()
    assert_close(change, delta, dtype)
    assert torch.equal(change.flatten(0, 1), layer.linear.weight.double()[12:] - before[12:])
    assert (violation(change, layer.basis) <= 1e-5) == (mode == "exact")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_rounding_of_the_weights_bounds_what_an_exact_update_violates(dtype: torch.dtype) -> None:
    layer = LoRAQKV(nn.Linear(12, 36, dtype=dtype), 3)
    layer.protect(orthonormal(12, 4, layer.A.dtype))
    violated = []
    for size in (10 * torch.finfo(dtype).eps, 10.0):
        with torch.no_grad():
            layer.B.normal_().mul_(size)
        change = layer.merge()
        violated.append(violation(change, layer.basis))
        assert violated[-1] <= violation_rounding(change, layer.target_weights())
    assert violated[0] > 2 * violated[1] > 0, "the number alone does not tell that the update is exact"


def test_a_violation_of_the_update_itself_is_above_the_rounding() -> None:
    layer = LoRALinear(nn.Linear(12, 24), 3, rectify="none")
    with torch.no_grad():
        layer.B.normal_().mul_(1e-3)
    change = layer.merge()
    assert violation(change, orthonormal(12, 4)) > 100 * violation_rounding(change, layer.target_weights()) > 0


def test_without_a_change_there_is_no_rounding_of_it() -> None:
    layer = LoRALinear(nn.Linear(12, 24), 3)
    assert violation_rounding(layer.merge(), layer.target_weights()) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_merge_keeps_the_function(device: str, mode: str) -> None:
    layer = LoRAQKV(nn.Linear(12, 36, device=device), 3, scale=0.6, rectify=mode)
    layer.protect(orthonormal(12, 4, torch.float32, device))
    with torch.no_grad():
        layer.B.normal_()
    x = torch.randn(7, 12, device=device)
    before, q_before = layer(x).detach(), layer.linear.weight[:12].clone()
    layer.merge()
    assert_close(layer(x), before, torch.float32)
    assert not layer.B.any()
    assert torch.equal(layer.linear.weight[:12], q_before), "q is no target"


@pytest.mark.parametrize("poison", ["skewed", "nan"])
def test_a_basis_that_is_not_orthonormal_is_refused(poison: str) -> None:
    layer = LoRALinear(nn.Linear(10, 12), 2)
    V = orthonormal(10, 3, torch.float32) * (2 if poison == "skewed" else float("nan"))
    with pytest.raises(ArgumentError, match="basis must be orthonormal"):
        layer.protect(V)
    assert layer.basis.shape == (10, 0)


def test_a_foreign_state_leaves_the_basis_alone() -> None:
    layer, other = LoRALinear(nn.Linear(10, 12), 2), LoRALinear(nn.Linear(9, 12), 2)
    layer.protect(orthonormal(10, 3, torch.float32))
    other.protect(orthonormal(9, 4, torch.float32))
    before = layer.basis.clone()
    with pytest.raises(RuntimeError, match="size mismatch for basis"):
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.basis, before)


def test_inject_refuses_whole_models_only() -> None:
    fit, unfit = Attention(12, 3), Attention(12, 3)
    unfit.qkv = nn.utils.parametrizations.spectral_norm(unfit.qkv)
    with pytest.raises(ArgumentError, match="inject: 1.qkv: linear must be a plain nn.Linear, got a Param"):
        inject(nn.Sequential(fit, unfit), rank=2)
    with pytest.raises(ArgumentError, match="rank must be from 1"):
        inject(nn.Sequential(fit, Attention(4, 1)), rank=8)
    assert isinstance(fit.qkv, nn.Linear) and fit.qkv.weight.requires_grad


def test_a_fresh_A_is_safe_and_keeps_its_row_norms() -> None:
    layer = LoRALinear(nn.Linear(40, 40), 4)
    norms = layer.A.detach().norm(dim=1).clone()
    layer.protect(orthonormal(40, 20, torch.float32))
    assert (layer.A @ layer.basis).norm() <= 1e-6 * layer.A.norm()
    assert_close(layer.A.detach().norm(dim=1), norms, torch.float32)


def test_deferred_tangent_with_a_basis_is_refused() -> None:
    layer = LoRALinear(nn.Linear(10, 12), 2, rectify="tangent", rectify_in="step")
    layer.protect(orthonormal(10, 3, torch.float32))
    with pytest.raises(ArgumentError, match="rectify_in='backward'"):
        layer(torch.randn(2, 10))


def test_state_dict_carries_the_basis() -> None:
    layer = LoRALinear(nn.Linear(10, 12), 2)
    layer.protect(orthonormal(10, 3, torch.float32))
    other = LoRALinear(nn.Linear(10, 12), 2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.basis, layer.basis)
    x = torch.randn(3, 10)
    assert torch.equal(other(x), layer(x))


def test_deepcopy() -> None:
    layer = LoRALinear(nn.Linear(10, 12), 2)
    x = torch.randn(3, 10)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be from 1 to min"),
        ({"rank": 99}, "rank must be from 1 to min"),
        ({"rank": 2, "rectify": "all"}, "rectify must be one of none, project, tangent, exact, got 'all'"),
        ({"rank": 2, "scale": 0.0}, "LoRALinear: scale must be finite and not zero, got 0"),
        ({"rank": 2, "damping": -1.0}, "LoRALinear: damping must be positive and finite, got -1"),
        ({"rank": 2, "share": 2.0}, r"LoRALinear: share must be in \[0, 1\], got 2"),
        ({"rank": 2, "rectify_in": "never"}, "rectify_in must be one of backward, step, got 'never'"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_wrong_layer_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LoRALinear(nn.Linear(10, 12), **arguments)


def test_inject_freezes_all_but_the_factors() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([Attention(12, 3), Attention(12, 3)])})
    layers = inject(model, rank=2, targets=("q", "v"))
    assert list(layers) == ["blocks.0.qkv", "blocks.1.qkv"]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [f"blocks.{i}.qkv.{f}" for i in (0, 1) for f in ("A", "B")]
    with pytest.raises(ArgumentError, match="its qkv is a LoRAQKV, an adapter has taken its place"):
        inject(model, rank=2)
    with pytest.raises(ArgumentError, match="fused `qkv`"):
        inject(nn.Sequential(nn.Linear(3, 3)), rank=2)


def test_autocast_dtypes(device: str) -> None:
    layer = LoRALinear(nn.Linear(24, 30, device=device), 4)
    layer.protect(orthonormal(24, 9, torch.float32, device))
    x = torch.randn(8, 24, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.A.grad.dtype == layer.B.grad.dtype == x.grad.dtype == torch.float32
    with torch.no_grad():
        layer.B.normal_()
    layer.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        layer(x).float().square().sum().backward()
    assert (layer.A.grad @ layer.basis).norm() <= TOLERANCE[torch.float32] * layer.A.grad.norm()
