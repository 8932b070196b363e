"""Data-parallel training: two processes protect together what both observed, as one process with all rows would.

docs/method.md, property 5.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_close, relative_error, subspace
from torch import Tensor, nn

from janus_ext import (
    FeatureStatistics,
    GradientRectifier,
    LoRALinear,
    LoRAPair,
    OnlineEstimator,
    StatisticsError,
    TaskBoundaryError,
)

pytestmark = pytest.mark.xdist_group("processes")

KINDS = {"gram": None, "isvd": 7}
N, RANKS = 12, 2
Outcome = dict[str, Any]


class Adapter(nn.Module):
    """Somebody else's adapter: W x + B (A x)."""

    def __init__(self, n: int, m: int, r: int) -> None:
        super().__init__()
        self.base = nn.Linear(n, m).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(r, n) / n**0.5), nn.Parameter(torch.zeros(m, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.A.mT) @ self.B.mT


def rows(seed: int) -> Tensor:
    """64 rows of rank 5, the same in every process; a process has every other one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 5, generator=generator) @ torch.randn(5, N, generator=generator)


def estimator(kind: str, **options: Any) -> OnlineEstimator:
    return OnlineEstimator(N, kind, KINDS[kind], dtype=torch.float64, **options)


# what each process does -----------------------------------------------------------------------------------------------


def committed(kind: str, rank: int) -> Outcome:
    one = estimator(kind)
    one.observe(rows(1)[rank::RANKS])
    looked_at = one.extended(0.95)
    own = one.rows
    first = one.commit(0.95)
    one.observe(rows(2)[rank::RANKS])
    return {"looked at": looked_at, "rows": own, "first": first, "second": one.commit(0.95)}


def committed_alone(kind: str, rank: int) -> Outcome:
    one = estimator(kind, distributed=False)
    one.observe(rows(1)[rank::RANKS][: 4 + rank])
    return {"basis": one.commit(1.0)}


def committed_by_one_that_saw(kind: str, rank: int) -> Outcome:
    one = estimator(kind)
    if rank == 1:
        one.observe(rows(1))
    return {"basis": one.commit(0.95)}


def summed_by_hand(kind: str, rank: int) -> Outcome:
    one = estimator(kind, distributed=False)
    one.observe(rows(1)[rank::RANKS])
    one.all_reduce()
    kept = {name: tensor.clone() for name, tensor in one.statistics.tensors().items()}
    return {"rows": one.rows, "basis": one.commit(0.95), **kept}


def poisoned(rank: int) -> Outcome:
    one = estimator("gram")
    one.observe(rows(1) if rank == 0 else torch.full((1, N), float("nan")))
    try:
        return {"error": f"none, {one.commit(0.95)}"}
    except StatisticsError as error:
        return {"error": str(error)}


def refused(rank: int) -> Outcome:
    """One process has not merged; both go on afterwards."""
    layer = LoRALinear(nn.Linear(N, N), 3, rectify_in="step")
    rectifier = GradientRectifier([layer])
    with rectifier.observe():
        layer(rows(1))
    if rank == 0:
        nn.init.ones_(layer.B)
    try:
        rectifier.commit()
        return {"error": "none"}
    except TaskBoundaryError as error:
        nn.init.zeros_(layer.B)
        rectifier.commit()
        return {"error": str(error), "basis": layer.basis}


def trained(kind: str, rank: int, ranks: int, distributed: bool = True) -> Outcome:
    """One task observed, and five steps of the next: an own layer and a pair, rectified before the step."""
    torch.manual_seed(3)
    model = nn.Sequential(LoRALinear(nn.Linear(N, N), 3, rectify_in="step"), Adapter(N, 4, 2))
    pair = LoRAPair(model[1].A, model[1].B, 1.0, model[1])
    options = {"estimator": kind, "estimator_rank": KINDS[kind], "distributed": distributed}
    rectifier = GradientRectifier({"own": model[0], "pair": pair}, 0.95, **options)
    forward = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    with rectifier.observe():
        forward(rows(1)[rank::ranks])
    rectifier.commit()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rectifier.attach(optimizer)
    for step in range(5):
        optimizer.zero_grad()
        forward(rows(10 + step)[rank::ranks]).square().mean().backward()
        optimizer.step()
    bases = {f"{name} basis": e.basis for name, e in rectifier.estimators.items()}
    return bases | {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


class Twofold(nn.Module):
    """Two adapters of one input, or of two."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Adapter(N, 4, 2), Adapter(N, 4, 2)

    def forward(self, x: Tensor, copied: bool = False) -> Tensor:
        return self.one(x) + self.other(x.clone() if copied else x)


def shared(rank: int) -> Outcome:
    """Two layers with one input, and then a process that saw nothing, or gave them two."""
    torch.manual_seed(3)
    model = Twofold()
    pairs = {name: LoRAPair(m.A, m.B, 1.0, m) for name, m in model.named_children()}
    rectifier = GradientRectifier(pairs, 0.95)
    outcome: Outcome = {}
    if rank == 1:
        with rectifier.observe():
            model(rows(1))
    rectifier.commit()
    outcome["estimators"] = len({id(e) for e in rectifier.estimators.values()})
    outcome |= {name: e.basis for name, e in rectifier.estimators.items()}
    rectifier = GradientRectifier(pairs, 0.95)
    with rectifier.observe():
        model(rows(1), copied=rank == 1)
    try:
        rectifier.commit()
    except TaskBoundaryError as error:
        outcome["error"] = str(error)
    return outcome


MANY = 5  # which is no power of two


def summed_by_many(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", MANY)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=MANY)
    outcome = {}
    for kind in KINDS:
        one = estimator(kind)
        one.observe(rows(1)[rank::MANY])
        outcome[f"{kind} basis"] = one.commit(0.95)
    known = FeatureStatistics(N)
    known.reserve(4)
    known.observe(rows(1)[rank::MANY], torch.arange(64)[rank::MANY] % 4)
    known.all_reduce()
    torch.save(outcome | known.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    outcome = {"poisoned": poisoned(rank), "refused": refused(rank), "shared": shared(rank)}
    for kind in KINDS:
        for run in (committed, committed_alone, committed_by_one_that_saw, summed_by_hand):
            outcome[f"{run.__name__} {kind}"] = run(kind, rank)
        outcome[f"trained {kind}"] = trained(kind, rank, RANKS)
        outcome[f"trained apart {kind}"] = trained(kind, rank, RANKS, distributed=False)
    torch.save(outcome, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


# what comes of it -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Outcome]]:
    """What the two processes have to say on one matter."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    outcomes = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    return lambda matter: [outcome[matter] for outcome in outcomes]


kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_a_commit_takes_what_all_processes_saw(both: Callable[[str], list[Outcome]], kind: str) -> None:
    one, other = both(f"committed {kind}")
    assert torch.equal(one["first"], other["first"]) and torch.equal(one["second"], other["second"])
    assert torch.equal(one["first"], one["looked at"]), "a second look summed a second time"
    assert one["rows"] == other["rows"] == 32, "a look changed what the process has"
    whole = estimator(kind)
    for seed, got in ((1, one["first"]), (2, one["second"])):
        whole.observe(rows(seed))
        want = whole.commit(0.95)
        assert got.shape == want.shape
        assert_close(subspace(got), subspace(want), torch.float64, 100)


@kinds
def test_a_process_that_saw_nothing_takes_part(both: Callable[[str], list[Outcome]], kind: str) -> None:
    one, other = both(f"committed_by_one_that_saw {kind}")
    assert torch.equal(one["basis"], other["basis"])
    alone = estimator(kind)
    alone.observe(rows(1))
    assert_close(subspace(one["basis"]), subspace(alone.commit(0.95)), torch.float64, 100)


@kinds
def test_each_process_for_itself(both: Callable[[str], list[Outcome]], kind: str) -> None:
    bases = [outcome["basis"] for outcome in both(f"committed_alone {kind}")]
    for rank, got in enumerate(bases):
        alone = estimator(kind)
        alone.observe(rows(1)[rank::RANKS][: 4 + rank])
        assert torch.equal(got, alone.commit(1.0))
    assert [basis.shape[1] for basis in bases] == [4, 5]


@kinds
def test_a_sum_by_hand_is_not_summed_again(both: Callable[[str], list[Outcome]], kind: str) -> None:
    one, other = both(f"summed_by_hand {kind}")
    x = rows(1).double()
    assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)
    assert one["rows"] == 64
    if kind == "gram":
        assert_close(one["gram"], x.mT @ x, torch.float64)
    else:
        assert_close(one["total"], x.square().sum(), torch.float64)
        assert_close((one["U"] * one["S"].square()) @ one["U"].mT, x.mT @ x, torch.float64, 100)
    assert torch.equal(one["basis"], both(f"committed {kind}")[0]["first"])


def test_bad_statistics_of_one_process_are_everybody_s(both: Callable[[str], list[Outcome]]) -> None:
    one, other = (outcome["error"] for outcome in both("poisoned"))
    assert one == other and "previous basis stays in force" in one


@kinds
def test_rectified_training_stays_one(both: Callable[[str], list[Outcome]], kind: str) -> None:
    one, other = both(f"trained {kind}")
    assert all(torch.equal(one[name], other[name]) for name in one)
    whole = trained(kind, 0, 1)
    for name, want in whole.items():
        got = subspace(one[name]) if "basis" in name else one[name]
        assert_close(got, subspace(want) if "basis" in name else want, torch.float32, 100)
    assert one["own basis"].shape[1] > 0 and one["1.B"].any()


@kinds
def test_replicas_go_apart_where_each_commits_for_itself(both: Callable[[str], list[Outcome]], kind: str) -> None:
    one, other = both(f"trained apart {kind}")
    assert relative_error(one["pair basis"][:, :1], other["pair basis"][:, :1]) > 0.01
    assert relative_error(one["0.A"], other["0.A"]) > 0.01


def test_what_one_process_refuses_all_refuse(both: Callable[[str], list[Outcome]]) -> None:
    one, other = both("refused")
    assert "commit() came while B is not zero" in one["error"] and other["error"] == one["error"]
    assert torch.equal(one["basis"], other["basis"]) and one["basis"].shape[1] > 0


def test_layers_share_an_estimator_in_all_processes_or_in_none(both: Callable[[str], list[Outcome]]) -> None:
    """Else one would wait for ever for a sum that the other does not make."""
    alone = estimator("gram")
    alone.observe(rows(1))
    want = subspace(alone.commit(0.95))
    for outcome in both("shared"):
        assert outcome["estimators"] == 1
        assert torch.equal(outcome["one"], outcome["other"])
        assert_close(subspace(outcome["one"]), want, torch.float32, 10)
    told, waiting = both("shared")[1]["error"], both("shared")[0]["error"]
    assert told.startswith("other: its input is that of another layer in one process") and "share_inputs=False" in told
    assert waiting == told


def test_five_processes_add_up_in_a_tree(tmp_path: Path) -> None:
    """Pairs, pairs of pairs, and the one that is left over."""
    torch.multiprocessing.spawn(summed_by_many, args=(str(tmp_path),), nprocs=MANY)
    outcomes = [torch.load(tmp_path / f"{rank}.pt") for rank in range(MANY)]
    assert all(torch.equal(outcome[name], value) for outcome in outcomes for name, value in outcomes[0].items())
    for kind in KINDS:
        alone = estimator(kind)
        alone.observe(rows(1))
        assert_close(subspace(outcomes[0][f"{kind} basis"]), subspace(alone.commit(0.95)), torch.float64, 100)
    known = FeatureStatistics(N)
    known.observe(rows(1), torch.arange(64) % 4)
    for name, value in known.state_dict().items():
        assert_close(outcomes[0][name], value, torch.float64)
