"""lda: discriminant analysis with OAS shrinkage, against scikit-learn and float64 (docs/method.md, property 14)."""

import math

import pytest
import torch
from conftest import assert_close, orthonormal, relative_error
from gaussians import expanded, gaussians, known_of
from torch import Tensor

from janus_ext.errors import StatisticsError
from janus_ext.heads import lda
from janus_ext.heads.base import Decision
from janus_ext.heads.knowledge import Knowledge
from janus_ext.heads.statistics import factor_of, shrunk

COUNTS = [20, 35, 50, 24]
DIM = 10


def oas(S: Tensor, rows: int) -> Tensor:
    """Equation 23 of Chen, Wiesel, Eldar & Hero, 2010, as they write it: with traces."""
    d = len(S)
    square, trace = (S @ S).trace(), S.trace()
    rho = (square / d**2 + (trace / d) ** 2) / ((rows + 1) * (square - trace**2 / d) / d**2)
    rho = min(1.0, float(rho)) if math.isfinite(rho) else 1.0
    return (1 - rho) * S + rho * trace / d * torch.eye(d, dtype=S.dtype)


def scores(features: Tensor, labels: Tensor, at: Tensor) -> Tensor:
    """Of one task with all classes."""
    return lda.fit(known_of(features, labels, [int(labels.max()) + 1])).scores(at)


def wide(features: Tensor, labels: Tensor, width: int) -> Knowledge:
    """The same with random features."""
    return known_of(features, labels, [int(labels.max()) + 1], width, "lda")


def level(scores: Tensor) -> Tensor:
    """Without what all classes share, which decides nothing: columns of `scores` [b, C] less their mean."""
    return scores - scores.mean(1, keepdim=True)


def plain(features: Tensor, labels: Tensor, at: Tensor) -> Tensor:
    """mu^T S^-1 f - mu^T S^-1 mu / 2 from the features themselves, float64."""
    f, classes = features.double(), int(labels.max()) + 1
    means = torch.stack([f[labels == c].mean(0) for c in range(classes)])
    rest = f - means[labels]
    S = oas(rest.mT @ rest / (len(f) - classes), len(f))
    inverse = torch.linalg.inv(S)
    return at.double() @ inverse @ means.mT - (means @ inverse * means).sum(1) / 2


SHAPES = [(COUNTS, DIM), ([9, 5], 3), ([4, 4, 4], 30), ([2, 1, 1, 1, 1], 8), ([1, 5], 1), ([6], 4), ([3] * 50, 96)]


@pytest.mark.parametrize(("counts", "dim"), SHAPES, ids=str)
def test_scores_equal_float64(counts: list[int], dim: int) -> None:
    features, labels = gaussians(counts, dim)
    at, _ = gaussians([5] * len(counts), dim, seed=1)
    assert_close(level(scores(features, labels, at)), level(plain(features, labels, at)), torch.float32, 5)


@pytest.mark.parametrize("width", [25, 200])
@pytest.mark.parametrize(("counts", "dim"), [(COUNTS, DIM), ([9, 5], 3), ([4, 4, 4], 30), ([3] * 50, 96)], ids=str)
def test_scores_with_random_features_equal_float64(counts: list[int], dim: int, width: int) -> None:
    features, labels = gaussians(counts, dim)
    at, _ = gaussians([5] * len(counts), dim, seed=1)
    known = wide(features, labels, width)
    want = plain(expanded(known.expansion, features), labels, expanded(known.expansion, at))
    assert_close(level(lda.fit(known).scores(at)), level(want), torch.float32, 20)


def test_random_features_tell_apart_what_no_line_does() -> None:
    """A ring around a blob: their means are one."""
    angle = 2 * torch.pi * torch.rand(400, generator=torch.Generator().manual_seed(3))
    ring, blob = 3 * torch.stack([angle.cos(), angle.sin()], 1), torch.randn(400, 2) / 3
    features, labels = torch.cat([ring, blob]), torch.arange(2).repeat_interleave(400)
    right = [
        float((one.scores(features).argmax(1) == labels).double().mean())
        for one in (lda.fit(known_of(features, labels, [2])), lda.fit(wide(features, labels, 300)))
    ]
    assert right[0] < 0.7 < 0.97 < right[1]


@pytest.mark.parametrize(
    ("counts", "dim"), [shape for shape in SHAPES if len(shape[0]) > 2 and min(shape[0]) > 1], ids=str
)
def test_scikit_learn_finds_the_same_rule(counts: list[int], dim: int) -> None:
    """Its covariance is divided by N instead of N - C, and it adds the logarithms of the priors."""
    analysis = pytest.importorskip("sklearn.discriminant_analysis")
    covariance = pytest.importorskip("sklearn.covariance")
    features, labels = gaussians(counts, dim)
    decision = lda.fit(known_of(features, labels, [len(counts)]))
    x, y = features.double().numpy(), labels.numpy()
    means = torch.stack([features[labels == c].double().mean(0) for c in range(len(counts))])
    _, rho = covariance.oas((features.double() - means[labels]).numpy(), assume_centered=True)
    model = analysis.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=rho).fit(x, y)
    share = 1 - len(counts) / len(labels)
    assert_close(level(decision.weight.mT), level(torch.from_numpy(share * model.coef_).mT), torch.float32)
    at, _ = gaussians([5] * len(counts), dim, seed=1)
    bias = torch.from_numpy(share * model.intercept_) - share * torch.from_numpy(model.priors_).log()
    want = at.double() @ torch.from_numpy(share * model.coef_).mT + bias
    assert_close(level(decision.scores(at)), level(want), torch.float32, 5)


@pytest.mark.parametrize(("rows", "dim"), [(200, 10), (8, 40), (2, 5), (30, 1), (3, 2)])
def test_shrinkage_is_scikit_learns_oas(rows: int, dim: int) -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    x, _ = gaussians([rows], dim)
    x = x.double().numpy()
    want, _ = covariance.oas(x)
    got = shrunk(torch.from_numpy(covariance.empirical_covariance(x)), rows)
    assert_close(got, torch.from_numpy(want), torch.float64)


def test_a_covariance_that_rounding_hides_is_an_error_of_ours() -> None:
    with pytest.raises(StatisticsError, match="scatter too little within their classes"):
        factor_of(torch.diag(torch.tensor([1.0, -1e-12], dtype=torch.float64)))
    S = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    assert_close(factor_of(S) @ factor_of(S).mT, S, torch.float64)


def test_softmax_is_the_posterior_of_gaussians() -> None:
    features, labels = gaussians(COUNTS, DIM)
    known = known_of(features, labels, [4])
    at, _ = gaussians([5] * 4, DIM, seed=1)
    S = shrunk(known.statistics.covariance(), len(labels))
    densities = torch.distributions.MultivariateNormal(known.statistics.means(), S).log_prob(at.double()[:, None])
    assert_close(lda.fit(known).scores(at).softmax(1), densities.softmax(1), torch.float32, 10)


def test_probabilities_are_right_as_often_as_they_say() -> None:
    decision = lda.fit(known_of(*gaussians([300] * 3, 4, 0.5), [3]))
    at, labels = gaussians([1000] * 3, 4, 0.5, seed=1)
    sure, chosen = decision.scores(at).softmax(1).max(1)
    right = (chosen == labels).double().mean()
    assert 0.6 < right < 0.9 and abs(float(sure.mean()) - float(right)) < 0.03


def test_isotropic_classes_are_told_apart_by_the_nearest_mean() -> None:
    means = torch.randn(5, DIM, dtype=torch.float64)
    around = 0.3 * torch.cat([torch.eye(DIM), -torch.eye(DIM)]).double()
    features = (means[:, None] + around).flatten(0, 1)
    at = torch.randn(200, DIM)
    got = scores(features, torch.arange(5).repeat_interleave(2 * DIM), at)
    variance = float(around.square().sum() * 5 / DIM / (5 * 2 * DIM - 5))
    want = -torch.cdist(at.double(), means).square() / (2 * variance)
    assert_close(level(got), level(want), torch.float32, 5)


def probabilities(features: Tensor, labels: Tensor, at: Tensor) -> Tensor:
    return scores(features, labels, at).softmax(1)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rotations_scales_and_shifts_change_nothing(scale: float) -> None:
    features, labels = gaussians(COUNTS, DIM, 0.3)
    at, _ = gaussians([5] * 4, DIM, 0.3, seed=1)
    want = probabilities(features, labels, at)
    rotation, shift = orthonormal(DIM, DIM), torch.randn(DIM, dtype=torch.float64)
    got = probabilities(
        *(
            (scale * (f.double() @ rotation + shift)).float() if f.is_floating_point() else f
            for f in (features, labels, at)
        )
    )
    assert_close(got, want, torch.float32, 5)


def test_no_invertible_map_changes_anything_but_by_shrinkage(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = gaussians(COUNTS, DIM, 0.3)
    at, _ = gaussians([5] * 4, DIM, 0.3, seed=1)
    matrix = torch.randn(DIM, DIM) + 3 * torch.eye(DIM)
    pairs = []
    for shrinking in (shrunk, lambda S, *_: S):
        monkeypatch.setattr("janus_ext.heads.statistics.shrunk", shrinking)
        pairs.append((probabilities(features, labels, at), probabilities(features @ matrix, labels, at @ matrix)))
    (shrunk_before, shrunk_after), (before, after) = pairs
    assert_close(after, before, torch.float32, 50)
    assert relative_error(shrunk_after, shrunk_before) > 0.01


@pytest.mark.parametrize("images", [1, 3])
def test_classes_that_do_not_scatter_take_the_nearest_mean(images: int) -> None:
    """One image a class, or the same one several times: S is rounding, and no direction is worth more than another.

    Scores are in units of the features' mean variance.
    """
    means, _ = gaussians([1] * 40, 24)
    at = torch.randn(50, 24)
    got = scores(means.repeat(images, 1), torch.arange(40).repeat(images), at)
    m = means.double()
    variance = m.var(0, correction=0).mean()
    assert_close(level(got), level(at.double() @ m.mT - m.square().sum(1) / 2) / variance, torch.float32, 2)


@pytest.mark.parametrize("apart", [1.0, 1e-1, 1e-2, 1e-3])
def test_one_class_of_two_alike_images_is_all_that_scatters(apart: float) -> None:
    """A scatter of rank one, however small, has to survive the rounding of what it is taken from."""
    features, labels = gaussians([1] * 60, 32)
    features, labels = torch.cat([features, features[:1] + apart * torch.randn(1, 32)]), torch.cat([labels, labels[:1]])
    means = torch.stack([features[labels == c].double().mean(0) for c in range(60)])
    rest = features.double() - means[labels]
    weight = torch.linalg.solve(oas(rest.mT @ rest, len(labels)), means.mT).mT
    got = lda.fit(known_of(features, labels, [60])).weight
    assert_close(level(got.mT), level(weight.mT), torch.float32, 10)


def test_duplicate_images_among_others() -> None:
    features, labels = gaussians([6] * 5, 40)
    features, labels = features.repeat(3, 1), labels.repeat(3)
    at, _ = gaussians([5] * 5, 40, seed=1)
    assert_close(level(scores(features, labels, at)), level(plain(features, labels, at)), torch.float32, 5)


def test_features_that_are_all_zero_decide_nothing() -> None:
    got = scores(torch.zeros(20, 8), torch.arange(20) % 4, torch.randn(5, 8))
    assert torch.equal(got, torch.zeros(5, 4))


def test_a_class_without_images_changes_nothing_for_the_others() -> None:
    features, labels = gaussians(COUNTS, DIM)
    at, _ = gaussians([5] * 4, DIM, seed=1)
    gaps = torch.tensor([0, 2, 3, 5])
    decision: Decision = lda.fit(known_of(features, gaps[labels], [3, 3]))
    got = decision.scores(at)
    assert_close(level(got[:, gaps]), level(scores(features, labels, at)), torch.float32, 5)
    assert (got[:, [1, 4]] == -math.inf).all()


@pytest.mark.parametrize("offset", [10, 1000])
def test_an_offset_of_all_features_costs_no_precision(offset: float) -> None:
    features, labels = gaussians(COUNTS, DIM)
    at, _ = gaussians([5] * 4, DIM, seed=1)
    features, at = features + offset, at + offset
    assert_close(level(scores(features, labels, at)), level(plain(features, labels, at)), torch.float32, 5 * offset)
