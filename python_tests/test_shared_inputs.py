"""Layers with one input share an estimator: which do, that each input counts once, and what ends it."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import assert_close
from language_models import NEW, OLD, adapted, observed
from torch import Tensor, nn

from janus_ext import ArgumentError, GradientRectifier, LoRAPair


def short(rectifier: GradientRectifier) -> dict[str, str]:
    """Which layer's estimator a layer has, by the ends of their names."""
    return {name.rpartition("model.layers.")[2]: e.name.rpartition(".")[2] for name, e in rectifier.estimators.items()}


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


@pytest.mark.parametrize("when", ["between tasks", "within a task"])
@pytest.mark.parametrize("share_inputs", [True, False])
def test_a_loaded_rectifier_goes_on_with_the_same_bits(share_inputs: bool, when: str) -> None:
    """Layers on equal bases are rectified together, also behind `load_state_dict`, which knows of no sharing."""
    layers = [nn.Linear(64, 64) for _ in range(3)]

    def factors() -> dict[str, tuple[Any, ...]]:
        random = torch.Generator().manual_seed(3)
        return {
            f"{i}": (torch.randn(3, 64, generator=random), torch.zeros(64, 3), 1.0, layer)
            for i, layer in enumerate(layers)
        }

    def observe(rectifier: GradientRectifier) -> None:
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(5)) * torch.logspace(0, -2, 64)
        with rectifier.observe():
            for layer in layers:
                layer(x)

    def rectified(rectifier: GradientRectifier, pairs: dict[str, tuple[Any, ...]]) -> list[Tensor]:
        random = torch.Generator().manual_seed(4)
        for A, B, *_ in pairs.values():
            A.grad, B.grad = (torch.randn(M.shape, generator=random) for M in (A, B))
        rectifier.rectify()
        return [M.grad for A, B, *_ in pairs.values() for M in (A, B)]

    first, second = factors(), factors()
    rectifier, other = (GradientRectifier(pairs, energy=0.9, share_inputs=share_inputs) for pairs in (first, second))
    observe(rectifier)
    if when == "between tasks":
        rectifier.commit()
    for before, after in zip(first.values(), second.values(), strict=True):
        after[0].copy_(before[0])
    other.load_state_dict(rectifier.state_dict())
    if when == "within a task":
        rectifier.commit()
        other.commit()
    assert 10 < other.estimators["0"].basis.shape[1] < 40
    assert len({e.basis.data_ptr() for e in other.estimators.values()}) == 1
    for got, want in zip(rectified(other, second), rectified(rectifier, first), strict=True):
        assert torch.equal(got, want)


def test_bases_of_other_dtypes_are_not_held_as_one() -> None:
    pairs = {
        str(dtype): (torch.randn(3, 64, dtype=dtype), torch.zeros(64, 3, dtype=dtype), 1.0, nn.Linear(64, 64))
        for dtype in (torch.float32, torch.float64)
    }
    rectifier = GradientRectifier(pairs)
    rectifier.load_state_dict(rectifier.state_dict())
    for A, B, *_ in pairs.values():
        A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
    before = {name: estimator.basis.dtype for name, estimator in rectifier.estimators.items()}
    assert len({id(e.basis) for e in rectifier.estimators.values()}) == 2, before
    rectifier.rectify()


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


def grams_of(rectifier: GradientRectifier) -> list[Tensor]:
    return [estimator.statistics.gram for estimator in rectifier.estimators.values()]


def test_what_a_layer_saw_alone_is_not_given_to_another() -> None:
    """The first was at work before; the second begins with an input that both get."""
    model, rectifier = crossing()
    x, later = torch.randn(2, 5, 12)
    with rectifier.observe():
        model.base_model.model.q(x)
        model(later)
    q, k = grams_of(rectifier)
    assert_close(q, x.mT @ x + later.mT @ later, torch.float32)
    assert_close(k, later.mT @ later, torch.float32)


@pytest.mark.parametrize("again", [False, True])
def test_what_a_layer_saw_before_is_not_lost(again: bool) -> None:
    """It had another input at first, in this `observe` or an earlier one of the task."""
    model, rectifier = crossing()
    x, other = torch.randn(2, 5, 12)
    with rectifier.observe():
        model(x, other)
        if not again:
            model(x)
    if again:
        with rectifier.observe():
            model(x)
    q, k = grams_of(rectifier)
    assert_close(q, 2 * x.mT @ x, torch.float32)
    assert_close(k, x.mT @ x + other.mT @ other, torch.float32)


def test_layers_that_protect_other_subspaces_do_not_share() -> None:
    model, rectifier = crossing(energy=0.9)
    x, other = torch.randn(2, 3, 12)
    with rectifier.observe():
        model(x, other)
    rectifier.commit()
    before = [e.basis for e in rectifier.estimators.values()]
    with rectifier.observe():
        model(x)
    rectifier.commit()
    q, k = (e.basis for e in rectifier.estimators.values())
    for basis, old in zip((q, k), before, strict=True):
        assert torch.equal(basis[:, : old.shape[1]], old)
    assert q.shape[1] < k.shape[1], "k has to protect what both had"


@pytest.mark.parametrize("way", ["autocast", "inference", "all of it inference", "checkpointing", "compiled"])
def test_sharing_counts_each_input_once(way: str) -> None:
    model, rectifier = crossing()
    with torch.inference_mode(way == "all of it inference"):
        x = torch.randn(5, 12)
    with rectifier.observe(), torch.inference_mode() if "inference" in way else nullcontext():
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


def written_between() -> tuple[nn.Linear, nn.Linear, GradientRectifier]:
    q, k = nn.Linear(6, 2), nn.Linear(6, 2)
    pairs = {n: LoRAPair(torch.zeros(2, 6), torch.zeros(2, 2), 1.0, m) for n, m in (("q", q), ("k", k))}
    return q, k, GradientRectifier(pairs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_shared_input_that_is_written_into_in_a_later_pass_is_refused(mode: Any) -> None:
    q, k, rectifier = written_between()
    with rectifier.observe(), mode():
        for x in torch.randn(2, 5, 6):
            q(x)
            k(x)
        x = torch.randn(5, 6) + 0
        q(x)
        with pytest.raises(ArgumentError, match="k: its input must be that of q"):
            k(x.mul_(2))


def test_what_is_written_into_between_two_layers_is_no_shared_input() -> None:
    """Inference tensors count no versions."""
    q, k, rectifier = written_between()
    with rectifier.observe(), torch.inference_mode():
        x = torch.randn(5, 6) + 0
        first = x.clone()
        q(x)
        k(x.mul_(2))
    for name, entering in (("q", first), ("k", 2 * first)):
        assert_close(rectifier.estimators[name].statistics.gram, entering.mT @ entering, torch.float32)


def test_an_input_by_name_is_found_behind_other_arguments() -> None:
    model, rectifier = crossing()
    x = torch.randn(5, 12)
    with rectifier.observe():
        model.base_model.model.q(adapter_names=None, x=x)
    assert_close(next(iter(rectifier.estimators.values())).statistics.gram, x.mT @ x, torch.float32)
