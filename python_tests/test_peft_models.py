"""Models that the installed PEFT has adapted: found by `GradientRectifier` itself, two tasks one after the other.

docs/method.md, property 2.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import assert_close
from language_models import (
    ALL,
    ATTENTION,
    NEW,
    OLD,
    adapted,
    hidden,
    language_model,
    observed,
    peft,
    train,
    transformers,
)
from torch import Tensor, nn

from janus_ext import ArgumentError, GradientRectifier, StatisticsError, TaskBoundaryError, inject
from janus_ext.backbone import load_backbone


# found ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_the_layers_of_the_active_adapter_are_found(options: dict[str, Any]) -> None:
    model = adapted(**options)
    rectifier = GradientRectifier(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert list(rectifier.estimators) == list(layers) and len(layers) == 2 * len(ALL)
    for entry in rectifier._entries:
        layer = layers[entry.name]
        assert entry.A is layer.lora_A["default"].weight and entry.B is layer.lora_B["default"].weight
        assert entry.scale == layer.scaling["default"] == (4.0 if "use_rslora" in options else 2.0)


def test_an_adapter_is_chosen_by_name() -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    assert len(GradientRectifier(model).estimators) == 2 * len(ALL)  # "default" is the active one
    model.set_adapter("second")
    assert len(GradientRectifier(model).estimators) == len(GradientRectifier(model, adapter="second").estimators) == 2
    with pytest.raises(ArgumentError, match=r"adapter must be active .* set_adapter\('default'\)"):
        GradientRectifier(model, adapter="default")
    with pytest.raises(ArgumentError, match="one of the model's, default, second, got 'third'"):
        GradientRectifier(model, adapter="third")
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ArgumentError, match=r"adapters \(default, second\) is rectified: default, second are active"):
        GradientRectifier(model)
    with pytest.raises(ArgumentError, match=r"q_proj: adapter default is active and trained beside second"):
        GradientRectifier(model, adapter="second")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("second" in name)
    assert len(GradientRectifier(model, adapter="second").estimators) == 2
    with pytest.raises(ArgumentError, match="adapter belongs to a PEFT model, got 'second'"):
        GradientRectifier([], adapter="second")
    with pytest.raises(ArgumentError, match="adapter 'second' needs PEFT's layers, and the model has none"):
        GradientRectifier(nn.Linear(3, 3), adapter="second")


def test_layers_without_a_peft_model_around_them() -> None:
    """As transformers and diffusers inject them."""
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), language_model())
    assert list(GradientRectifier(model).estimators) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_own_layers_and_peft_s_in_one_model() -> None:
    own, backbone = load_backbone(weights="none"), load_backbone(weights="none")
    inject(own, 2, rectify_in="step")
    foreign = peft.get_peft_model(backbone, peft.LoraConfig(r=2, target_modules=["qkv"]))
    assert len(GradientRectifier(nn.ModuleList([own, foreign])).estimators) == 12


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed, self.mixing = nn.Conv2d(3, 8, 3), nn.Embedding(9, 8), nn.MultiheadAttention(8, 2)
        self.experts = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["conv"]}, "conv: .* got PEFT's Conv2d: its input is convolved"),
        ({"target_modules": ["embed"]}, "embed: .* got PEFT's Embedding: its inputs are indices"),
        ({"target_modules": ["mixing"]}, "mixing: .* got PEFT's MultiheadAttention: queries, keys and values may"),
        ({"target_modules": [], "target_parameters": ["experts.weight"]}, "experts: .* got PEFT's ParamWrapper: "),
        ({"target_modules": ["experts"], "use_dora": True}, "experts: .* DoRA computes otherwise"),
        ({"target_modules": ["experts"], "bias": "all"}, "experts: the layer's own bias is trained"),
        ({"target_modules": ["experts"], "lora_bias": True}, "experts: B has a bias"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_adapters_of_other_kinds_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    model = peft.get_peft_model(Convolving(), peft.LoraConfig(r=2, **options))
    with pytest.raises(ArgumentError, match=rf"^base_model\.model\.{message}"):
        GradientRectifier(model)


def test_a_model_without_lora_is_refused() -> None:
    for model in (language_model(), peft.get_peft_model(Convolving(), peft.LoHaConfig(target_modules=["experts"]))):
        with pytest.raises(ArgumentError, match="at least one LoRA layer, of this package or of PEFT"):
            GradientRectifier(model)


# one task after another -----------------------------------------------------------------------------------------------
EXACT = {torch.float64: {}, torch.float32: {"estimator": "isvd", "estimator_rank": 48}}  # a float32 Gram matrix rounds
# away what has 1e-7 of the energy: inputs 3e-4 as large as the largest


@pytest.mark.parametrize("how", ["new adapter", "same adapter"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_a_second_task_leaves_protected_outputs_as_they_are(how: str, dtype: torch.dtype) -> None:
    model = adapted(language_model(dtype=dtype))
    rectifier = GradientRectifier(model, energy=1.0, **EXACT[dtype])
    train(model, rectifier, OLD)
    observed(model, rectifier)
    learned = hidden(model, OLD)
    if how == "new adapter":
        model = adapted(model.merge_and_unload(), r=6)
        rectifier.commit(layers=model)
    else:
        model.merge_adapter()
        with torch.no_grad():
            for name, B in model.named_parameters():
                if "lora_B" in name:
                    B.zero_()
        model.unmerge_adapter()
        rectifier.commit()
    before, foreign = hidden(model, OLD), hidden(model, NEW)
    assert_close(before, learned, dtype)
    train(model.train(), rectifier, NEW)
    assert_close(hidden(model, OLD), before, torch.float32, 0.5)  # 1e-5
    assert float((hidden(model, NEW) - foreign).norm() / foreign.norm()) > 0.1, "nothing was learned"
    assert_close(hidden(model.merge_and_unload(), OLD), before, torch.float32, 0.5)


def test_plain_lora_moves_them() -> None:
    """Else the test above would say nothing."""
    model = adapted()
    train(model, None, OLD)
    model = adapted(model.merge_and_unload())
    before = hidden(model, OLD)
    train(model.train(), None, NEW)
    assert float((hidden(model, OLD) - before).norm() / before.norm()) > 0.1


def test_bfloat16_weights_have_float32_adapters_and_a_warning() -> None:
    model = adapted(language_model(dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match=r"q_proj \(and 13 more\): hold W in float32, got bfloat16"):
        rectifier = GradientRectifier(model, energy=1.0)
    assert {entry.A.dtype for entry in rectifier._entries} == {torch.float32}
    train(model, rectifier, OLD, 3)
    observed(model, rectifier)
    with pytest.warns(UserWarning, match="hold W in float32"):
        rectifier.commit(layers=adapted(model.merge_and_unload()))
    half = adapted(language_model(dtype=torch.bfloat16))
    for name, parameter in half.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(ArgumentError, match="A must be float32 or float64, got bfloat16"):
        GradientRectifier(half)


def with_second(model: nn.Module, active: list[str]) -> nn.Module:
    """A new adapter in the same model."""
    model.add_adapter("second", peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(ALL)))
    model.base_model.set_adapter(active)
    return model


def test_the_old_adapter_may_stay_beside_the_new_one() -> None:
    """It is frozen, and its task's outputs do not move."""
    model = adapted(language_model(dtype=torch.float64))
    rectifier = GradientRectifier(model, energy=1.0)
    train(model, rectifier, OLD)
    observed(model, rectifier)
    learned = hidden(model, OLD)
    with_second(model, ["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("second" in name)
    rectifier.commit(layers=model, adapter="second")
    train(model.train(), rectifier, NEW)
    assert_close(hidden(model, OLD), learned, torch.float32)


def test_a_task_that_nobody_rectified_is_said() -> None:
    model = adapted()
    rectifier = GradientRectifier(model, energy=0.9)
    for forgotten in (False, True):
        train(model, None if forgotten else rectifier, OLD, 3)
        observed(model, rectifier)
        model = adapted(model.merge_and_unload())
        with (
            pytest.warns(UserWarning, match="13 more: the update of this task was not kept") if forgotten else nothing()
        ):
            rectifier.commit(layers=model)


@contextmanager
def nothing() -> Iterator[None]:
    """No warning of this package."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor, asked: str = "both") -> Tensor:
        return sum(getattr(self, name)(x + i) for i, name in enumerate(("one", "other")) if asked in ("both", name))


def test_a_layer_without_input_keeps_what_it_protects() -> None:
    model = adapted(Experts(), ["one", "other"])
    rectifier = GradientRectifier(model, energy=0.5)
    with rectifier.observe():
        model(torch.randn(3, 12))
    rectifier.commit()
    before = {name.rpartition(".")[2]: e.basis for name, e in rectifier.estimators.items()}
    with rectifier.observe():
        model(torch.randn(3, 12), "one")
    with pytest.warns(UserWarning, match=r"model\.other: no input was observed since the last commit"):
        rectifier.commit()
    after = {name.rpartition(".")[2]: e.basis for name, e in rectifier.estimators.items()}
    assert torch.equal(after["other"], before["other"]) and after["one"].shape[1] > before["one"].shape[1]
    with pytest.raises(StatisticsError, match="commit needs observed inputs"):
        rectifier.commit()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(12, 12), nn.Linear(12, 12)
        self.other.weight = self.one.weight


def test_weights_that_others_use_are_refused() -> None:
    """A merge would change them, too; one module under two names is no matter."""
    with pytest.raises(
        ArgumentError, match=r"one: its weight must be its own, .*one\.base_layer and .*other share one"
    ):
        GradientRectifier(adapted(Tied(), ["one"]))
    config = transformers.GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own word on it
        tied = adapted(transformers.GPT2LMHeadModel(config), ["lm_head"])
    with pytest.raises(ArgumentError, match="lm_head: its weight must be its own, .*wte.* untie them"):
        GradientRectifier(tied)
    twice = Experts()
    twice.other = twice.one
    GradientRectifier(adapted(twice, ["one"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, r"norm\.bias trained beside the adapter"),
        ({"trainable_token_indices": [1, 2]}, "trained beside the adapter"),
    ],
    ids=["bias", "tokens"],
)
def test_what_is_trained_beside_is_said(options: dict[str, Any], message: str) -> None:
    model = nn.ModuleDict(
        {"embed_tokens": nn.Embedding(9, 8), "map": nn.Linear(8, 8, bias=False), "norm": nn.LayerNorm(8)}
    )
    with pytest.warns(UserWarning, match=message):
        GradientRectifier(adapted(model, ["map"], **options))


def test_a_module_whose_name_ends_like_a_layer_s_is_another_one() -> None:
    """Layers that stand at the top of a model have short names."""
    model = nn.ModuleDict({"map": nn.Linear(8, 8), "bitmap": nn.Linear(8, 8)})
    injected = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["map"]), model)
    injected["bitmap"].bias.requires_grad_()
    with pytest.warns(UserWarning, match=r"^bitmap\.bias trained beside"):
        GradientRectifier(injected)


def test_an_adapter_that_is_not_trained_is_refused() -> None:
    with pytest.raises(ArgumentError, match="adapter default must be trained, .*is_trainable=True"):
        GradientRectifier(adapted(inference_mode=True))


@pytest.mark.parametrize(
    ("successor", "error", "message"),
    [
        (lambda model: model, TaskBoundaryError, "q_proj: commit.. came while B is not zero"),
        (
            lambda model: adapted(model.merge_and_unload(), ATTENTION),
            ArgumentError,
            "gate_proj is missing, and was 96 wide, float32",
        ),
        (
            lambda model: adapted(model.merge_and_unload(), init_lora_weights="pissa"),
            TaskBoundaryError,
            "a new adapter must start from B = 0: make it with init_lora_weights=True",
        ),
        (
            lambda model: adapted(model.merge_and_unload()).double(),
            ArgumentError,
            "q_proj is 96 wide, float64 on cpu, and was 96 wide, float32",
        ),
        (
            lambda model: with_second(model, ["second"]),
            TaskBoundaryError,
            "must be merged, or active beside the new one",
        ),
        (
            lambda model: with_second(model, ["default", "second"]),
            ArgumentError,
            r"adapters \(default, second\) is rectified",
        ),
        (lambda model: [], ArgumentError, "at least one LoRA layer"),
    ],
    ids=["trained", "fewer", "not zero", "other dtype", "dropped", "several", "none"],
)
def test_a_commit_with_layers_that_do_not_follow_changes_nothing(
    successor: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    model = adapted()
    rectifier = GradientRectifier(model)
    train(model, rectifier, OLD, 2)
    observed(model, rectifier)
    entries, state = rectifier._entries, rectifier.state_dict()
    with pytest.raises(error, match=message):
        rectifier.commit(layers=successor(model))
    assert rectifier._entries is entries
    for name, tensors in rectifier.state_dict().items():
        assert all(torch.equal(tensor, state[name][key]) for key, tensor in tensors.items())
