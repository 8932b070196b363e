"""What a run draws behind the cut, and by what it scales gradients, is what it would have been without the cut."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_trainer, weights_of, without_time
from test_mixed_precision import Overflowing
from test_resuming import assert_same_files
from test_resuming_within import signalled
from torch import Tensor

from janus_ext.data.benchmark import Benchmark
from janus_ext.errors import Interrupted
from janus_ext.methods.base import Step
from janus_ext.methods.lora import SequentialLoRA
from janus_ext.training import keeping as keeping_module
from janus_ext.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("random")

RANKS = 2
STEPS = 4 * 2  # of a task: 16 images in batches of 4, 2 epochs
CUTS = {"in the first epoch": 3, "in the last epoch": 6, "in the second task": STEPS + 2}  # none at an epoch's end
Outcome = dict[str, Any]


class Drawing(SequentialLoRA):
    """Its loss has a price that is drawn anew in every step; what was drawn by this process is on record.

    It sums up no statistics in its steps: of these, those of two processes are the same but for rounding.
    """

    drawn: list[float] = []  # noqa: RUF012

    def penalty(self, features: Tensor, targets: Tensor) -> Tensor:
        price = torch.rand(())
        self.drawn.append(float(price))
        return price * features.square().mean()


class Scaling(Overflowing):
    """Keeps the scaler's state behind every step; the second step has a gradient that float16 does not hold."""

    bad = frozenset({2})

    def _step(self, images: Tensor, targets: Tensor, size: int, optimizer: Any, scaler: Any) -> Step:
        step = super()._step(images, targets, size, optimizer, scaler)
        self.scales = [*getattr(self, "scales", []), scaler.state_dict()]
        return step


def trainer_of(benchmark: Benchmark, weights: Path, folder: Path, **changes: Any) -> Trainer:
    small = {"method": f"{__name__}:Drawing", "batch_size": 4, "epochs": 2}
    return make_trainer(benchmark, weights, folder, **small | changes)


def outcome_of(trainer: Trainer) -> Outcome:
    """What comes of a run, and what this process drew for it."""
    Drawing.drawn.clear()
    return {"results": without_time(trainer.run()), "weights": weights_of(trainer), "drawn": [*Drawing.drawn]}


def taken_up(benchmark: Benchmark, weights: Path, folder: Path) -> Outcome:
    trainer = trainer_of(benchmark, weights, folder)
    trainer.restore()
    return {"position": trainer.keeping.start.position} | outcome_of(trainer)


def cut(benchmark: Benchmark, weights: Path, folder: Path, step: int) -> None:
    """Leaves a run that was asked to end in a step, counted from 1 over the whole run."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keeping_module, "READ_EVERY", 1)  # several processes agree behind every step
        signalled(patched, step, signal.SIGTERM)
        with pytest.raises(Interrupted):
            trainer_of(benchmark, weights, folder).run()


def assert_goes_on(found: Outcome, whole: Outcome, step: int) -> None:
    """With the numbers that the run would have drawn behind ``step``, and so with the same bits."""
    assert found["position"] == divmod((step - 1) % STEPS + 1, STEPS // 2)
    assert found["drawn"] == whole["drawn"][step:]
    assert found["results"] == whole["results"]
    assert all(torch.equal(tensor, whole["weights"][name]) for name, tensor in found["weights"].items())


# one process ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", CUTS.values(), ids=CUTS)
def test_what_is_drawn_goes_on(patterns, weights, tmp_path, step) -> None:
    whole = outcome_of(trainer_of(patterns, weights, tmp_path / "whole"))
    assert len(set(whole["drawn"])) == len(whole["drawn"]) == 3 * STEPS
    cut(patterns, weights, tmp_path / "run", step)
    assert_goes_on(taken_up(patterns, weights, tmp_path / "run"), whole, step)
    assert_same_files(tmp_path / "run", tmp_path / "whole")


def test_the_scale_of_the_gradients_goes_on(patterns, weights, tmp_path, monkeypatch) -> None:
    """Halved by an overflow before the cut, with the count of the steps since then."""
    trainers = [
        make_trainer(patterns, weights, tmp_path / name, Scaling, amp="fp16", batch_size=4, epochs=2)
        for name in ("whole", "run", "run")
    ]
    wanted = without_time(trainers[0].run())
    with monkeypatch.context() as patched:
        signalled(patched, 6, signal.SIGTERM)
        with pytest.raises(Interrupted):
            trainers[1].run()
    trainers[2].restore()
    trainers[2].learner.taken = 6
    assert without_time(trainers[2].run()) == wanted
    whole, before, behind = (trainer.learner.scales for trainer in trainers)
    fresh = torch.amp.GradScaler("cpu").state_dict()
    at_the_cut = {name: before[-1][name] for name in fresh if before[-1][name] != fresh[name]}
    assert at_the_cut == {"scale": fresh["scale"] / 2, "_growth_tracker": 4}
    assert before + behind == whole
    assert_same_files(tmp_path / "run", tmp_path / "whole")


# two processes --------------------------------------------------------------------------------------------------------
def work(rank: int, folder: Path, benchmark: Benchmark, weights: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    outcome = {"whole": outcome_of(trainer_of(benchmark, weights, folder / "whole"))}
    for name, step in CUTS.items():
        cut(benchmark, weights, folder / name, step)
        outcome[name] = taken_up(benchmark, weights, folder / name)
    torch.save(outcome, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory, patterns: Benchmark, weights: Path
) -> Callable[[str], list[Outcome]]:
    folder: Path = tmp_path_factory.mktemp("random")
    torch.multiprocessing.spawn(work, args=(folder, patterns, weights), nprocs=RANKS)
    outcomes = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return lambda matter: [outcome[matter] for outcome in outcomes]


def test_each_process_draws_numbers_of_its_own(both) -> None:
    one, other = (set(outcome["drawn"]) for outcome in both("whole"))
    assert len(one) == len(other) == 3 * STEPS and not one & other


@pytest.mark.parametrize("case", CUTS)
def test_what_each_process_draws_goes_on(both, case) -> None:
    for found, whole in zip(both(case), both("whole"), strict=True):
        assert_goes_on(found, whole, CUTS[case])
