"""Processes that train together are one: two of them learn what one learns from the same batches.

docs/method.md, property 5.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trees
from conftest import relative_error
from learners import learner_of, state_of
from together import Outcome, assert_as_one, assert_same, assert_unsaturated, copied, outcome_of, trainer_of

from janus_ext import ArgumentError, processes
from janus_ext.data.benchmark import Benchmark
from janus_ext.errors import Interrupted, ProcessError, TrainingError
from janus_ext.methods import METHODS
from janus_ext.methods.janus import Janus
from janus_ext.training import keeping as keeping_module
from janus_ext.training.loop import Learner
from janus_ext.training.parallel import add_up_gradients
from janus_ext.training.progress import make_bar
from janus_ext.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("together")

RANKS = 2
CASES: dict[str, dict[str, Any]] = {
    "janus": {},
    "janus, isvd": {"estimator": "isvd"},  # exact: of the full rank
    "janus, in the backward": {"rectify": "tangent"},
    "janus, clipped, recomputed": {"clip_norm": 0.1, "checkpointing": True},
    "janus, fp16": {"amp": "fp16", "batch_size": 1},  # the second process has no image
    "janus, lda, drift, guard": {"head": "lda", "drift": "ridge", "drift_budget": 0.05},
    "janus, ridge of random features": {"head": "ridge", "head_width": 40, "learn": "first"},
    "janus, aligned": {"head": "aligned"},
    "lora": {"method": "lora"},
    "lora-gpm": {"method": "lora-gpm"},
    "inflora": {"method": "inflora"},
    "lora-drs": {"method": "lora-drs", "energy_start": 0.6, "energy_end": 0.6},
    # Of its coefficients some have no effect: Adam would make steps of what rounding leaves of their gradients.
    "bilora": {"method": "bilora", "frequencies": 20, "optimizer": "sgd", "lr": 100.0},
    "joint": {"method": "joint"},
}
PROTECTING = ("janus", "lora-gpm", "inflora", "lora-drs")  # they keep a basis of what they protect
# The triplets of lora-drs lie within what a process has, as within a piece of a batch.
ALONE: dict[str, dict[str, Any]] = {"lora-drs": {"accumulate": RANKS}}


# what each process does -----------------------------------------------------------------------------------------------
def cut(benchmark: Benchmark, weights: Path, folder: Path, rank: int) -> Outcome:
    """The second one alone is asked to end, in the second of the four steps of an epoch; asked again, it goes on."""
    trainer, steps, take = trainer_of(benchmark, weights, folder), [], Learner._step

    def asked(self: Learner, *args: Any) -> Any:
        steps.append(None)
        if rank == 1 and len(steps) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *args)

    Learner._step = asked
    keeping_module.READ_EVERY, keeping_module.AGREE_EVERY = 3, 1e6  # behind every third step, however slow it is
    try:
        trainer.run()
    except Interrupted as stop:
        return {"number": stop.number, "steps": len(steps), "tasks": len(trainer.matrix)}
    finally:
        Learner._step = take
        keeping_module.READ_EVERY, keeping_module.AGREE_EVERY = 20, 2.0
    return {"number": None}


def ended_by(trainer: Trainer, step: Callable[..., Any]) -> str:
    """What a run ends with, where another one is in the place of a step."""
    take = Learner._step
    Learner._step = step
    try:
        trainer.run()
    except TrainingError as error:
        return str(error)
    finally:
        Learner._step = take
    return "nothing"


def spoiled(benchmark: Benchmark, weights: Path, folder: Path, rank: int, amp: str) -> str:
    """A network in which the second process alone computes what is not finite, in the second step."""
    trainer, steps, take = trainer_of(benchmark, weights, folder, amp=amp), [], Learner._step
    module = trainer.learner.model.get_submodule("backbone.blocks.1.mlp.fc1")

    def step(self: Learner, *args: Any) -> Any:
        steps.append(None)
        if rank == 1 and len(steps) == 2:
            module.register_forward_hook(lambda module, given, output: output * torch.inf)
        return take(self, *args)

    return ended_by(trainer, step)


def spoiled_statistics(benchmark: Benchmark, weights: Path, folder: Path, rank: int) -> str:
    """Of the second process alone, in the first step: what nothing but a look at them tells."""
    trainer, steps, take = trainer_of(benchmark, weights, folder, epochs=1), [], Learner._step

    def step(self: Learner, *args: Any) -> Any:
        result = take(self, *args)
        steps.append(None)
        if rank == 1 and len(steps) == 1:
            self.method.estimators["blocks.1.attn.qkv"].statistics.gram.fill_(torch.inf)
        return result

    return ended_by(trainer, step)


def taken_up(benchmark: Benchmark, weights: Path, folder: Path) -> Outcome:
    trainer = trainer_of(benchmark, weights, folder)
    trainer.restore()
    return {"position": trainer.keeping.start.position} | outcome_of(trainer)


def led_astray(benchmark: Benchmark, weights: Path, folder: Path, rank: int) -> Outcome:
    """The second process finds other bases, as another processor might."""
    said, close = [], Janus.close_task
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())

    def other(self: Janus, task: Any) -> Any:
        report = close(self, task)
        if rank == 1:
            for name, layer in self.layers.items():
                layer.protect(self.estimators[self.layers.inputs[name]].adopt(layer.basis[:, :-1]))
        return report

    Janus.close_task = other
    logging.getLogger("janus_ext").addHandler(handler)
    try:
        return outcome_of(trainer_of(benchmark, weights, folder)) | {"said": said}
    finally:
        Janus.close_task = close
        logging.getLogger("janus_ext").removeHandler(handler)


def watching(benchmark: Benchmark, weights: Path, folder: Path) -> Outcome:
    """A method of one's own, whose estimators see a pass before the first step, too."""
    begin = Janus.open_task
    Janus.open_task = lambda self, task: self.watch(task, self.estimators)
    try:
        return outcome_of(trainer_of(benchmark, weights, folder))
    finally:
        Janus.open_task = begin


def gradients(rank: int) -> Outcome:
    """Of three parameters: one that both have a gradient of, one of the first alone, one of nobody."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 3), 1.0 + rank)
    parameters[1].grad = None if rank else torch.arange(6.0).view(2, 3)
    add_up_gradients(parameters)
    return {"gradients": [p.grad for p in parameters]}


def given_up() -> str:
    processes.give_up()
    try:
        processes.gathered(1)
        return "nothing"
    except ProcessError as error:
        return str(error)
    finally:
        processes._given_up = False


def learned(weights: Path, tree: Path, folder: Path, rank: int) -> Outcome:
    learner = learner_of(weights)
    first, second = ([trees.wnid(c) for c in pair] for pair in ((0, 1), (2, 3)))
    learner.learn(tree, first)
    learner.observe(tree)
    try:
        learner.learn(tree, first if rank else second)
        refused = "nothing"
    except ArgumentError as error:
        refused = str(error)
    try:
        learner_of(weights, seed=rank).learn(tree, first)
        seeds = "nothing"
    except ArgumentError as error:
        seeds = str(error)
    learner.learn(tree, second)
    learner.save(folder)
    return {"refused": refused, "seeds": seeds, "state": state_of(learner), "predicted": learner.predict(tree)}


def evaluated(benchmark: Benchmark, weights: Path, folder: Path) -> int:
    """How many images this process has scored, all evaluations together."""
    trainer, images = trainer_of(benchmark, weights, folder, epochs=1), []
    clean, evaluate = trainer.learner.clean_batches, trainer._evaluate

    def counting(index: int) -> Any:
        trainer.learner.clean_batches = lambda split: (images.append(len(batch[1])) or batch for batch in clean(split))
        try:
            return evaluate(index)
        finally:
            trainer.learner.clean_batches = clean

    trainer._evaluate = counting
    trainer.run()
    return sum(images)


def looking_for(found: Path) -> bool:
    """Whether somebody has fetched it; else this one does, which takes a while."""
    there = found.exists()
    time.sleep(0.2)
    found.touch()
    return there


def draws_a_bar() -> bool:
    """On a terminal."""
    sys.stderr.isatty = lambda: True
    return not make_bar(1, 0).disable


def work(rank: int, folder: Path, benchmark: Benchmark, weights: Path, tree: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    outcome = {case: outcome_of(trainer_of(benchmark, weights, folder / case, **CASES[case])) for case in CASES}
    outcome["cut"] = cut(benchmark, weights, folder / "cut", rank)
    outcome["copied"] = processes.from_first(lambda: copied(folder / "cut", folder / "cut for one"))
    outcome["taken up"] = taken_up(benchmark, weights, folder / "cut")
    outcome["led astray"] = led_astray(benchmark, weights, folder / "led astray", rank)
    outcome["learned"] = learned(weights, tree, folder / "learner", rank)
    outcome["watching"] = watching(benchmark, weights, folder / "watching")
    outcome["spoiled"] = [spoiled(benchmark, weights, folder / f"spoiled {amp}", rank, amp) for amp in ("off", "fp16")]
    outcome["spoiled statistics"] = spoiled_statistics(benchmark, weights, folder / "spoiled statistics", rank)
    outcome["gradients"] = gradients(rank)
    outcome["evaluated"] = evaluated(benchmark, weights, folder / "evaluated")
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)}  # as torchrun says
    processes.gathered(rank)  # both are here
    outcome["found"] = processes.in_turn(lambda: looking_for(folder / "fetched"))
    outcome["bar"] = draws_a_bar()
    outcome["given up"] = given_up()
    torch.save(outcome, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


# what comes of it -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    trees.folders(folder, 4, 5)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, hard: Benchmark, weights: Path, tree: Path) -> Path:
    """Where the two processes have left what they have to say."""
    folder: Path = tmp_path_factory.mktemp("together")
    torch.multiprocessing.spawn(work, args=(folder, hard, weights, tree), nprocs=RANKS)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> Callable[[str], list[Outcome]]:
    outcomes = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return lambda matter: [outcome[matter] for outcome in outcomes]


def test_every_method_is_a_case() -> None:
    assert {changes.get("method", "janus") for changes in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("case", CASES)
def test_two_learn_what_one_learns(both, hard, weights, tmp_path, case) -> None:
    one, other = both(case)
    assert_same(one, other)
    assert one["results"]["versions"]["processes"] == RANKS
    alone = outcome_of(trainer_of(hard, weights, tmp_path / "run", **CASES[case] | ALONE.get(case, {})))
    assert_as_one(one, alone, rounding=1e-2 if "fp16" in case else 1e-3)
    assert_unsaturated(one["results"])
    bases = [tensor for part in ("weights", "method") for name, tensor in one[part].items() if name.endswith(".basis")]
    assert any(basis.shape[1] for basis in bases) == (CASES[case].get("method", "janus") in PROTECTING)
    assert one["results"]["acc"] > 100 / 6


def test_the_first_one_writes_the_run(both, folder, hard, weights) -> None:
    trainer = trainer_of(hard, weights, folder / "janus")
    trainer.restore()
    assert trainer.matrix == both("janus")[0]["results"]["accuracy_matrix"]
    assert len(trainer.run_on_disk.epochs()) == 6
    assert not list((folder / "janus").rglob("*.tmp"))


def test_asked_alone_one_ends_all_behind_the_same_step(both) -> None:
    """The tenth step is the second of its epoch; they agree behind the third."""
    assert both("cut") == [{"number": signal.SIGTERM, "steps": 11, "tasks": 1}] * RANKS


def test_what_one_alone_spoils_ends_all_with_the_same_line(both) -> None:
    """In float16, where no weight is spoiled, the module is known of the process that has it."""
    one, other = both("spoiled")
    assert one == other
    said = r"the loss is nan in task 1, epoch 1, step 2; .*"
    assert re.fullmatch(said + r"not finite by then: backbone\..*", one[0])
    assert re.fullmatch(said + r"not finite is that of backbone\.blocks\.1\.mlp\.fc1 there", one[1])


def test_statistics_that_one_alone_spoils_end_all_with_the_same_line(both) -> None:
    one, other = both("spoiled statistics")
    assert one == other
    assert re.match(r"\S*blocks\.1\.attn\.qkv\.gram is not finite in task 1, behind epoch 1 and step 0", one)


def test_each_scores_its_share(both, hard) -> None:
    seen = sum(3 - task for task in range(3)) * len(hard.test) // 3
    shares = both("evaluated")
    assert sum(shares) == seen and min(shares) > seen // 3


def test_what_the_first_fetches_is_there_for_the_other(both) -> None:
    assert both("found") == [False, True]


def test_the_first_alone_draws_a_bar(both) -> None:
    assert both("bar") == [True, False]


def test_a_run_cut_off_is_taken_up_by_two(both) -> None:
    one, other = both("taken up")
    assert_same(one, other)
    assert one["position"] == (0, 3)
    assert_same(one, both("janus")[0])


def test_a_run_cut_off_is_taken_up_by_one(both, folder, hard, weights) -> None:
    found = taken_up(hard, weights, folder / "cut for one")
    assert found["position"] == (0, 3)
    assert_as_one(found, both("janus")[0])


def test_where_bits_differ_all_take_those_of_the_first(both) -> None:
    one, other = both("led astray")
    assert_same(one, other)
    assert_same(one, both("janus")[0])
    assert [line for line in one["said"] if line.startswith("the processes computed other bits")]


def test_what_a_process_saw_before_the_first_step_is_its_own(both, hard, weights, tmp_path) -> None:
    one, other = both("watching")
    assert_same(one, other)
    assert_as_one(one, watching(hard, weights, tmp_path / "run"))


def test_gradients_are_added_up_where_there_are_any(both) -> None:
    for outcome in both("gradients"):
        first, second, third = outcome["gradients"]
        assert torch.equal(first, torch.full((2, 3), 3.0)) and torch.equal(second, torch.arange(6.0).view(2, 3))
        assert third is None


def test_behind_an_error_of_its_own_a_process_says_nothing_more(both) -> None:
    assert all("begin all of them again" in said for said in both("given up"))


def test_a_learner_learns_with_several_processes(both, weights, tree, folder, tmp_path) -> None:
    one, other = both("learned")
    assert one["state"].keys() == other["state"].keys() and one["predicted"] == other["predicted"]
    assert all(torch.equal(tensor, other["state"][name]) for name, tensor in one["state"].items())
    said = "must be the same in all processes, got"
    assert one["refused"] == other["refused"] and one["refused"].startswith(f"ContinualLearner.learn: classes {said} ")
    assert one["seeds"] == other["seeds"] == f"ContinualLearner.learn: seed {said} 0 and, in process 1, 1"
    alone = learner_of(weights)
    alone.learn(tree, [trees.wnid(0), trees.wnid(1)])
    alone.observe(tree)
    alone.learn(tree, [trees.wnid(2), trees.wnid(3)])
    wanted = state_of(alone)
    assert all(relative_error(one["state"][name], wanted[name]) < 1e-3 for name in wanted if "basis" not in name)
    saved = type(alone).load(folder / "learner", device="cpu")
    assert all(torch.equal(tensor, one["state"][name]) for name, tensor in state_of(saved).items())
