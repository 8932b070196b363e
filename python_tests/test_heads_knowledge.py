"""Knowledge: what is kept of old classes, moved, saved and taken up again (docs/method.md, property 14)."""

import pytest
import torch
from conftest import assert_close
from gaussians import SEED, expanded, gaussians, known_of
from torch import Tensor, nn

from janus_ext.errors import ArgumentError, StatisticsError
from janus_ext.heads import HEADS, lda, ncm, ridge
from janus_ext.heads.knowledge import Knowledge

DIM, WIDTH = 8, 30
COUNTS, SIZES = [12, 9, 20, 7, 15], [2, 3]


def empty(sizes: list[int], width: int | None = None) -> Knowledge:
    return Knowledge(nn.ModuleList(nn.Linear(DIM, size) for size in sizes), DIM, torch.device("cpu"), width)


def is_refused(known: Knowledge) -> bool:
    try:
        lda.fit(known)
    except ArgumentError as error:
        assert "of all classes" in str(error)
        return True
    return False


def test_what_is_taken_up_of_features() -> None:
    features, labels = gaussians(COUNTS, DIM)
    known = known_of(features, labels, SIZES, WIDTH)
    assert known.sizes == SIZES and known.classes == 5 and known.seed == SEED
    assert known.prototypes.classes == [0, 1, 2, 3, 4] and known.statistics.counts.tolist() == COUNTS
    x = expanded(known.expansion, features)
    assert known.expanded.counts.tolist() == COUNTS
    assert_close(known.expanded.gram, x.mT @ x, torch.float32)
    assert_close(known.expanded.sums, torch.stack([x[labels == c].sum(0) for c in range(5)]), torch.float32)
    assert known_of(features, labels, SIZES).expansion is None


def test_random_directions_are_gaussian_and_of_the_seed_alone() -> None:
    features, labels = gaussians(COUNTS, DIM)
    torch.manual_seed(1)
    one = known_of(features, labels, SIZES, 2000).expansion.projection
    torch.manual_seed(2)
    other = known_of(2 * features, labels, [5], 2000).expansion.projection  # of one task instead of two
    assert torch.equal(one, other)
    assert abs(float(one.mean())) < 0.03 / DIM**0.5 and abs(float(one.std()) * DIM**0.5 - 1) < 0.03


def test_features_are_whitened_by_the_first_task_alone() -> None:
    """Within its classes their covariance, shrunk, is I then, and their mean is 0; later tasks change nothing of it."""
    features, labels = gaussians(COUNTS, DIM)
    first = labels < 2
    alone, later = known_of(features[first], labels[first], [2], WIDTH), known_of(features, labels, SIZES, WIDTH)
    mean, root, _ = (tensor.double() for tensor in later.expansion)
    assert all(map(torch.equal, alone.expansion, later.expansion))
    assert_close(mean, features[first].double().mean(0), torch.float32)
    assert_close(root.mT @ alone.statistics.spread() @ root, torch.eye(DIM, dtype=torch.float64), torch.float32, 50)


def test_the_width_is_that_of_one_head() -> None:
    known = known_of(*gaussians(COUNTS, DIM), SIZES, WIDTH, "lda")
    assert known.seen_by("lda") == (known.expanded, known.expansion)
    assert known.seen_by("ridge") == (known.statistics, None)
    assert lda.fit(known).weight.shape == (5, DIM + WIDTH) and ridge.fit(known).weight.shape == (5, DIM)


def test_means_age_from_task_to_task() -> None:
    assert_close(empty([2, 1, 3, 1]).ages(), torch.tensor([0.925] * 2 + [0.95] + [0.975] * 3 + [1.0]), torch.float32)
    assert empty([4]).ages().tolist() == [1.0] * 4


def test_moved_it_is_what_moved_features_would_have_left() -> None:
    features, labels = gaussians(COUNTS, DIM)
    R = torch.randn(DIM, DIM, dtype=torch.float64)
    moved, want = known_of(features, labels, SIZES), known_of(features.double() @ R, labels, SIZES)
    moved.move(R)
    want.heads = moved.heads
    at = torch.randn(40, DIM)
    assert_close(moved.prototypes.matrix, want.prototypes.matrix, torch.float32)
    for head in HEADS.values():
        assert_close(head(moved).scores(at), head(want).scores(at), torch.float32, 50)


@pytest.mark.parametrize("width", [None, WIDTH])
def test_state_goes_round_and_goes_on(width: int | None) -> None:
    features, labels = gaussians(COUNTS, DIM)
    early, late = labels < 2, labels >= 2
    whole, first, second = empty(SIZES, width), empty(SIZES, width), empty(SIZES, width)
    for known in (whole, first):
        known.add(features[early], labels[early], SEED)
    second.load_state_dict(first.state_dict())
    second.heads = whole.heads
    for known in (whole, second):
        known.add(features[late], labels[late], SEED)
    one, other = whole.state_dict(), second.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert ("expansion.projection" in one) == (width is not None)
    for name in HEADS:
        assert torch.equal(HEADS[name](whole).scores(features), HEADS[name](second).scores(features)), name


def test_an_empty_state_goes_round() -> None:
    known = empty([], WIDTH)
    known.load_state_dict(empty([], WIDTH).state_dict())
    assert known.expansion is None and known.statistics.rows == known.expanded.rows == 0


def test_a_state_of_another_width_is_refused() -> None:
    known = known_of(*gaussians(COUNTS, DIM), SIZES, WIDTH)
    with pytest.raises(ArgumentError, match=r"state must have sums \[5, 39\], got \[5, 38\]"):
        empty(SIZES, WIDTH + 1).load_state_dict(known.state_dict())


def test_an_expansion_of_other_sizes_is_refused() -> None:
    state = known_of(*gaussians(COUNTS, DIM), SIZES, WIDTH).state_dict()
    for name, tensor, said in (
        ("projection", torch.zeros(DIM, WIDTH - 1), r"Expansion: projection must be floating \[8, 30\], got \[8, 29\]"),
        ("mean", torch.zeros(DIM + 1), r"Expansion: mean must be floating \[8\], got \[9\]"),
        ("root", torch.zeros(DIM, DIM, dtype=torch.int64), "Expansion: root must be floating"),
        ("root", torch.full((DIM, DIM), torch.nan), "Expansion: root must be finite, got NaN"),
    ):
        with pytest.raises(ArgumentError, match=said):
            empty(SIZES, WIDTH).load_state_dict(state | {f"expansion.{name}": tensor})
    with pytest.raises(ArgumentError, match="--head-width: an earlier version .* name a --head, or train again"):
        empty(SIZES, WIDTH).load_state_dict(state | {"projection": torch.zeros(DIM, WIDTH)})
    lacking = {name: tensor for name, tensor in state.items() if not name.startswith("expansion.")}
    with pytest.raises(ArgumentError, match="Expansion: state must be .* with mean, root, projection, got nothing"):
        empty(SIZES, WIDTH).load_state_dict(lacking)


def old_state(known: Knowledge) -> dict[str, Tensor]:
    """As runs have it that were made before there were statistics."""
    return {name: tensor for name, tensor in known.state_dict().items() if name.startswith("prototypes.")}


def test_a_state_without_statistics_keeps_what_it_has() -> None:
    features, labels = gaussians(COUNTS, DIM)
    known, early, late = empty([2]), labels < 2, labels >= 2
    known.load_state_dict(old_state(known_of(features[early], labels[early], [2])))
    assert known.prototypes.classes == [0, 1] and known.statistics.rows == 0 and is_refused(known)
    known.heads.append(nn.Linear(DIM, 3))
    known.add(features[late], labels[late], SEED)
    assert known.statistics.counts.tolist() == [0, 0, *COUNTS[2:]] and is_refused(known)
    at = torch.randn(30, DIM)
    want = ncm.fit(known_of(features, labels, SIZES)).scores(at)
    assert torch.equal(ncm.fit(known).scores(at), want)


def test_when_there_are_statistics_of_all_classes() -> None:
    features, labels = gaussians(COUNTS, DIM)
    early, late = labels < 2, labels >= 2
    known = empty([2])
    assert is_refused(known), "a task has begun"
    known.add(features[early], labels[early], SEED)
    assert not is_refused(known)
    known.heads.append(nn.Linear(DIM, 3))
    assert is_refused(known), "the next one has begun"
    known.add(features[late], labels[late], SEED)
    assert not is_refused(known)


def test_a_task_that_nothing_was_seen_of() -> None:
    """One in the middle, the last, and the first."""
    features, labels = gaussians([9, 9], DIM)
    for classes in ([0, 3], [0, 1], [1, 3]):
        known = empty([1, 2, 1])
        known.add(features, torch.tensor(classes)[labels], SEED)
        assert is_refused(known), classes
    known = empty([1, 2, 1])
    known.add(*gaussians([9, 9, 0, 9], DIM), SEED)
    assert not is_refused(known), "one class of every task was"


def test_a_class_of_a_task_whose_other_classes_were_seen() -> None:
    features, labels = gaussians([9, 9], DIM)
    known = empty([2])
    known.load_state_dict(old_state(known_of(features[labels == 0], labels[labels == 0], [1])))
    known.add(features[labels == 1], labels[labels == 1], SEED)
    assert known.prototypes.classes == [0, 1] and is_refused(known)


@pytest.mark.parametrize("width", [None, WIDTH])
def test_what_is_refused_leaves_statistics_as_they_were(width: int | None) -> None:
    features, labels = gaussians(COUNTS, DIM)
    known = known_of(features, labels, SIZES, width)
    before, scores = known.state_dict(), ridge.fit(known).scores(features)
    with pytest.raises(ArgumentError, match="that have prototypes already"):
        known.add(features, labels, SEED)
    with pytest.raises(StatisticsError, match="features must be finite"):
        known.add(torch.full((3, DIM), float("nan")), torch.tensor([5, 5, 6]), SEED)
    after = known.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(ridge.fit(known).scores(features), scores)


def test_an_empty_state_leaves_nothing_of_what_came_after_it() -> None:
    """What `ContinualLearner.learn` restores where its first task ends in an error."""
    features, labels = gaussians(COUNTS, DIM)
    known = empty(SIZES, WIDTH)
    before = known.state_dict()
    known.add(features, labels, SEED)
    known.load_state_dict(before)
    assert known.expanded.rows == 0 and known.expansion is None
    known.add(features, labels, SEED)
    fresh = empty(SIZES, WIDTH)
    fresh.add(features, labels, SEED)
    wanted = fresh.state_dict()
    assert known.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in known.state_dict().items())


def test_what_is_small_against_the_features_but_more_than_rounding_is_a_spread() -> None:
    """Classes far from each other, of 1e-5 of their length: float64 sees it to a hundredth, and it is used."""
    features, labels = gaussians(COUNTS, DIM)
    features = features.double()
    near, far = known_of(features, labels, SIZES), known_of(features + 1e5 * (labels[:, None] - 2), labels, SIZES)
    assert_close(far.statistics.spread(), near.statistics.spread(), torch.bfloat16)


def test_one_image_a_class_has_the_spread_of_all_features() -> None:
    """What is left of G - sum mu mu^T is rounding, and tells nothing: the mean variance stands for it."""
    features, labels = gaussians([1] * 5, DIM)
    for offset in (0.0, 1e3):
        known = known_of(features + offset, labels, SIZES)
        further = features[:1] + 1 + offset
        variance = torch.cat([features + offset, further]).double().var(0, correction=0).mean()
        got = known.spread(further, torch.tensor([5]))
        assert_close(got, variance * torch.eye(DIM, dtype=torch.float64), torch.float32, 10)


def test_images_that_are_all_the_same_have_a_spread_of_one() -> None:
    known = known_of(torch.full((10, DIM), 0.1), torch.arange(10) % 5, SIZES)
    assert torch.equal(known.statistics.spread(), torch.eye(DIM, dtype=torch.float64))
