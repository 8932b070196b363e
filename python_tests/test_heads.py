"""What every head is held to, Decision, and the heads without a file of their own (docs/method.md, property 14)."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from gaussians import expanded, gaussians, known_of, one_hot
from torch import Tensor

from janus_ext.errors import ArgumentError, StatisticsError
from janus_ext.heads import HEADS, aligned
from janus_ext.heads.base import LOWEST, NEVER, Decision
from janus_ext.heads.expansion import Expansion
from janus_ext.heads.knowledge import Knowledge

DIM = 8
COUNTS, SIZES = [12, 9, 20, 7, 15], [2, 3]
FITTED = [*((name, None) for name in HEADS if name != "linear"), ("lda", 30), ("ridge", 30)]


def everything(known: Knowledge) -> dict[str, Tensor]:
    linear = {f"heads.{name}": value.clone() for name, value in known.heads.state_dict().items()}
    return linear | known.state_dict()


def share_right(one: Decision, features: Tensor, labels: Tensor) -> float:
    return float((one.scores(features).argmax(1) == labels).double().mean())


# every head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "width"), [("linear", None), *FITTED], ids=str)
def test_a_fit_changes_nothing_and_comes_out_the_same_again(device: str, name: str, width: int | None) -> None:
    features, labels = (t.to(device) for t in gaussians(COUNTS, DIM))
    known = known_of(features, labels, SIZES, width, name)
    before, random = everything(known), torch.get_rng_state()
    with torch.no_grad():
        first = HEADS[name](known)
    second = HEADS[name](known)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert (first.expansion is None) == (width is None) and first.expansion is second.expansion
    assert first.weight.dtype == first.bias.dtype == torch.float32 and not first.weight.requires_grad
    assert first.weight.device.type == first.bias.device.type == device
    after = everything(known)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert first.scores(features).shape == (len(features), 5) and first.scores(features).isfinite().all()


@pytest.mark.parametrize(("name", "width"), FITTED, ids=str)
def test_classes_never_seen_never_win(name: str, width: int | None) -> None:
    features, labels = gaussians(COUNTS, DIM)
    known = known_of(features, torch.tensor([0, 2, 3, 4, 6])[labels], [3, 4], width, name)
    decision = HEADS[name](known)
    never = [1, 5]
    at = torch.cat([torch.randn(50, DIM) * 10.0**power for power in (-4, 0, 4)])
    p = decision.scores(at).softmax(1)
    assert decision.weight.shape[0] == 7 and (decision.bias[never] == NEVER).all()
    assert not p[:, never].any() and p.isfinite().all()
    if decision.expansion is None:
        scores = F.linear(at, *decision.rows())
        assert scores.isfinite().all() and not torch.isin(scores.argmax(1), torch.tensor(never)).any()


@pytest.mark.parametrize(("name", "width"), FITTED, ids=str)
def test_a_head_classifies_what_is_easy_to_tell_apart(name: str, width: int | None) -> None:
    """One class a task: linear heads know nothing of each other, and their rows are random here."""
    known = known_of(*gaussians([40] * 4, DIM, 2.0), [1] * 4, width, name)
    at, labels = gaussians([50] * 4, DIM, 2.0, seed=1)
    right = [share_right(HEADS[head](known), at, labels) for head in (name, "linear")]
    assert right[0] > 0.8 > 0.6 > right[1]


@pytest.mark.parametrize("name", ["lda", "ncm", "ridge"])
def test_order_and_division_into_tasks_do_not_matter_to_closed_forms(name: str) -> None:
    features, labels = gaussians(COUNTS, DIM)
    at, _ = gaussians([5] * 5, DIM, seed=1)
    joint, apart = known_of(features, labels, [5]), known_of(features.flip(0), labels.flip(0), SIZES)
    assert_close(HEADS[name](apart).scores(at), HEADS[name](joint).scores(at), torch.float32)


@pytest.mark.parametrize("name", ["aligned", "lda", "ridge"])
def test_classes_learned_without_statistics_are_refused(name: str) -> None:
    features, labels = gaussians(COUNTS, DIM)
    known = known_of(features, labels, SIZES)
    old = Knowledge(known.heads, DIM, torch.device("cpu"))
    old.load_state_dict({key: t for key, t in known.state_dict().items() if key.startswith("prototypes.")})
    for one in (old, Knowledge(known.heads, DIM, torch.device("cpu"))):
        with pytest.raises(ArgumentError, match="of all classes"):
            HEADS[name](one)
    at = torch.randn(30, DIM)
    assert torch.equal(HEADS["ncm"](old).scores(at), HEADS["ncm"](known).scores(at))
    assert torch.equal(HEADS["linear"](old).scores(at), HEADS["linear"](known).scores(at))


# decision -------------------------------------------------------------------------------------------------------------


def decision(unit: bool, width: int | None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decision:
    made = None if width is None else (torch.randn(DIM), torch.randn(DIM, DIM), torch.randn(DIM, width))
    expansion = made and Expansion(*(tensor.to(device, dtype) for tensor in made))
    weight = torch.randn(5, DIM + (width or 0)).to(device, dtype)
    return Decision(weight, torch.randn(5).to(device, dtype), unit, expansion)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("unit", "width"), [(False, None), (True, None), (False, 20), (True, 20)])
def test_scores_equal_float64(device: str, unit: bool, width: int | None, dtype: torch.dtype) -> None:
    one = decision(unit, width, device, dtype)
    f = 3 * torch.randn(30, DIM).to(device, dtype)
    x = f.double()
    if unit:
        x = x / x.norm(dim=1, keepdim=True)
    if width:
        x = expanded(one.expansion, x)
    assert_close(one.scores(f), x @ one.weight.double().mT + one.bias.double(), dtype, 5 if width else 1)
    assert one.is_linear == (not unit and width is None)
    assert one.scores(f[:0]).shape == (0, 5)


@pytest.mark.parametrize("name", ["linear", "ncm", "lda", "ridge", "aligned"])
def test_rows_choose_the_same_classes(name: str) -> None:
    features, labels = gaussians(COUNTS, DIM)
    gaps = torch.tensor([0, 2, 3, 4, 6])[labels]
    one = HEADS[name](known_of(features, gaps, [3, 4]))
    at = torch.randn(500, DIM)
    weight, bias = one.rows()
    assert weight.isfinite().all() and bias.isfinite().all() and float(bias.min()) >= LOWEST
    assert torch.equal(F.linear(at, weight, bias).argmax(1), one.scores(at).argmax(1))


def test_rows_of_unit_features_are_cosines_times_the_length() -> None:
    known = known_of(*gaussians(COUNTS, DIM), SIZES)
    at = 5 * torch.randn(40, DIM)
    weight, bias = HEADS["ncm"](known).rows()
    lengths = at.double().norm(dim=1, keepdim=True)
    assert_close(F.linear(at, weight, bias), known.prototypes.cosines(at).double() * lengths, torch.float32)


def test_there_are_no_rows_behind_random_features() -> None:
    with pytest.raises(ArgumentError, match="--head-width makes random features .* there is no linear classifier"):
        decision(False, 20).rows()


def test_made_from_float64_it_is_float32_and_unseen_classes_are_out() -> None:
    weight, bias = torch.randn(3, DIM).double(), torch.randn(3).double()
    one = Decision.of(weight, bias, torch.tensor([True, False, True]), unit=True)
    assert torch.equal(one.weight, weight.float()) and one.unit and one.expansion is None
    assert one.bias.tolist() == [float(bias[0].float()), -math.inf, float(bias[2].float())]


# linear and ncm -------------------------------------------------------------------------------------------------------


def test_linear_heads_stand_side_by_side_as_they_are_now() -> None:
    known = known_of(*gaussians(COUNTS, DIM), SIZES)
    at = torch.randn(20, DIM)
    one = HEADS["linear"](known)
    want = torch.cat([head(at) for head in known.heads], 1).detach()
    assert_close(one.scores(at), want, torch.float32)
    torch.nn.init.zeros_(known.heads[0].weight)  # training goes on
    assert_close(one.scores(at), want, torch.float32)
    assert not HEADS["linear"](known).weight[:2].any()


def test_nearest_class_means_by_cosine() -> None:
    features, labels = gaussians(COUNTS, DIM)
    at = torch.randn(60, DIM)
    means = torch.stack([features[labels == c].double().mean(0) for c in range(5)])
    want = 16 * F.normalize(at.double(), dim=1) @ F.normalize(means, dim=1).mT
    decision = HEADS["ncm"](known_of(features, labels, SIZES))
    for scale in (1, 1e-25, 1e25):  # whose squares are no float32
        assert_close(decision.scores(at * scale), want, torch.float32)


# aligned --------------------------------------------------------------------------------------------------------------
def test_aligned_says_where_rounding_hides_the_covariance() -> None:
    features, labels = gaussians([20, 20], 60)
    with pytest.raises(StatisticsError, match="rounding hides their covariance"):
        aligned.fit(known_of(features + 1e6, labels, [2]))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """What it trains on: (samples, labels) of every step."""
    seen: list[tuple[Tensor, Tensor]] = []

    def linear(samples: Tensor, *parameters: Tensor) -> Tensor:
        seen.append((samples,))
        return F.linear(samples, *parameters)

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        seen[-1] += (labels,)
        return F.cross_entropy(logits, labels)

    monkeypatch.setattr(aligned, "F", SimpleNamespace(linear=linear, cross_entropy=cross_entropy))
    return seen


def test_samples_are_gaussian_around_means_that_age(batches: list[Any]) -> None:
    known = known_of(*gaussians(COUNTS, DIM), SIZES)
    aligned.fit(known)
    assert [len(samples) for samples, _ in batches] == [256] * (5 * 5)
    samples, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    ages = torch.tensor([0.95] * 2 + [1.0] * 3, dtype=torch.float64)  # 0.9 + 0.1 (t + 1) / 2
    means = ages[:, None] * known.statistics.means()
    S = known.statistics.covariance() + 1e-4 * torch.eye(DIM)
    for c in range(5):
        own = samples[labels == c].double()
        assert len(own) == 256 * 5
        off = torch.linalg.solve(torch.linalg.cholesky(S), own.mean(0) - means[c])
        assert off.norm() < 3 * (DIM / len(own)) ** 0.5
    rest = samples.double() - means[labels]
    assert_close(rest.mT @ rest / len(rest), S, torch.float32, 0.05 / 2e-5)
    for epoch in range(5):
        assert torch.cat([y for _, y in batches[5 * epoch : 5 * epoch + 5]]).bincount().tolist() == [256] * 5


def test_samples_of_classes_that_do_not_scatter_keep_a_variance_of_1e_4(batches: list[Any]) -> None:
    known = known_of(*gaussians([1] * 5, DIM), SIZES)
    aligned.fit(known)
    samples, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    rest = samples.double() - (known.ages()[:, None] * known.statistics.means())[labels]
    assert_close(rest.mT @ rest / len(rest), 1e-4 * torch.eye(DIM), torch.float32, 0.1 / 2e-5)


def test_training_is_sgd_with_momentum_and_a_cosine(batches: list[Any]) -> None:
    known = known_of(*gaussians(COUNTS, DIM), SIZES)
    got = aligned.fit(known)
    start = HEADS["linear"](known)
    parameters = torch.cat([start.weight, start.bias[:, None]], 1).double()
    velocity = torch.zeros_like(parameters)
    for step, (samples, labels) in enumerate(batches):
        x = torch.cat([samples.double(), torch.ones(len(samples), 1)], 1)
        slope = ((x @ parameters.mT).softmax(1) - one_hot(labels, 5)).mT @ x / len(x)
        velocity = 0.9 * velocity + slope
        parameters = parameters - 0.01 * (1 + math.cos(math.pi * (step // 5) / 5)) / 2 * velocity
    assert_close(torch.cat([got.weight, got.bias[:, None]], 1), parameters, torch.float32)
    assert (parameters - torch.cat([start.weight, start.bias[:, None]], 1)).norm() > 0.1


def test_another_seed_draws_others() -> None:
    known = known_of(*gaussians(COUNTS, DIM), SIZES)
    one = aligned.fit(known)
    known.seed += 1
    assert not torch.equal(aligned.fit(known).weight, one.weight)


def test_it_beats_heads_that_were_trained_apart() -> None:
    """Two tasks whose heads are right within the task, the first one with logits too low by 5."""
    features, labels = gaussians([60] * 6, DIM, 1.5)
    known = known_of(features, labels, [3, 3])
    rule = HEADS["lda"](known)
    for task, (head, shift) in enumerate(zip(known.heads, (-5.0, 0.0), strict=True)):
        own = slice(3 * task, 3 * task + 3)
        head.weight.data, head.bias.data = 0.3 * rule.weight[own], 0.3 * rule.bias[own] + shift
    at, truth = gaussians([100] * 6, DIM, 1.5, seed=1)
    before, after = (
        float((HEADS[name](known).scores(at).argmax(1) == truth).double().mean()) for name in ("linear", "aligned")
    )
    assert after > before + 0.05
