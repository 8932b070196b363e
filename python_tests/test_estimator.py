"""OnlineEstimator(estimator="isvd"), and what both estimators promise alike."""

import warnings

import pytest
import torch
from conftest import assert_close, subspace

from janus_ext import ArgumentError, OnlineEstimator, StatisticsError

KINDS = ["gram", "isvd"]


def low_rank(rows: int, n: int, rank: int) -> torch.Tensor:
    return torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, n, dtype=torch.float64)


def estimator(n: int, kind: str = "isvd", rank: int | None = None, **options: object) -> OnlineEstimator:
    return OnlineEstimator(n, kind, rank, dtype=torch.float64, **options)


def test_both_find_the_same_subspace_task_after_task(device: str) -> None:
    pair = [estimator(20, "gram", device=device), estimator(20, "isvd", 8, device=device)]
    for _ in range(3):
        x = low_rank(60, 20, 4).to(device)
        for one in pair:
            for chunk in x.split([13, 40, 7]):
                one.observe(chunk)
        exact, sketched = (one.commit(0.95) for one in pair)
        assert exact.shape == sketched.shape
        assert_close(subspace(sketched), subspace(exact), torch.float64, 100)
        assert pair[1].rows == 0 and not pair[1].statistics.total


def test_decay_multiplies_the_energy(device: str) -> None:
    one = estimator(6, rank=6, decay=0.5, device=device)
    x = torch.randn(10, 6, dtype=torch.float64, device=device)
    one.observe(x)
    one.observe(x)
    assert_close(one.statistics.total, 1.5 * x.square().sum(), torch.float64)
    assert_close(one.statistics.S.square().sum(), one.statistics.total, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_adds_what_another_saw(kind: str) -> None:
    x = low_rank(50, 12, 3)
    whole, one, two = (estimator(12, kind) for _ in range(3))
    for target, part in ((whole, x), (one, x[:20]), (two, x[20:])):
        target.observe(part)
    one.merge(two)
    assert one.rows == 50
    assert_close(subspace(one.commit(1.0)), subspace(whole.commit(1.0)), torch.float64, 100)


def test_all_reduce_equals_one_process(tmp_path) -> None:
    torch.multiprocessing.spawn(_reduce_worker, args=(str(tmp_path / "store"),), nprocs=2)


def _reduce_worker(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(5, 12, generator=generator, dtype=torch.float64)
    one = estimator(12, rank=7)
    one.observe(x[rank::2])
    one.all_reduce()
    assert one.rows == 64
    assert_close(one.statistics.total, x.square().sum(), torch.float64)
    everywhere = [torch.empty_like(one.statistics.U) for _ in range(2)]
    torch.distributed.all_gather(everywhere, one.statistics.U)
    assert torch.equal(*everywhere), "the processes hold different statistics"
    assert_close(subspace(one.commit(1.0)), x.mT @ torch.linalg.pinv(x.mT), torch.float64, 100)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_on_where_it_stopped(kind: str) -> None:
    one, other = estimator(9, kind), estimator(9, kind)
    one.observe(torch.randn(20, 9))
    one.commit(0.6)
    one.observe(torch.randn(15, 9))
    other.load_state_dict(one.state_dict())
    assert other.rows == 15
    assert torch.equal(other.commit(0.9), one.commit(0.9))


def test_state_of_another_kind_or_rank_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match=r"state must have U \[9, 4\], S \[4\], total \[\], basis \[9, k\] and rows, got U None"
    ):
        estimator(9, rank=4).load_state_dict(estimator(9, "gram").state_dict())
    with pytest.raises(ArgumentError, match=r"U \[9, 4\], .* got U \[9, 5\]"):
        estimator(9, rank=4).load_state_dict(estimator(9, rank=5).state_dict())


def test_a_sketch_too_small_for_the_energy_warns_once_and_gives_all_it_has() -> None:
    one = estimator(20, rank=4, name="blocks.1.attn.qkv")
    one.observe(torch.randn(200, 20))
    with pytest.warns(
        UserWarning, match=r"blocks\.1\.attn\.qkv: an energy of 0.9 .* rank 4 holds 0\.\d+: raise the estimator's rank"
    ):
        assert one.commit(0.9).shape == (20, 4)
    one.observe(torch.randn(200, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.commit(0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_and_wider_inputs(kind: str) -> None:
    one, other = OnlineEstimator(8, kind), OnlineEstimator(8, kind)
    x = torch.randn(50, 8, dtype=torch.float64)
    with torch.inference_mode():
        one.observe(x)
    other.observe(x.float())
    assert_close(subspace(one.commit(0.5)), subspace(other.commit(0.5)), torch.float32, 10)
    one.observe(x)
    assert one.rows == 50 and one.commit(1.0).shape == (8, 8)


@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1e18, 3e19])
def test_large_and_small_float32_inputs_keep_their_energy(scale: float) -> None:
    one, other = OnlineEstimator(6, "isvd"), OnlineEstimator(6, "isvd")
    x = torch.randn(20, 6) * torch.logspace(0, -1, 6)
    one.observe(scale * x)
    other.observe(x)
    assert_close(subspace(one.commit(0.9)), subspace(other.commit(0.9)), torch.float32, 10)


def test_state_without_a_part_is_refused() -> None:
    state = estimator(6).state_dict()
    del state["basis"]
    with pytest.raises(ArgumentError, match="got U .* basis None"):
        estimator(6).load_state_dict(state)


def test_bad_input_names_the_layer_and_changes_nothing() -> None:
    one = estimator(6, rank=3, name="blocks.2.attn.qkv")
    one.observe(torch.randn(8, 6))
    before = one.state_dict()
    with pytest.raises(StatisticsError, match=r"blocks\.2\.attn\.qkv: .*must be finite.*nothing was added"):
        one.observe(torch.full((2, 6), float("nan")))
    assert all(torch.equal(now, before[name]) for name, now in one.state_dict().items())
    with pytest.raises(StatisticsError, match="previous basis stays"):
        zero = estimator(6)
        zero.observe(torch.zeros(3, 6))
        zero.commit(0.9)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda: OnlineEstimator(6, dtype=torch.bfloat16),
            "dtype must be torch.float32 or torch.float64, got torch.bf",
        ),
        (lambda: estimator(6, rank=7), "rank must be from 1 to dim = 6, got 7"),
        (lambda: estimator(6, rank=0), "rank must be from 1 to dim = 6, got 0"),
        (lambda: estimator(6, "gram", rank=3), "rank belongs to estimator='isvd', got 3 with 'gram'"),
        (lambda: estimator(6, energy_power=2), "energy_power must be 1 with estimator='isvd', got 2"),
        (lambda: estimator(6).merge(estimator(6, "gram")), "other must hold a Sketch, got a Gram"),
    ],
    ids=range(6),
)
def test_wrong_arguments_are_named(use: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        use()
