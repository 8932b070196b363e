"""What adapted layers take, keep and refuse: dtypes, copies, states, hooks of others, derivatives of other kinds."""

import copy
import warnings

import pytest
import torch
from conftest import TOLERANCE, assert_close, orthonormal, relative_error
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from janus_ext import ArgumentError, GradientRectifier, LoRALinear, LoRAQKV, inject, ops
from janus_ext.errors import TaskBoundaryError
from janus_ext.lora import LoRALayer
from janus_ext.protection import violation

HALVES = [torch.bfloat16, torch.float16]


def layer_of(dtype: torch.dtype = torch.float32, k: int = 5, **options: object) -> LoRALinear:
    """A layer in mid-task, k of its 20 inputs protected."""
    layer = LoRALinear(nn.Linear(20, 24, dtype=dtype), 3, **options)
    layer.protect(orthonormal(20, k, layer.A.dtype))
    nn.init.normal_(layer.B)
    return layer


# --------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_model_in_half_precision_keeps_its_factors(half: torch.dtype) -> None:
    layer = layer_of()
    A, B, V = (t.detach().clone() for t in (layer.A, layer.B, layer.basis))
    x = torch.randn(7, 20)
    want = layer(x)
    layer.to(half)
    assert layer.linear.weight.dtype == half
    for now, before in ((layer.A, A), (layer.B, B), (layer.basis, V)):
        assert now.dtype == torch.float32 and torch.equal(now, before)
    y = layer(x.to(half))
    assert y.dtype == half
    assert relative_error(y, want) <= TOLERANCE[half]
    y.float().sum().backward()
    assert layer.A.grad is not None and layer.B.grad is not None


def test_float64_and_back_and_another_device() -> None:
    layer = layer_of()
    assert layer.double().A.dtype == layer.basis.dtype == torch.float64
    assert layer.float().A.dtype == layer.basis.dtype == torch.float32
    assert layer.to("meta").A.is_meta and layer.basis.is_meta and layer.linear.weight.is_meta


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_merge_into_half_precision_says_what_it_costs_and_master_weights_avoid_it(half: torch.dtype) -> None:
    rounded, master = layer_of(half), layer_of(half)
    V = rounded.basis.double()
    with pytest.warns(UserWarning, match=r"merge\(\): weights in half precision are rounded.*master=True\) keeps"):
        assert violation(rounded.merge(), V) > 1e-4
    x = torch.randn(50, 5, dtype=torch.float64) @ master.basis.double().mT  # protected inputs
    x = x.to(half)
    before = master(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change = master.merge(master=True)
        master.merge()
    assert master.linear.weight.dtype == master.linear.bias.dtype == torch.float32
    assert violation(change, master.basis) <= 1e-5
    after = master(x)
    assert after.dtype == half
    # x itself was rounded and lies a little outside span(V): the outputs move by that share of the update, no more
    moved = x.double() @ change.mT
    assert relative_error(after, before.double() + moved) <= TOLERANCE[half]


def test_master_weights_survive_training(device: str) -> None:
    layer = layer_of(torch.bfloat16).to(device)
    layer.merge(master=True)
    nn.init.normal_(layer.B)
    x = torch.randn(9, 20, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and layer.A.grad.dtype == torch.float32
    assert violation(layer.merge(), layer.basis) <= 1e-5


# ---------------------------------------------------------------------------------------------------------------- bases


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("noise", [0.0, 1e-4], ids=["fp16", "noise"])
def test_a_rounded_basis_is_made_orthonormal(k: int, noise: float) -> None:
    """Else A V = 0 to 1e-3 only, which `rectify_` refuses where A is large."""
    exact = orthonormal(64, k, torch.float32)
    rounded = exact.half() if not noise else exact + noise * torch.randn(64, k) / 8
    layer = LoRALinear(nn.Linear(64, 32), 4, rectify_in="step")
    layer.protect(rounded)
    V = layer.basis.double()
    assert (V.mT @ V - torch.eye(k)).norm() <= k * torch.finfo(torch.float32).eps
    assert relative_error(V @ (V.mT @ exact.double()), exact) <= 2e-3, "the span is the one that was given"
    nn.init.normal_(layer.A, std=1e4)
    nn.init.normal_(layer.B)
    rectifier = GradientRectifier([layer])
    layer(torch.randn(8, 64)).square().sum().backward()
    rectifier.rectify()
    assert (layer.A.grad @ layer.basis).norm() <= 1e-5 * layer.A.grad.norm()


def test_an_orthonormal_basis_keeps_its_bits() -> None:
    basis = orthonormal(64, 40, torch.float32)
    layer = LoRALinear(nn.Linear(64, 32), 4)
    layer.protect(basis)
    assert torch.equal(layer.basis, basis)


@pytest.mark.parametrize(("before", "after"), [(5, 9), (0, 1), (1, 5), (5, 1), (1, 0)])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_across_protect_is_refused(before: int, after: int, use_buffers: bool) -> None:
    """A copy that goes on with the old basis would project the new factors by it."""
    layer = layer_of(k=before)
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=use_buffers)
    average.update_parameters(layer)
    layer.merge()
    layer.protect(orthonormal(20, after, torch.float32))
    with pytest.raises(TaskBoundaryError, match=r"average \(EMA\) was made before protect\(\).*make a new copy"):
        average.update_parameters(layer)
    torch.optim.swa_utils.AveragedModel(layer, use_buffers=use_buffers).update_parameters(layer)


def test_states_without_a_basis_or_with_more_are_refused() -> None:
    layer = layer_of()
    state = layer.state_dict()
    del state["basis"]
    with pytest.raises(RuntimeError, match='Missing key.*"basis"'):
        layer.load_state_dict(state)
    layer.load_state_dict(state, strict=False)
    assert layer.basis.shape == (20, 5)
    with pytest.raises(RuntimeError, match='Unexpected key.*"stranger"'):
        layer.load_state_dict(layer.state_dict() | {"stranger": torch.zeros(1)})
    model = nn.ModuleDict({"a": layer_of(k=2), "b": layer_of(k=7)})
    twin = nn.ModuleDict({"a": layer_of(k=3), "b": layer_of(k=3)})
    twin.load_state_dict(model.state_dict())
    assert [twin[name].basis.shape[1] for name in "ab"] == [2, 7]


# ------------------------------------------------------------------------------------------------------------ forward A


def test_the_rectifier_takes_the_projection_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(rectify_in="step")
    rectifier = GradientRectifier([layer])
    x = torch.randn(8, 20)
    layer(x).square().sum().backward()
    plain = [p.grad.clone() for p in (layer.A, layer.B)]
    want = [g.clone() for g in plain]
    ops.rectify_([layer.effective_A()], [layer.B], want[:1], want[1:], [layer.basis], rectify=layer.rectification)
    monkeypatch.setattr(LoRALayer, "effective_A", lambda self: pytest.fail("projected once more"))
    rectifier.rectify()
    for got, expected in zip((layer.A.grad, layer.B.grad), want, strict=True):
        assert_close(got, expected, torch.float32)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.load_state_dict(layer_of(k=4).state_dict()),
        lambda layer: (layer.merge(), layer.protect(orthonormal(20, 9, torch.float32))),
        lambda layer: layer.merge(),
        lambda layer: layer.double(),
    ],
    ids=["loaded", "protected", "merged", "moved"],
)
def test_no_projection_outlives_what_it_was_made_from(change) -> None:
    layer = layer_of(rectify_in="step")
    layer(torch.randn(3, 20))
    assert layer._effective is not None
    change(layer)
    assert_close(layer.forward_A(), layer.effective_A(), layer.A.dtype)
    assert (layer.forward_A() @ layer.basis).norm() <= 1e-5


# ------------------------------------------------------------------------------------------------------------- refusals


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.register_forward_hook(lambda *_: None)
    return linear


@pytest.mark.parametrize(
    ("linear", "found"),
    [
        (lambda: nn.Conv2d(3, 3, 1), "got Conv2d"),
        (lambda: "linear", "got str"),
        (lambda: None, "got NoneType"),
        (lambda: LoRALinear(nn.Linear(8, 8), 2), "got LoRALinear"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), "whose weight is computed from other"),
        (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "whose weight is computed from other"),
        (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), "whose weight is computed from other"),
        (lambda: nn.LazyLinear(8), "a LazyLinear that has no weight before its first forward pass"),
        (lambda: Scaled(8, 8), "a Scaled with a forward of its own"),
        (hooked, "a Linear with hooks, which would not be called"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_only_plain_linear_layers_are_wrapped(linear, found: str) -> None:
    for make in (LoRALinear, LoRAQKV):
        with pytest.raises(
            ArgumentError, match=rf"{make.__name__}: linear must be a plain nn.Linear, got .*{found[4:]}"
        ):
            make(linear(), 2)


def test_merge_does_not_lose_an_update_in_a_weight_that_is_computed() -> None:
    layer = layer_of()
    nn.utils.parametrizations.spectral_norm(layer.linear)
    with pytest.raises(ArgumentError, match="LoRALinear.merge: linear must be a plain nn.Linear, .*computed"):
        layer.merge()
    assert layer.B.any()


@pytest.mark.parametrize("rank", ["8", 2.0, None, True, 0, 9])
def test_a_rank_that_is_none_is_refused(rank: object) -> None:
    with pytest.raises(ArgumentError, match=rf"rank must be (an integer, )?from 1 to min\(m, n\) = 8, got {rank!r}"):
        LoRALinear(nn.Linear(8, 8), rank)


@pytest.mark.parametrize("name", ["scale", "damping", "share"])
def test_options_that_are_no_numbers_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"LoRALinear: {name} must be a number, .*, got 'x'"):
        LoRALinear(nn.Linear(8, 8), 2, **{name: "x"})


@pytest.mark.parametrize("targets", [(), 3, ("k", "w"), ("k", "k")])
def test_targets_are_distinct_names(targets: object) -> None:
    with pytest.raises(ArgumentError, match="targets must be"):
        LoRAQKV(nn.Linear(8, 24), 2, targets)


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(ArgumentError, match="inject: model must be an nn.Module, got str"):
        inject("vit_base_patch16_224", rank=8)


def test_who_reads_the_weight_instead_of_calling_the_layer_is_told() -> None:
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = LoRALinear(nn.Linear(8, 8), 2)
    x = torch.randn(3, 1, 8)
    with pytest.raises(AttributeError, match=r"LoRALinear has no weight of its own.*nn.MultiheadAttention"):
        attention(x, x, x)
    assert not hasattr(attention.out_proj, "weight")


# ---------------------------------------------------------------------------------------------------------- derivatives


def margin(x: torch.Tensor) -> torch.Tensor:
    return ops.margin_loss(x, nn.functional.normalize(torch.ones(2, 20), dim=1), 0.0, 4.0)


TRANSFORMS = {
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(f(x))),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: jacfwd(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", ["lora_linear", "lora_qkv", "margin_loss"])
def test_derivatives_that_would_be_zero_are_refused(function: str, transform: str) -> None:
    functions = {
        "lora_linear": layer_of(),
        "lora_qkv": LoRAQKV(nn.Linear(20, 60), 2),
        "margin_loss": margin,
    }
    with pytest.raises(NotImplementedError, match=rf"{function}: differentiable by backward\(\)"):
        TRANSFORMS[transform](functions[function], torch.randn(3, 20))


def test_forward_mode_without_torch_func_is_refused() -> None:
    layer = layer_of()
    with torch.autograd.forward_ad.dual_level():
        layer(torch.randn(3, 20))  # nothing to differentiate
        dual = torch.autograd.forward_ad.make_dual(torch.randn(3, 20), torch.randn(3, 20))
        with pytest.raises(NotImplementedError, match="lora_linear: differentiable by backward"):
            layer(dual)
        A = torch.autograd.forward_ad.make_dual(layer.A, torch.ones_like(layer.A))
        with pytest.raises(NotImplementedError, match="lora_linear: differentiable by backward"):
            functional_call(layer, {"A": A}, (torch.randn(3, 20),))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop() -> None:
    layer = layer_of()
    x = torch.randn(4, 3, 20)
    y = vmap(layer)(x)
    assert_close(y, layer(x), torch.float32)
    want = torch.autograd.grad(layer(x).square().sum(), (layer.A, layer.B))
    for got, expected in zip(torch.autograd.grad(y.square().sum(), (layer.A, layer.B)), want, strict=True):
        assert_close(got, expected, torch.float32, 10)
    assert copy.deepcopy(layer)(x).shape == (4, 3, 24)
