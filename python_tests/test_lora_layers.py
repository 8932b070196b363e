"""LoRALinear, LoRAQKV and inject: whole tasks, protection, merging, what is refused.

docs/method.md, properties 2, 3, 8 and 11.
"""

import copy

import pytest
import torch
from conftest import TOLERANCE, assert_close, orthonormal, relative_error
from torch import nn

from janus_ext import ArgumentError, LoRALinear, LoRAQKV, TaskBoundaryError, inject, ops
from janus_ext.backbone import prepare_torchvision
from janus_ext.backbone.families import declare_stacked
from janus_ext.protection import violation, violation_rounding

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
@pytest.mark.parametrize("mode", ops.RECTIFY)
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


@pytest.mark.parametrize("mode", ops.RECTIFY)
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


@pytest.mark.parametrize("layer_type", [LoRALinear, LoRAQKV])
def test_a_seed_means_the_same_factors_on_every_device(device: str, layer_type: type[nn.Module]) -> None:
    factors, next_draws = [], []
    for where in ("cpu", device, "meta"):  # meta holds no values, and has no generator of its own
        linear = nn.Linear(24, 3 * 24, device=where)
        torch.manual_seed(3)
        layer = layer_type(linear, 4)
        next_draws.append(torch.rand(2))
        if where != "meta":
            factors.append(layer.A.detach().cpu())
    assert torch.equal(factors[0], factors[1])
    assert torch.equal(next_draws[0], next_draws[1]) and torch.equal(next_draws[0], next_draws[2])


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
        ({"rank": 2, "scale": 0.0}, "LoRALinear: scale must be finite and not zero in float32, got 0"),
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
