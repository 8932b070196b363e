"""Rectification: options that are checked once, and mean the same one by one and together."""

import dataclasses

import pytest
import torch
from conftest import orthonormal
from torch import nn

from janus_ext import ArgumentError, GradientRectifier, LoRALinear, LoRAQKV, Rectification, inject, ops

HOW = Rectification("tangent", damping=0.05, share=0.25, balance=True)
ONE_BY_ONE = {"rectify": "tangent", "damping": 0.05, "share": 0.25, "balance": True}


def gradients(op: str, **options: object) -> list[torch.Tensor]:
    """Rectified gradients of A and B from `ops.<op>`, the same inputs at every call."""
    torch.manual_seed(0)
    g = () if op == "lora_linear" else (2,)
    A, B = torch.randn(*g, 3, 20, requires_grad=True), torch.randn(*g, 24, 3, requires_grad=True)
    weight = torch.randn(24 if op == "lora_linear" else 72, 20)
    V = orthonormal(20, 4, torch.float32)
    getattr(ops, op)(torch.randn(7, 20), weight, None, A, B, V, 0.7, **options).square().sum().backward()
    return [A.grad, B.grad]


@pytest.mark.parametrize("op", ["lora_linear", "lora_qkv"])
def test_an_op_takes_it_whole_or_one_by_one(op: str) -> None:
    whole, apart, others = gradients(op, rectify=HOW), gradients(op, **ONE_BY_ONE), gradients(op, rectify="tangent")
    for a, b, c in zip(whole, apart, others, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_rectify_takes_it_whole_or_one_by_one() -> None:
    A, B, gA, gB = torch.randn(3, 20), torch.randn(24, 3), torch.randn(3, 20), torch.randn(24, 3)
    made = []
    for options in ({"rectify": HOW}, ONE_BY_ONE, {"rectify": "tangent"}):
        grads = gA.clone(), gB.clone()
        ops.rectify_([A], [B], [grads[0]], [grads[1]], [None], **options)
        made.append(torch.cat([g.flatten() for g in grads]))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_layers_and_rectifier_take_it_whole_or_one_by_one() -> None:
    for options in ({"rectify": HOW}, ONE_BY_ONE):
        assert LoRALinear(nn.Linear(8, 8), 2, **options).rectification == HOW
        assert LoRAQKV(nn.Linear(8, 24), 2, **options).rectification == HOW
        pairs = GradientRectifier([(torch.zeros(2, 8), torch.zeros(8, 2))], **options)
        assert [entry.rectification for entry in pairs._entries] == [HOW]


def test_a_name_stands_for_the_defaults_with_balance_in_layers_and_without_in_ops() -> None:
    assert LoRALinear(nn.Linear(8, 8), 2).rectification == Rectification()
    assert Rectification().values == ("exact", ops.DAMPING, ops.SHARE, True)
    plain = Rectification(balance=False)
    for a, b in zip(gradients("lora_linear"), gradients("lora_linear", rectify=plain), strict=True):
        assert torch.equal(a, b)


def test_it_is_settled_when_it_is_made() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HOW.damping = 1.0
    assert len({HOW, dataclasses.replace(HOW), Rectification("tangent")}) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rectify": "all"}, "rectify must be one of none, project, tangent, exact, got 'all'"),
        ({"rectify": None}, "rectify must be one of none, project, tangent, exact, got None"),
        ({"damping": 0.0}, "damping must be positive and finite, got 0"),
        ({"damping": float("nan")}, "damping must be positive and finite, got nan"),
        ({"damping": True}, "damping must be a number, positive and finite, got True"),
        ({"share": 1.5}, r"share must be in \[0, 1\], got 1.5"),
        ({"share": "half"}, r"share must be a number, in \[0, 1\], got 'half'"),
        ({"balance": 1}, "balance must be True or False, got 1"),
    ],
)
def test_a_value_outside_is_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^Rectification: {message}$"):
        Rectification(**values)
    with pytest.raises(ArgumentError, match=f"^LoRALinear: {message}$"):
        LoRALinear(nn.Linear(8, 8), 2, **values)


@pytest.mark.parametrize(
    ("who", "call"),
    [
        ("lora_linear", lambda **options: gradients("lora_linear", **options)),
        ("lora_qkv", lambda **options: gradients("lora_qkv", **options)),
        ("rectify_", lambda **options: ops.rectify_([], [], [], [], [], **options)),
        ("LoRALinear", lambda **options: LoRALinear(nn.Linear(8, 8), 2, **options)),
        ("LoRAQKV", lambda **options: LoRAQKV(nn.Linear(8, 24), 2, **options)),
        ("GradientRectifier", lambda **options: GradientRectifier([], **options)),
        ("inject", lambda **options: inject(nn.Linear(8, 24), 2, **options)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_that_is_none_or_that_is_given_twice_is_named(who: str, call) -> None:
    with pytest.raises(TypeError, match=f"^{who}: options must be of damping, share, balance, got dampening$"):
        call(dampening=0.1)
    with pytest.raises(ArgumentError, match=f"^{who}: damping must be given in the Rectification, got both$"):
        call(rectify=HOW, damping=0.1)


def test_a_compiled_function_may_make_one() -> None:
    x, weight, A, B = torch.randn(5, 20), torch.randn(24, 20), torch.randn(3, 20), torch.randn(24, 3)
    made = []
    for compiled in (False, True):
        a = A.clone().requires_grad_()

        def step(a: torch.Tensor) -> torch.Tensor:
            return ops.lora_linear(x, weight, None, a, B, rectify=Rectification("tangent", damping=0.2)).square().sum()

        (torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step)(a).backward()
        made.append(a.grad)
    torch.testing.assert_close(*made)
