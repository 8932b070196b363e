"""A run that is cut off within a task goes on from there, and ends as if it never had been."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_trainer, weights_of, without_time
from test_resuming import CutOff, assert_same_files

from janus_ext import train
from janus_ext.data.benchmark import Benchmark, MemorySplit
from janus_ext.errors import CheckpointError, Interrupted, TrainingError
from janus_ext.runs import checkpoint
from janus_ext.training import keeping as keeping_module
from janus_ext.training.loop import Learner
from janus_ext.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("within")

CASES: dict[str, dict[str, Any]] = {
    "janus": {"method": "janus"},
    "janus, isvd": {"method": "janus", "estimator": "isvd", "estimator_rank": 12},
    "janus, adamw, clipped, accumulated": {"optimizer": "adamw", "clip_norm": 1.0, "accumulate": 2},
    "janus, sgd": {"optimizer": "sgd"},
    "janus, fp16": {"amp": "fp16"},
    "janus, lda, ridge drift, guard": {"head": "lda", "drift": "ridge", "drift_budget": 0.05},
    "janus, aligned": {"head": "aligned"},
    "janus, first task": {"learn": "first", "head": "ncm"},
    "janus, half merged": {"merge_scale": 0.5},
    "frozen": {"learn": "none", "head": "linear"},
    "lora": {"method": "lora"},
    "lora-gpm, exact": {"method": "lora-gpm", "rectify": "exact"},
    "inflora": {"method": "inflora"},
    "lora-drs": {"method": "lora-drs", "energy_start": 0.6, "energy_end": 0.6},
    "bilora": {"method": "bilora", "frequencies": 20},
    "joint": {"method": "joint"},
}
STEPS = 4 * 3  # of a task: 16 images in batches of 4, 3 epochs


def trainer_of(benchmark, weights, folder, cls=Trainer, **changes) -> Trainer:
    return make_trainer(benchmark, weights, folder, cls, batch_size=4, epochs=3, **changes)


def joined(benchmark: Benchmark, changes: dict[str, Any]) -> Benchmark:
    """All classes in one task, for the method that learns them so; of a third of the images, as in one of three."""
    if changes.get("method") != "joint":
        return benchmark
    return replace(benchmark, tasks=(benchmark.class_order,), train=benchmark.train.take(torch.arange(0, 48, 3)))


def signalled(monkeypatch: pytest.MonkeyPatch, step: int, number: int, times: int = 1) -> None:
    """Lets this process get a signal while it computes a step, counted from 1 over the whole run."""
    done, take = [], Learner._step

    def stepping(self, *args):
        done.append(None)
        if len(done) == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return take(self, *args)

    monkeypatch.setattr(Learner, "_step", stepping)


@pytest.fixture(scope="module")
def whole(patterns, weights, tmp_path_factory):
    """The run of a case that nobody cuts off, once for all moments."""
    made: dict[str, tuple[dict, dict, Path]] = {}

    def run(case: str) -> tuple[dict, dict, Path]:
        if case not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            trainer = trainer_of(joined(patterns, CASES[case]), weights, folder, **CASES[case])
            made[case] = without_time(trainer.run()), weights_of(trainer), folder
        return made[case]

    return run


# the same bits --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [2, 11, STEPS, STEPS + 10])  # of the first epoch, the last, behind it; the second task
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_cut_off_within_a_task_has_the_same_bits(
    patterns, weights, tmp_path, monkeypatch, whole, case, step
):
    changes, benchmark = CASES[case], joined(patterns, CASES[case])
    first = trainer_of(benchmark, weights, tmp_path / "run", **changes)
    if step > STEPS and (case == "joint" or changes.get("learn") == "first"):
        pytest.skip("nothing is trained in a second task")
    with monkeypatch.context() as patched:
        signalled(patched, step, signal.SIGTERM)
        with pytest.raises(Interrupted):
            first.run()
    second = trainer_of(benchmark, weights, tmp_path / "run", **changes)
    second.restore()
    task, done = divmod(step - 1, STEPS)  # the step that is computed is the last one
    epoch, before = divmod(done, STEPS // 3)
    assert len(second.matrix) == task and second.keeping.start.position == (epoch, before + 1)
    results, tensors, folder = whole(case)
    assert without_time(second.run()) == results
    assert all(torch.equal(value, tensors[name]) for name, value in weights_of(second).items())
    assert_same_files(tmp_path / "run", folder)


def test_it_is_cut_off_again_and_again(patterns, weights, tmp_path, monkeypatch, whole):
    """In the third step of each process."""
    cuts, found = 0, None
    while found is None:
        trainer = trainer_of(patterns, weights, tmp_path / "run")
        trainer.restore()
        with monkeypatch.context() as patched:
            signalled(patched, 3, signal.SIGTERM)
            try:
                found = trainer.run()
            except Interrupted:
                cuts += 1
    assert cuts == STEPS  # a third of the steps of three tasks
    assert without_time(found) == whole("janus")[0]
    assert_same_files(tmp_path / "run", whole("janus")[2])


def test_a_warning_writes_the_state_and_goes_on(patterns, weights, tmp_path, monkeypatch, whole):
    written: list[tuple[int, int]] = []
    trainer = trainer_of(patterns, weights, tmp_path / "run", save_every="100")
    keep = trainer.keeping.write
    trainer.keeping.write = lambda state: (written.append(state.position), keep(state))
    signalled(monkeypatch, 6, signal.SIGUSR1)
    assert without_time(trainer.run()) == whole("janus")[0]
    assert written == [(1, 2), (3, 0), (3, 0), (3, 0)]  # and behind the last epoch of each task


@pytest.mark.parametrize("every", ["1", "2", "3", "7"])
def test_it_is_written_behind_every_so_many_epochs_and_the_last(patterns, weights, tmp_path, every):
    written: list[tuple[int, int]] = []
    trainer = trainer_of(patterns, weights, tmp_path / "run", save_every=every)
    trainer.keeping.write = lambda state: written.append(state.position)
    trainer.run()
    behind = [e for e in (1, 2, 3) if e % int(every) == 0 or e == 3]
    assert written == [(e, 0) for _ in range(3) for e in behind]


def test_it_is_written_when_minutes_have_passed(patterns, weights, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(keeping_module.time, "monotonic", lambda: now[0])
    written: list[tuple[int, int]] = []
    trainer = trainer_of(patterns, weights, tmp_path / "run", save_every="2.5m")
    trainer.keeping.write = lambda state: written.append(state.position)
    take = Learner._step

    def minute(self, *args):
        now[0] += 60
        return take(self, *args)

    monkeypatch.setattr(Learner, "_step", minute)
    trainer.run()
    assert written[:4] == [(0, 3), (1, 2), (2, 1), (2, 4)]
    assert written.count((3, 0)) == 3, "behind the last epoch of every task: what comes next has no step to end behind"


@pytest.mark.parametrize("task", [1, 3])  # the first, and the last, behind which no step comes
def test_a_signal_while_the_last_state_of_a_task_is_written_ends_the_run(patterns, weights, tmp_path, whole, task):
    trainer, written = trainer_of(patterns, weights, tmp_path / "run"), []
    keep = trainer.keeping.write

    def keep_and_be_asked(state):
        keep(state)
        written.append(state.position)
        if written.count((3, 0)) == task:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.keeping.write = keep_and_be_asked
    with pytest.raises(Interrupted):
        trainer.run()
    second = trainer_of(patterns, weights, tmp_path / "run")
    second.restore()
    assert len(second.matrix) == task - 1 and second.keeping.start.position == (3, 0)
    assert without_time(second.run()) == whole("janus")[0]


@pytest.mark.parametrize("torn", ["", '{"task": 0, "epo', '{"task": 0'])
def test_a_first_line_that_is_torn_is_dropped(patterns, weights, tmp_path, monkeypatch, torn):
    """Within the first epoch: no line is whole."""
    with monkeypatch.context() as patched:
        signalled(patched, 2, signal.SIGTERM)
        with pytest.raises(Interrupted):
            trainer_of(patterns, weights, tmp_path / "run").run()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(torn)
    second = trainer_of(patterns, weights, tmp_path / "run")
    second.restore()
    second.run()
    epochs = checkpoint.read_json_lines(path)
    assert [(line["task"], line["epoch"]) for line in epochs] == [(t, e) for t in range(3) for e in range(3)]


@pytest.mark.parametrize("step", [2, STEPS + 2])  # of the first task, behind which nothing else tells of it, and later
def test_other_versions_or_threads_are_said(patterns, weights, tmp_path, monkeypatch, caplog, step):
    from janus_ext.training import trainer as module

    with monkeypatch.context() as patched:
        signalled(patched, step, signal.SIGTERM)
        with pytest.raises(Interrupted):
            trainer_of(patterns, weights, tmp_path / "run").run()
    trainer_of(patterns, weights, tmp_path / "run").restore()
    assert "begun with" not in caplog.text
    present = module.result_versions()
    monkeypatch.setattr(module, "result_versions", lambda: present | {"threads": 99, "torch": "1.0"})
    trainer_of(patterns, weights, tmp_path / "run").restore()
    assert caplog.text.count("begun with other versions, threads or processes (torch, threads)") == 1


# what is in the file --------------------------------------------------------------------------------------------------
@pytest.fixture
def cut(patterns, weights, tmp_path, monkeypatch) -> Path:
    """The folder of a run that was cut off in the second epoch of its second task."""
    with monkeypatch.context() as patched:
        signalled(patched, STEPS + 6, signal.SIGTERM)
        with pytest.raises(Interrupted):
            trainer_of(patterns, weights, tmp_path / "run").run()
    return tmp_path / "run"


@pytest.mark.parametrize("how", ["truncated", "altered", "foreign", "no state", "list", "no random", "epoch", "step"])
def test_a_damaged_file_is_named_and_nothing_is_lost(patterns, weights, cut, how):
    path = cut / "checkpoints" / "within.safetensors"
    data = bytearray(path.read_bytes())
    tensors, about = checkpoint.read_tensors(path)
    if how == "truncated":
        path.write_bytes(data[:-100])
    elif how == "altered":
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "foreign":
        checkpoint.write_tensors(path, {**tensors, "parameters.0": torch.zeros(5)}, about)
    elif how == "no state":
        checkpoint.write_tensors(path, tensors, {"behind": about["behind"]})
    elif how == "no random":
        del tensors["random.cpu"]
        checkpoint.write_tensors(path, tensors, about)
    else:
        state = json.loads(about["state"])
        changed = [] if how == "list" else state | {how: 99}
        checkpoint.write_tensors(path, tensors, about | {"state": json.dumps(changed)})
    before = {file: file.read_bytes() for file in cut.rglob("*.*")}
    second = trainer_of(patterns, weights, cut)
    with pytest.raises(CheckpointError, match="within.safetensors|what was kept within the task does not fit"):
        second.restore()
        second.run()
    assert {file: file.read_bytes() for file in cut.rglob("*.*")} == before
    path.unlink()
    third = trainer_of(patterns, weights, cut)
    third.restore()
    assert third.keeping.start is None and len(third.matrix) == 1


def test_what_a_kill_left_of_a_finished_task_is_removed(patterns, weights, tmp_path, monkeypatch, whole):
    """Between the model's file, with which a task is finished, and the removal of what was kept within it."""
    from janus_ext.runs import run as run_module

    remove = run_module.remove

    def cut(paths):
        paths = list(paths)
        if any(path.name == "within.safetensors" for path in paths):
            raise CutOff
        remove(paths)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "remove", cut)
        with pytest.raises(CutOff):
            trainer_of(patterns, weights, tmp_path / "run").run()
    assert (tmp_path / "run" / "checkpoints" / "within.safetensors").exists()
    second = trainer_of(patterns, weights, tmp_path / "run")
    second.restore()
    assert second.keeping.start is None and len(second.matrix) == 1
    assert without_time(second.run()) == whole("janus")[0]
    assert_same_files(tmp_path / "run", whole("janus")[2])


def test_a_task_that_fails_leaves_the_state_before(patterns, weights, tmp_path, monkeypatch):
    take, steps = Learner._step, []

    def failing(self, *args):
        steps.append(None)
        if len(steps) == 7:
            raise TrainingError("the loss is nan")
        return take(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "_step", failing)
        with pytest.raises(TrainingError):
            trainer_of(patterns, weights, tmp_path / "run").run()
    second = trainer_of(patterns, weights, tmp_path / "run")
    second.restore()
    assert second.keeping.start.position == (1, 0)


def test_the_state_holds_no_frozen_weight(patterns, weights, cut):
    tensors, _ = checkpoint.read_tensors(cut / "checkpoints" / "within.safetensors")
    trainer = trainer_of(patterns, weights, cut.parent / "other")
    frozen = sum(p.numel() for p in trainer.learner.model.backbone.parameters())
    assert sum(tensor.numel() for name, tensor in tensors.items() if "method" not in name) < frozen / 2


@pytest.mark.parametrize("text", ["0", "0m", "-1", "1.5", "m", "1h", "ten", "", "1 m", "9" * 20 + "m", "1٣"])
def test_how_often_must_be_clear(text, capsys):
    assert train.main(["--save-every", text]) == 2
    assert "--save-every must be a number of epochs (2) or minutes (10m)" in capsys.readouterr().err


# batches that are passed over -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("skip", [0, 1, 3, 5])
def test_batches_that_are_passed_over_change_no_other(patterns, skip):
    def noisy(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (images + torch.randint(9, images.shape, generator=generator)).to(torch.uint8)

    split = MemorySplit(patterns.train.images, patterns.train.labels, patterns.train.samples, noisy)
    batches = torch.arange(20).split(4)
    every, left = (list(split.stream(batches, torch.Generator().manual_seed(1), n)) for n in (0, skip))
    assert len(left) == 5 - skip
    for (images, labels), (wanted, classes) in zip(left, every[skip:], strict=True):
        assert torch.equal(images, wanted) and torch.equal(labels, classes)


# what a disk may do ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1000, 20_000, 60_000])
def test_a_limit_of_a_file_ends_the_run_in_a_line_and_what_was_kept_is_whole(weights, tmp_path, size):
    """No file may grow beyond so many bytes, which is an error of its own; test_disk.py has a disk that is full."""
    flags = "--tasks 2 --limit-per-class 2 --epochs 2 --batch-size 64 --no-plots --resume --energy-start 0.9"
    call = [sys.executable, "-m", "janus_ext.train", *flags.split(), "--energy-end", "0.9", "--weights", str(weights)]
    call += ["--output", str(tmp_path / "run")]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
    limit += f"import sys; sys.argv = {call[2:]!r}; from janus_ext.train import main; sys.exit(main(sys.argv[1:]))"
    full = subprocess.run([sys.executable, "-c", limit], capture_output=True, text=True)
    assert full.returncode == 2, full.stderr
    assert "cannot be written" in full.stderr and full.stderr.strip().count("\n") == 0
    assert not list(tmp_path.rglob("*.tmp"))
    subprocess.run(call, check=True, capture_output=True)
    whole = [*call[:-1], str(tmp_path / "whole")]
    subprocess.run(whole, check=True, capture_output=True)
    assert_same_files(tmp_path / "run", tmp_path / "whole")


def test_equal_states_are_equal_files(tmp_path):
    """Whatever the order in which metadata and tensors were given, and in every process."""
    tensors = {name: torch.full((3,), float(i)) for i, name in enumerate("abcde")}
    about = {name: "é" * i for i, name in enumerate("vwxyz")}
    checkpoint.write_tensors(tmp_path / "one", tensors, about)
    code = (
        "import torch; from pathlib import Path; from janus_ext.runs import checkpoint;"
        "tensors = {name: torch.full((3,), float(i)) for i, name in reversed(list(enumerate('abcde')))};"
        "about = {name: '\\u00e9' * i for i, name in reversed(list(enumerate('vwxyz')))};"
        f"checkpoint.write_tensors(Path({str(tmp_path / 'other')!r}), tensors, about)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    read, metadata = checkpoint.read_tensors(tmp_path / "one")
    assert metadata.items() >= about.items() and all(torch.equal(read[name], t) for name, t in tensors.items())
