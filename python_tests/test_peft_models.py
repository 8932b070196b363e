"""Models that the installed PEFT has adapted: found by `GradientRectifier` itself, two tasks one after the other.

docs/method.md, property 2.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import assert_close
from torch import Tensor, nn

from janus_ext import ArgumentError, GradientRectifier, TaskBoundaryError, inject
from janus_ext.backbone import load_backbone, prepare_torchvision

prepare_torchvision()
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def language_model(**options: Any) -> nn.Module:
    """A Llama of two layers with random weights; 20 texts of it have 40 positions."""
    torch.manual_seed(0)
    size = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, max_position_embeddings=64, **size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own
        return transformers.LlamaForCausalLM(config).to(**options)


def adapted(model: nn.Module | None = None, targets: Any = ALL, **options: Any) -> nn.Module:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(targets)} | options)
    return peft.get_peft_model(language_model() if model is None else model, config)


def texts(first: int, last: int) -> Tensor:
    return torch.randint(first, last, (2, 12), generator=torch.Generator().manual_seed(first))


OLD, NEW = texts(0, 20), texts(20, 40)


def train(model: nn.Module, rectifier: GradientRectifier | None, ids: Tensor, steps: int = 20) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    if rectifier is not None:
        rectifier.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@torch.no_grad()
def hidden(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1]


def observed(model: nn.Module, rectifier: GradientRectifier, ids: Tensor = OLD) -> None:
    with rectifier.observe():
        hidden(model, ids)


def short(rectifier: GradientRectifier) -> dict[str, str]:
    """Which layer's estimator a layer has, by the ends of their names."""
    return {name.rpartition("model.layers.")[2]: e.name.rpartition(".")[2] for name, e in rectifier.estimators.items()}


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
    assert_close(hidden(model, OLD), before, torch.float32)
    assert float((hidden(model, NEW) - foreign).norm() / foreign.norm()) > 0.1, "nothing was learned"
    assert_close(hidden(model.merge_and_unload(), OLD), before, torch.float32)


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


@pytest.mark.parametrize(
    ("successor", "error", "message"),
    [
        (lambda model: model, TaskBoundaryError, "q_proj: commit.. came while B is not zero"),
        (lambda model: adapted(model.merge_and_unload(), ATTENTION), ArgumentError, "named and as wide as before"),
        (lambda model: adapted(model.merge_and_unload(), init_lora_weights=False), TaskBoundaryError, "B is not zero"),
        (lambda model: [], ArgumentError, "at least one LoRA layer"),
    ],
    ids=["trained", "fewer", "not zero", "none"],
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


# one input, one estimator ---------------------------------------------------------------------------------------------
def test_layers_with_one_input_share_an_estimator() -> None:
    model = adapted()
    rectifier, apart = GradientRectifier(model, energy=0.9), GradientRectifier(model, energy=0.9, share_inputs=False)
    for ids in (OLD, NEW):
        observed(model, rectifier, ids)
        observed(model, apart, ids)
    of_layer = {"self_attn.q_proj": "q_proj", "self_attn.k_proj": "q_proj", "self_attn.v_proj": "q_proj"}
    of_layer |= {"self_attn.o_proj": "o_proj", "mlp.gate_proj": "gate_proj", "mlp.up_proj": "gate_proj"}
    of_layer |= {"mlp.down_proj": "down_proj"}
    assert short(rectifier) == {f"{i}.{name}": leader for i in (0, 1) for name, leader in of_layer.items()}
    assert len({id(e) for e in apart.estimators.values()}) == len(apart.estimators)
    for name, one in rectifier.estimators.items():
        assert torch.equal(one.statistics.gram, apart.estimators[name].statistics.gram)
        assert one.rows == apart.estimators[name].rows == 48
    model = adapted(model.merge_and_unload())
    rectifier.commit(layers=model)
    apart.commit(layers=model)
    for name, one in rectifier.estimators.items():
        assert torch.equal(one.basis, apart.estimators[name].basis) and one.basis.shape[1] > 0


def test_layers_share_from_the_state_of_others_on() -> None:
    """A state that was taken from layers that shared, or did not, loads into those that do not, or do."""
    model = adapted()
    rectifier, other = GradientRectifier(model), GradientRectifier(model)
    observed(model, rectifier)
    observed(model, other, NEW)
    other.load_state_dict(rectifier.state_dict())
    observed(model, rectifier, NEW)
    observed(model, other, NEW)
    for name, one in rectifier.estimators.items():
        assert torch.equal(one.statistics.gram, other.estimators[name].statistics.gram)
    assert len({id(e) for e in other.estimators.values()}) == 14
    rectifier.commit(0.9)
    other.commit(0.9)
    observed(model, other, NEW)
    assert short(other) == short(rectifier)


class Crossing(nn.Module):
    """Attention of one sequence to itself, or to another one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return self.q(x) + self.k(x if other is None else other)


def crossing(**options: Any) -> tuple[nn.Module, GradientRectifier]:
    model = adapted(Crossing(), ["q", "k"])
    return model, GradientRectifier(model, **options)


def test_an_input_that_is_another_one_later_is_refused() -> None:
    model, rectifier = crossing()
    x, other = torch.randn(2, 5, 12)
    with rectifier.observe(), pytest.raises(ArgumentError, match=r"model\.k: its input must be that of .*model\.q"):
        model(x)
        model(x, other)
    model, rectifier = crossing(share_inputs=False)
    with rectifier.observe():
        model(x)
        model(x, other)
    grams = [e.statistics.gram for e in rectifier.estimators.values()]
    assert_close(grams[0], 2 * x.mT @ x, torch.float32)
    assert_close(grams[1], x.mT @ x + other.mT @ other, torch.float32)


@pytest.mark.parametrize("written", [False, True])
def test_inputs_that_are_equal_are_not_the_same(written: bool) -> None:
    """Not even the same tensor, when it was written in between."""
    model, rectifier = crossing()
    x = torch.randn(5, 12)
    k = model.base_model.model.k
    change = k.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),) if written else (args[0].clone(),))
    first = x.clone()
    with rectifier.observe():
        model(x)
    change.remove()
    one, other = rectifier.estimators.values()
    assert one is not other
    assert_close(one.statistics.gram, first.mT @ first, torch.float32)
    assert_close(other.statistics.gram, (4 if written else 1) * first.mT @ first, torch.float32)


@pytest.mark.parametrize("way", ["autocast", "inference", "checkpointing", "compiled"])
def test_sharing_counts_each_input_once(way: str) -> None:
    model, rectifier = crossing()
    x = torch.randn(5, 12)
    with rectifier.observe(), torch.inference_mode() if way == "inference" else nullcontext():
        for _ in range(2):
            if way == "checkpointing":
                torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=False).sum().backward()
            elif way == "compiled":
                torch.compile(model, backend="aot_eager")(x)
            else:
                with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
                    model(x)
    entering = x.detach().bfloat16().float() if way == "autocast" else x.detach()
    for estimator in rectifier.estimators.values():
        assert_close(estimator.statistics.gram, 2 * entering.mT @ entering, torch.float32)
    assert len({id(e) for e in rectifier.estimators.values()}) == (2 if way == "compiled" else 1)
