"""A run that one process has kept is taken up by two, or by three, which end as that one would have."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from test_resuming_within import signalled
from together import Outcome, assert_as_one, assert_same, copied, outcome_of, trainer_of

from janus_ext.data.benchmark import Benchmark
from janus_ext.errors import Interrupted

pytestmark = pytest.mark.xdist_group("with more")

WHOLE = {"head": "ncm"}  # with no drift budget: nothing is observed anew behind the steps
STEPS = 4 * 2  # of a task: 16 images in batches of 5, 2 epochs
CUTS = {"in the second task": STEPS + 2, "in the very last epoch": 2 * STEPS + 6}  # of which statistics are kept, too


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, hard: Benchmark, weights: Path) -> Path:
    """By name of the moment the run that was cut off there."""
    folder: Path = tmp_path_factory.mktemp("kept")
    for name, step in CUTS.items():
        with pytest.MonkeyPatch.context() as patched:
            signalled(patched, step, signal.SIGTERM)
            with pytest.raises(Interrupted):
                trainer_of(hard, weights, folder / name, **WHOLE).run()
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, hard: Benchmark, weights: Path) -> Outcome:
    """What comes of the run where nobody cuts it off."""
    return outcome_of(trainer_of(hard, weights, tmp_path_factory.mktemp("alone") / "run", **WHOLE))


def work(rank: int, count: int, folder: Path, benchmark: Benchmark, weights: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", count)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    outcome = {}
    for name in CUTS:
        trainer = trainer_of(benchmark, weights, folder / "kept" / name, **WHOLE)
        trainer.restore()
        outcome[name] = {"position": trainer.keeping.start.position} | outcome_of(trainer)
    torch.save(outcome, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("count", [2, 3])
def test_a_run_kept_by_one_is_taken_up_by_more(hard, weights, kept, alone, tmp_path, count) -> None:
    copied(kept, tmp_path / "kept")
    torch.multiprocessing.spawn(work, args=(count, tmp_path, hard, weights), nprocs=count)
    first, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(count))
    for name, step in CUTS.items():
        assert first[name]["position"] == divmod(step % STEPS, STEPS // 2)
        assert first[name]["results"]["versions"]["processes"] == count
        assert_as_one(first[name], alone)
        for other in others:
            assert_same(first[name], other[name])
