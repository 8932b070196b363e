"""FeatureStatistics: additive over batches, tasks and processes (docs/method.md, property 13)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close
from gaussians import gaussians
from torch import Tensor

from janus_ext.errors import ArgumentError, StatisticsError
from janus_ext.heads.statistics import NAMES, FeatureStatistics

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIM, RANKS = 12, 2
COUNTS = [5, 0, 17, 1, 0, 8]  # of classes 0 .. 5; two have no images


def samples(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    features, labels = gaussians(COUNTS, DIM)
    return features.to(device, dtype), labels.to(device)


def observed(features: Tensor, labels: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1], features.device)
    statistics.observe(features, labels)
    return statistics


def assert_same(got: FeatureStatistics, want: FeatureStatistics) -> None:
    assert torch.equal(got.counts, want.counts)
    assert_close(got.sums, want.sums, torch.float64)
    assert_close(got.gram, want.gram, torch.float64)


@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_sums_and_moments_equal_float64(device: str, dtype: torch.dtype, integers: torch.dtype) -> None:
    features, labels = samples(dtype, device)
    statistics = observed(features, labels.to(integers))
    f, y = features.double(), labels
    assert statistics.counts.tolist() == COUNTS and statistics.rows == sum(COUNTS) and statistics.dim == DIM
    assert statistics.seen.tolist() == [n > 0 for n in COUNTS]
    assert_close(statistics.sums, torch.stack([f[y == c].sum(0) for c in range(6)]), torch.float64)
    assert_close(statistics.gram, f.mT @ f, torch.float64)
    assert torch.equal(statistics.gram, statistics.gram.mT)
    assert statistics.sums.dtype == statistics.gram.dtype == torch.float64 and statistics.counts.dtype == torch.int64


@pytest.mark.parametrize("counts", [COUNTS, [2, 1, 1, 1], [3, 3], [40, 50, 60]], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_means_and_the_covariance_within_classes(counts: list[int], offset: float) -> None:
    features, labels = gaussians(counts, DIM)
    features = features + offset
    statistics, f = observed(features, labels), features.double()
    means = torch.stack([f[labels == c].sum(0) / max(1, n) for c, n in enumerate(counts)])
    assert_close(statistics.means(), means, torch.float64)
    rest = f - means[labels]
    want = rest.mT @ rest / (len(f) - sum(n > 0 for n in counts))
    assert_close(statistics.covariance(), want, torch.float64, 10 * (1 + offset**2))
    assert torch.equal(statistics.covariance(), statistics.covariance().mT)


def test_one_image_a_class_scatters_by_rounding_alone() -> None:
    features, labels = gaussians([1] * 40, DIM)
    statistics = observed(features, labels)
    assert statistics.covariance().norm() <= 1e-14 * statistics.gram.norm()


def test_a_class_without_images_has_a_mean_of_zero() -> None:
    statistics = observed(*samples())
    assert not statistics.means()[[1, 4]].any() and statistics.means()[[0, 2, 3, 5]].any(1).all()


@pytest.mark.parametrize("size", [1, 7, 31])
def test_pieces_are_the_whole(size: int) -> None:
    features, labels = samples()
    pieces = FeatureStatistics(DIM)
    for f, y in zip(features.split(size), labels.split(size), strict=True):
        pieces.observe(f, y)
    assert_same(pieces, observed(features, labels))


def test_the_order_of_classes_and_of_images_does_not_matter() -> None:
    features, labels = samples()
    late, early = labels >= 3, labels < 3
    statistics = FeatureStatistics(DIM)
    for which in (late, early, torch.zeros_like(late)):  # the last one are no features at all
        statistics.observe(features[which], labels[which])
    assert_same(statistics, observed(features, labels))
    first, second = observed(features[early], labels[early]), observed(features[late], labels[late])
    assert len(first.counts) == 3 and len(second.counts) == 6
    for one, other in ((first, second), (second, first)):
        merged = FeatureStatistics(DIM)
        merged.merge(one)
        merged.merge(other)
        assert_same(merged, statistics)


def test_observing_needs_no_gradient_and_keeps_no_feature() -> None:
    features, labels = samples()
    statistics = observed(features.clone().requires_grad_().square(), labels)
    assert not any(getattr(statistics, name).requires_grad for name in NAMES)
    other = FeatureStatistics(DIM)
    other.merge(statistics)
    before = other.state_dict()
    statistics.observe(features, labels)
    assert all(torch.equal(before[name], getattr(other, name)) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_map_moves_them_as_it_moves_the_features(device: str, dtype: torch.dtype) -> None:
    features, labels = samples(torch.float64, device)
    R = torch.randn(DIM, DIM, dtype=dtype, device=device)
    moved, want = observed(features, labels), observed(features @ R.double(), labels)
    S = moved.covariance()
    moved.transform(R)
    assert_same(moved, want)
    assert torch.equal(moved.gram, moved.gram.mT)
    assert_close(moved.covariance(), R.double().mT @ S @ R.double(), torch.float64, 100)


def test_state_goes_round_and_is_a_copy() -> None:
    statistics = observed(*samples())
    state, other = statistics.state_dict(), FeatureStatistics(DIM)
    other.load_state_dict(state)
    assert all(torch.equal(getattr(other, name), getattr(statistics, name)) for name in NAMES)
    other.observe(*samples())
    assert all(torch.equal(getattr(statistics, name), state[name]) for name in NAMES)
    assert repr(other) == f"FeatureStatistics(dim={DIM}): {2 * sum(COUNTS)} features of 6 classes"


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    features, labels = samples()
    own = labels < 3 if rank == 0 else labels >= 2  # the first process sees no class after 2, both see class 2
    statistics = observed(features[own], labels[own])
    statistics.all_reduce()
    torch.save(statistics.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_see_together_what_one_would(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=RANKS)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in NAMES)
    features, labels = samples()
    both = observed(torch.cat([features, features[labels == 2]]), torch.cat([labels, labels[labels == 2]]))
    got = FeatureStatistics(DIM)
    got.load_state_dict(states[0])
    assert_same(got, both)


# what is refused ------------------------------------------------------------------------------------------------------

TWO = torch.tensor([0, 1])
STATE = FeatureStatistics(DIM).state_dict()
WRONG: list[tuple[Any, str]] = [
    (lambda s: FeatureStatistics("6"), "FeatureStatistics: dim must be an integer, from 1 to 1048576, got '6'"),
    (lambda s: FeatureStatistics(0), "FeatureStatistics: dim must be from 1 to 1048576, got 0"),
    (lambda s: s.observe([1.0], TWO), r"features must be a tensor \[n, 12\], got \[1\]"),
    (lambda s: s.observe(torch.zeros(2, 11), TWO), r"features must be floating \[n, 12\], got \[2, 11\] of .*float32"),
    (lambda s: s.observe(torch.zeros(12), TWO), r"features must be floating \[n, 12\], got \[12\]"),
    (lambda s: s.observe(torch.zeros(2, 12).long(), TWO), r"features must be floating .* got \[2, 12\] of .*int64"),
    (lambda s: s.observe(torch.zeros(2, 12), [0, 1]), r"labels must be a tensor \[2\] integers, .*, got \[0, 1\]"),
    (lambda s: s.observe(torch.zeros(2, 12), TWO[:1]), r"labels must be \[2\] integers, .* got \[1\]"),
    (lambda s: s.observe(torch.zeros(2, 12), TWO - 1), r"labels must be from 0 to 1048575, got -1"),
    (lambda s: s.observe(torch.zeros(2, 12), TWO.double()), r"labels must be .* got \[2\] of torch.float64"),
    (lambda s: s.observe(torch.zeros(2, 12), TWO.bool()), r"labels must be .* got \[2\] of torch.bool"),
    (lambda s: s.merge(None), "other must be FeatureStatistics of width 12, got None"),
    (lambda s: s.merge(FeatureStatistics(11)), "other must be FeatureStatistics of width 12, got a width of 11"),
    (lambda s: s.transform(2.0), r"matrix must be a tensor \[12, 12\], got 2"),
    (lambda s: s.transform(torch.eye(11)), r"matrix must be floating \[12, 12\], got \[11, 11\]"),
    (lambda s: s.load_state_dict(None), r"state must be what state_dict\(\) gave, with counts, sums, gram"),
    (lambda s: s.load_state_dict({"counts": TWO}), r"state must be what state_dict\(\) gave"),
    (lambda s: s.load_state_dict(FeatureStatistics(11).state_dict()), r"state must have sums \[0, 12\], got \[0, 11\]"),
    (lambda s: s.load_state_dict(STATE | {"counts": TWO}), r"state must have sums \[2, 12\], got \[0, 12\]"),
    (lambda s: s.load_state_dict(STATE | {"gram": torch.eye(3)}), r"state must have gram \[12, 12\], got \[3, 3\]"),
]


@pytest.mark.parametrize(("use", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_named_and_changes_nothing(use: Any, message: str) -> None:
    statistics = observed(*samples())
    before = statistics.state_dict()
    with pytest.raises(ArgumentError, match=message):
        use(statistics)
    assert all(torch.equal(before[name], getattr(statistics, name)) for name in NAMES)


def test_what_was_begun_in_inference_mode_goes_on_outside_of_it() -> None:
    f, y = torch.randn(9, 4), torch.arange(9) % 3
    plain, found = FeatureStatistics(4), FeatureStatistics(4)
    plain.observe(f, y)
    state = plain.state_dict()
    with torch.inference_mode():
        moved = FeatureStatistics(4)
        moved.load_state_dict(state)
        moved.transform(torch.eye(4) + 0)
        found.observe(f + 0, y)
        found.merge(moved)
    for statistics in (moved, found):
        statistics.observe(f, y)
    assert moved.rows == 18 and found.rows == 27 and found.counts.tolist() == [9, 9, 9]
    assert_close(found.gram, 3 * plain.gram, torch.float64)
    assert_close(moved.sums.sum(0), 2 * f.double().sum(0), torch.float64)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_feature_that_is_not_finite_changes_nothing(value: float) -> None:
    statistics = observed(*samples())
    before = statistics.state_dict()
    features = torch.zeros(4, DIM)
    features[2, 5] = value
    with pytest.raises(StatisticsError, match=r"features must have finite squares, got others among \[4, 12\]"):
        statistics.observe(features, torch.tensor([9, 9, 9, 9]))
    assert all(torch.equal(before[name], getattr(statistics, name)) for name in NAMES)
