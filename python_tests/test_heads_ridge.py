"""ridge: strength by generalised cross-validation, against float64 on the images (docs/method.md, property 14)."""

import math
from typing import NamedTuple

import pytest
import torch
from conftest import assert_close, orthonormal
from gaussians import expanded, gaussians, known_of, one_hot
from torch import Tensor

from janus_ext.heads import ridge
from janus_ext.heads.knowledge import Knowledge

COUNTS = [20, 35, 50, 24]
DIM = 10


class Plain(NamedTuple):
    """A regression of the images themselves."""

    penalty: float
    W: Tensor
    score: float
    variance: float


def regressions(X: Tensor, Y: Tensor, spent: int = 0) -> list[Plain]:
    """For every lambda of the grid: solved directly, and judged by the hat matrix [N, N]."""
    G, identity = X.mT @ X, torch.eye(X.shape[1], dtype=X.dtype)
    found = []
    for strength in torch.logspace(-5, 2, 20, dtype=torch.float64).tolist():
        penalty = strength * float(G.trace()) / min(G.shape[0], len(X))
        W = torch.linalg.solve(G + penalty * identity, X.mT @ Y)
        freedom = float(torch.linalg.solve(G + penalty * identity, G).trace())  # the trace of the hat matrix
        rss, left = float((Y - X @ W).square().sum()), len(X) - spent - freedom
        found.append(Plain(penalty, W, rss / left**2, rss / left / Y.shape[1]))
    return found


def best(X: Tensor, Y: Tensor, spent: int = 0) -> Plain:
    return min(regressions(X, Y, spent), key=lambda plain: plain.score)


def solved(X: Tensor, Y: Tensor, spent: int = 0) -> ridge.Ridge:
    """The same, from second moments alone."""
    return ridge.ridge(X.mT @ X, X.mT @ Y, float(Y.square().sum()), len(X), spent)


def plain(known: Knowledge, features: Tensor, labels: Tensor, at: Tensor) -> Tensor:
    """Scores y / v of centred targets regressed on centred features; v of the C - 1 directions that targets have."""
    X, Y = expanded(known.expansion, features), one_hot(labels, known.classes)
    found = best(X - X.mean(0), Y - Y.mean(0), spent=1)
    v = found.variance * Y.shape[1] / (Y.shape[1] - 1)
    return ((expanded(known.expansion, at) - X.mean(0)) @ found.W + Y.mean(0)) / v


def probabilities(features: Tensor, labels: Tensor, at: Tensor, width: int | None = None) -> Tensor:
    return ridge.fit(known_of(features, labels, [int(labels.max()) + 1], width)).scores(at).softmax(1)


# the regression -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "dim", "targets"), [(60, 9, 3), (40, 40, 5), (25, 60, 2), (30, 1, 1)], ids=str)
@pytest.mark.parametrize("spent", [0, 1])
def test_solution_strength_and_variance_equal_a_direct_solve(rows: int, dim: int, targets: int, spent: int) -> None:
    X = torch.randn(rows, dim, dtype=torch.float64) * torch.logspace(0, -2, dim, dtype=torch.float64)
    Y = X @ torch.randn(dim, targets, dtype=torch.float64) + 0.5 * torch.randn(rows, targets, dtype=torch.float64)
    if spent:
        X, Y = X - X.mean(0), Y - Y.mean(0)
    want, got = best(X, Y, spent), solved(X, Y, spent)
    assert got.penalty == pytest.approx(want.penalty, rel=1e-10)
    assert got.score == pytest.approx(want.score, rel=1e-6) and got.variance == pytest.approx(want.variance, rel=1e-6)
    assert_close(got.W, want.W, torch.float64, 1e3)


def left_out(X: Tensor, Y: Tensor, penalty: float) -> float:
    """Sum of squared errors of each row by the regression of all others: N fits."""
    total = 0.0
    for i in range(len(X)):
        x, y = (torch.cat([part[:i], part[i + 1 :]]) for part in (X, Y))
        W = torch.linalg.solve(x.mT @ x + penalty * torch.eye(X.shape[1], dtype=X.dtype), x.mT @ y)
        total += float((Y[i] - X[i] @ W).square().sum())
    return total


def test_the_score_is_leave_one_out_where_all_rows_weigh_the_same() -> None:
    """Columns of a Hadamard matrix have rows of one leverage: there GCV is no approximation."""
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    X = H[:, :6] * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    Y = X @ torch.randn(6, 3, dtype=torch.float64) + torch.randn(16, 3, dtype=torch.float64)
    got = solved(X, Y)
    assert got.score * len(X) ** 2 == pytest.approx(left_out(X, Y, got.penalty), rel=1e-9)
    assert left_out(X, Y, got.penalty) == pytest.approx(min(left_out(X, Y, p.penalty) for p in regressions(X, Y)))


@pytest.mark.parametrize(("rows", "dim"), [(40, 6), (30, 30), (20, 50)])
@pytest.mark.parametrize("noise", [0.1, 1.0, 5.0])
def test_the_strength_is_about_the_best_by_brute_force_leave_one_out(rows: int, dim: int, noise: float) -> None:
    X = torch.randn(rows, dim, dtype=torch.float64) * torch.logspace(0, -1, dim, dtype=torch.float64)
    Y = X @ torch.randn(dim, 3, dtype=torch.float64) + noise * torch.randn(rows, 3, dtype=torch.float64)
    errors = {p.penalty: left_out(X, Y, p.penalty) for p in regressions(X, Y)}
    assert left_out(X, Y, solved(X, Y).penalty) <= 1.05 * min(errors.values()) < max(errors.values())


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_scale_of_features_does_not_matter(scale: float) -> None:
    X, Y = torch.randn(40, 8, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    got, want = solved(scale * X, Y), solved(X, Y)
    assert_close(scale * got.W, want.W, torch.float64, 10)
    assert got.variance == pytest.approx(want.variance)


def test_features_that_do_not_vary_explain_nothing() -> None:
    got = solved(torch.zeros(9, 4, dtype=torch.float64), torch.ones(9, 2, dtype=torch.float64))
    assert not got.W.any() and got.penalty == 1.0
    assert got.variance == pytest.approx(1.0) and got.score == pytest.approx(18 / 81)


# the head -------------------------------------------------------------------------------------------------------------

SHAPES = [(COUNTS, DIM), ([30, 12], 3), ([4, 5, 4], 30), ([7, 9, 8], 1)]


@pytest.mark.parametrize("width", [None, 25, 200])
@pytest.mark.parametrize(("counts", "dim"), SHAPES, ids=str)
def test_scores_equal_float64(counts: list[int], dim: int, width: int | None) -> None:
    features, labels = gaussians(counts, dim, 0.5)
    at, _ = gaussians([5] * len(counts), dim, 0.5, seed=1)
    known = known_of(features, labels, [len(counts)], width)
    assert_close(ridge.fit(known).scores(at), plain(known, features, labels, at), torch.float32, 10)


def test_the_mean_of_the_targets_is_not_penalised() -> None:
    """As with a column of ones whose weight is free: the augmented system says the same."""
    features, labels = gaussians(COUNTS, DIM, 0.5)
    known, X, Y = known_of(features, labels, [4]), features.double(), one_hot(labels, 4)
    found = best(X - X.mean(0), Y - Y.mean(0), spent=1)
    ones = torch.cat([X, X.new_ones(len(X), 1)], 1)
    penalties = torch.diag(X.new_tensor([found.penalty] * DIM + [0.0]))
    W = torch.linalg.solve(ones.mT @ ones + penalties, ones.mT @ Y) / (found.variance * 4 / 3)
    decision = ridge.fit(known)
    assert_close(torch.cat([decision.weight, decision.bias[:, None]], 1), W.mT, torch.float32)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rotations_scales_and_shifts_change_nothing(scale: float) -> None:
    features, labels = gaussians(COUNTS, DIM, 0.5)
    at, _ = gaussians([5] * 4, DIM, 0.5, seed=1)
    rotation, shift = orthonormal(DIM, DIM), torch.randn(DIM, dtype=torch.float64)
    moved, moved_at = ((scale * (f.double() @ rotation + shift)).float() for f in (features, at))
    assert_close(probabilities(moved, labels, moved_at), probabilities(features, labels, at), torch.float32, 10)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_scales_and_shifts_change_nothing_with_random_features(scale: float) -> None:
    features, labels = gaussians(COUNTS, DIM, 0.5)
    at, _ = gaussians([5] * 4, DIM, 0.5, seed=1)
    shift = scale * torch.randn(DIM)
    got = probabilities(scale * features + shift, labels, scale * at + shift, 50)
    assert_close(got, probabilities(features, labels, at, 50), torch.float32, 50)


@pytest.mark.parametrize(("width", "off"), [(None, 0.02), (300, 0.1)])
@pytest.mark.parametrize("classes", [2, 5])
def test_probabilities_are_about_as_often_right_as_they_say(classes: int, width: int | None, off: float) -> None:
    """Those of the regression itself, whose targets lie within 0 .. 1, are far too low."""
    known = known_of(*gaussians([200] * classes, DIM, 0.35), [classes], width)
    at, labels = gaussians([1000] * classes, DIM, 0.35, seed=1)
    scores = ridge.fit(known).scores(at)
    sure, chosen = scores.softmax(1).max(1)
    right = float((chosen == labels).double().mean())
    v = 1 / float(scores[0].double().sum())  # targets, and so what is regressed on them, add up to 1
    regressed = float((v * scores).softmax(1).amax(1).mean())
    assert abs(float(sure.mean()) - right) < off < 0.2 < right - regressed


@pytest.mark.parametrize("width", [None, 40])
@pytest.mark.parametrize("counts", [[1] * 12, [2, 1], [1], [6]], ids=str)
def test_few_images_give_numbers(counts: list[int], width: int | None) -> None:
    features, labels = gaussians(counts, 20)
    got = probabilities(features, labels, features, width)
    assert torch.isfinite(got).all() and torch.equal(got.argmax(1), labels)


@pytest.mark.parametrize("width", [None, 40])
def test_duplicate_images_weigh_as_often_as_they_come(width: int | None) -> None:
    features, labels = gaussians([6] * 5, DIM, 0.5)
    features, labels = features.repeat(3, 1), labels.repeat(3)
    at, _ = gaussians([5] * 5, DIM, 0.5, seed=1)
    known = known_of(features, labels, [5], width)
    assert_close(ridge.fit(known).scores(at), plain(known, features, labels, at), torch.float32, 10)


@pytest.mark.parametrize("width", [None, 16])
@pytest.mark.parametrize("value", [0.0, 3.3])
def test_features_that_are_all_the_same_leave_the_shares_of_the_classes(value: float, width: int | None) -> None:
    labels = torch.tensor([0] * 12 + [1] * 6 + [2] * 2)
    decision = ridge.fit(known_of(torch.full((20, 8), value), labels, [3], width))
    scores = decision.scores(torch.full((4, 8), value)).double()
    share = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    assert_close(scores / scores.sum(1, keepdim=True), share.expand(4, 3), torch.float32)


@pytest.mark.parametrize("width", [None, 30])
def test_a_class_without_images_changes_nothing_for_the_others(width: int | None) -> None:
    features, labels = gaussians(COUNTS, DIM, 0.5)
    at, _ = gaussians([5] * 4, DIM, 0.5, seed=1)
    gaps = torch.tensor([0, 2, 3, 5])
    got = ridge.fit(known_of(features, gaps[labels], [6], width)).scores(at)
    want = ridge.fit(known_of(features, labels, [4], width)).scores(at)
    assert_close(got[:, gaps], want, torch.float32, 10)
    assert (got[:, [1, 4]] == -math.inf).all()
