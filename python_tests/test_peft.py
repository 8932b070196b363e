"""Pairs whose module is a LoRA layer of PEFT: what it computes and trains beside W x + s B A x is refused by name.

docs/method.md, property 2.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_close
from torch import nn

from janus_ext import ArgumentError, GradientRectifier, LoRAPair, TaskBoundaryError
from janus_ext.backbone import prepare_torchvision


class PeftLayer(nn.Module):
    """The attributes by which a LoRA layer of PEFT is known, with one adapter."""

    def __init__(self, dropout: float = 0.0, lora_bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base_layer = nn.Linear(24, 30, dtype=dtype).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(24, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, 30, bias=lora_bias)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout)})
        self.lora_magnitude_vector = nn.ModuleDict()
        self.use_dora, self.lora_variant = {"default": False}, {}
        self.scaling, self.merged_adapters = {"default": 2.0}, []
        nn.init.zeros_(self.lora_B["default"].weight)

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = self.lora_B["default"](self.lora_A["default"](self.lora_dropout["default"](x)))
        return self.base_layer(x) + 2.0 * update


def peft_model(**options: Any) -> nn.Module:
    """Two linear layers, the first with an adapter of the installed PEFT."""
    prepare_torchvision()
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], **options)
    return peft.get_peft_model(nn.Sequential(nn.Linear(24, 30), nn.ReLU()), config)


def real_layer(**options: Any) -> nn.Module:
    return peft_model(**options).base_model.model[0]


def pair(layer: nn.Module, scale: float = 2.0) -> dict[str, LoRAPair]:
    return {"blocks.0": LoRAPair(layer.lora_A["default"].weight, layer.lora_B["default"].weight, scale, layer)}


def changed(layer: nn.Module, change: Callable[[nn.Module], Any]) -> nn.Module:
    change(layer)
    return layer


class MicaVariant:
    """Something that PEFT computes instead of B A x."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: changed(PeftLayer(), lambda m: m.use_dora.update(default=True)),
            "DoRA computes otherwise: .*use_dora",
        ),
        (
            lambda: changed(PeftLayer(), lambda m: m.lora_magnitude_vector.update({"default": nn.Identity()})),
            "DoRA computes otherwise: make it with use_dora=False",
        ),
        (
            lambda: changed(PeftLayer(), lambda m: m.lora_variant.update(default=MicaVariant())),
            "but MicaVariant computes",
        ),
        (lambda: PeftLayer(lora_bias=True), "B has a bias, .*lora_bias=False"),
        (
            lambda: changed(PeftLayer(), lambda m: m.base_layer.bias.requires_grad_()),
            "the layer's own bias is trained, .*bias='none'",
        ),
        (
            lambda: changed(PeftLayer(), lambda m: m.base_layer.weight.requires_grad_()),
            "the layer's own weight is trained",
        ),
        (lambda: changed(PeftLayer(), lambda m: m.scaling.update(default=4.0)), "adapter's scaling, 4, got 2"),
        (lambda: changed(PeftLayer(), lambda m: m.merged_adapters.append("default")), r"merged, .*unmerge_adapter\(\)"),
        (lambda: real_layer(use_dora=True), "DoRA computes otherwise: make it with use_dora=False"),
        (lambda: real_layer(bias="lora_only"), "the layer's own bias is trained, .*bias='none'"),
        (lambda: real_layer(bias="all"), "the layer's own bias is trained, .*bias='none'"),
        (lambda: real_layer(lora_bias=True), "B has a bias, .*lora_bias=False"),
        (lambda: real_layer(use_rslora=True), "adapter's scaling, 3.4641, got 2"),
        (lambda: changed(real_layer(), lambda m: m.merge()), r"merged, .*unmerge_adapter\(\)"),
    ],
    ids=range(14),
)
def test_adapters_that_protection_does_not_hold_for_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    layer = make()
    with pytest.raises(ArgumentError, match=f"^blocks.0: .*{message}"):
        GradientRectifier(pair(layer))


def test_another_adapter_of_the_layer_is_no_matter() -> None:
    layer = PeftLayer()
    layer.use_dora["other"], layer.scaling["other"] = True, 7.0
    GradientRectifier(pair(layer))


def train(layer: nn.Module, steps: int = 5) -> None:
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    optimizer = torch.optim.Adam(factors, lr=1e-2)
    rectifier = GradientRectifier(pair(layer))
    old = torch.randn(100, 5) @ torch.randn(5, 24)
    layer.eval()
    with rectifier.observe():
        before = layer(old).detach()
    rectifier.commit(1.0)
    rectifier.attach(optimizer)
    layer.train()
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(50, 24)).exp().mean().backward()
        optimizer.step()
    layer.eval()
    assert layer.lora_B["default"].weight.any()
    assert_close(layer(old), before, torch.float32)


@pytest.mark.parametrize("make", [PeftLayer, real_layer], ids=["fake", "peft"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_plain_lora_keeps_old_outputs_with_dropout_too(make: Callable[..., nn.Module], dropout: float) -> None:
    """Dropout of x is in the update's gradient alone: what is computed in the end is W x + s B A x, and A V = 0."""
    train(make(**{"dropout" if make is PeftLayer else "lora_dropout": dropout}))


def test_a_task_ends_with_peft_s_own_merge() -> None:
    model = peft_model()
    layer = model.base_model.model[0]
    rectifier = GradientRectifier(pair(layer))
    B = layer.lora_B["default"].weight
    x = torch.randn(40, 24)
    nn.init.normal_(B)
    with rectifier.observe():
        want = layer(x).detach()
    with pytest.raises(TaskBoundaryError, match="commit.. came while B is not zero: merge the factors first"):
        rectifier.commit()
    model.merge_adapter()
    with pytest.raises(TaskBoundaryError, match=r"merge_adapter\(\) keeps the factors: zero every B .*unmerge_adapter"):
        rectifier.commit()
    nn.init.zeros_(B)
    with pytest.raises(TaskBoundaryError, match=r"while PEFT's adapter is merged: call unmerge_adapter\(\) first"):
        rectifier.commit()
    model.unmerge_adapter()
    rectifier.commit()
    assert_close(layer(x), want, torch.float32)
    assert_close(layer.base_layer(x), want, torch.float32)


@pytest.mark.parametrize("make", [PeftLayer, lambda dtype: nn.Linear(24, 30, dtype=dtype)], ids=["PEFT", "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_in_half_precision_are_one_warning(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    modules = {f"blocks.{i}": make(dtype=dtype) for i in range(3)}
    pairs = {name: (torch.zeros(3, 24), torch.zeros(30, 3), 1.0, module) for name, module in modules.items()}
    with pytest.warns(
        UserWarning, match=rf"^blocks\.0 \(and 2 more\): hold W in float32, got {str(dtype)[6:]}; .*rounded"
    ) as seen:
        GradientRectifier(pairs)
    assert len(seen) == 1 and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradientRectifier({"blocks.0": (torch.zeros(3, 24), torch.zeros(30, 3), 1.0, make(dtype=torch.float32))})
