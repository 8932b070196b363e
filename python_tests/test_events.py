"""--tensorboard: what the event files hold, and what is said where the package is missing."""

import json
import sys
import time

import pytest
from conftest import make_trainer

from janus_ext import CheckpointError, train
from janus_ext.methods.base import Task
from janus_ext.training import events
from janus_ext.training.loop import Learner


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every tag, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_event_files_hold_the_run(patterns, weights, tmp_path):
    pytest.importorskip("tensorboard")
    results = make_trainer(patterns, weights, tmp_path / "run", tensorboard=True).run()
    found = scalars(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "accuracy", "lr", "head_lr")
    expected = {f"epoch/{name}": [(i + 1, line[name]) for i, line in enumerate(lines)] for name in names}
    means = [sum(row) / len(row) for row in results["accuracy_matrix"]]
    ranks = [sum(rank.values()) / len(rank) for rank in results["basis_rank"]]
    expected |= {"task/acc": [*enumerate(means, 1)], "task/basis_rank": [*enumerate(ranks, 1)]}
    for name, matrix in (
        ("acc_task_known", "accuracy_matrix_task_known"),
        ("task_recognition", "task_recognition_matrix"),
    ):
        expected[f"task/{name}"] = [*enumerate((sum(row) / len(row) for row in results[matrix]), 1)]
    expected |= {f"task/{name}": [*enumerate(results[name], 1)][1:] for name in ("violation", "danger")}
    assert found.keys() == expected.keys() and len(lines) == 9
    for tag, values in expected.items():
        assert found[tag] == [(step, pytest.approx(value)) for step, value in values], tag


class CutOff(Learner):
    """Stops for good in the second task, behind its first epoch."""

    def _train_epoch(self, task: Task, epoch: int, *rest) -> dict:
        if (task.index, epoch) == (1, 1):
            raise KeyboardInterrupt
        return super()._train_epoch(task, epoch, *rest)


def test_a_run_that_was_taken_up_shows_every_step_once(patterns, weights, tmp_path):
    pytest.importorskip("tensorboard")
    make_trainer(patterns, weights, tmp_path / "whole", tensorboard=True).run()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(patterns, weights, tmp_path / "run", CutOff, tensorboard=True).run()
    assert [step for step, _ in scalars(tmp_path / "run")["epoch/loss"]] == [1, 2, 3, 4]
    time.sleep(1.1)  # event files are named, and read in the order, of the second in which they are made
    resumed = make_trainer(patterns, weights, tmp_path / "run", tensorboard=True)
    resumed.restore()
    resumed.run()
    assert scalars(tmp_path / "run") == scalars(tmp_path / "whole")


def test_tasks_without_epochs_are_shown_behind_an_interruption_too(patterns, weights, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    settings = {"learn": "none", "head": "lda", "tensorboard": True}
    trainer = make_trainer(patterns, weights, tmp_path, **settings)
    save = trainer._save

    def stop(index: int) -> None:
        save(index)
        if index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    time.sleep(1.1)
    resumed = make_trainer(patterns, weights, tmp_path, **settings)
    resumed.restore()
    resumed.run()
    assert [step for step, _ in scalars(tmp_path)["task/acc"]] == [1, 2, 3]


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("flush", "close"):
        monkeypatch.setattr(tensorboard.SummaryWriter, name, full)
    with pytest.raises(CheckpointError, match="tensorboard cannot be written: .*No space"):
        with events.writing(tmp_path / "tensorboard") as write:
            write("epoch", {"loss": 1.0}, 1)
    with pytest.raises(ZeroDivisionError), events.writing(tmp_path / "tensorboard"):
        raise ZeroDivisionError
    with pytest.raises(CheckpointError, match="No space"), events.writing(tmp_path / "tensorboard"):
        pass


def test_without_the_flag_nothing_is_written(patterns, weights, tmp_path):
    make_trainer(patterns, weights, tmp_path / "run").run()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert train.main(["--tensorboard", "--output", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--tensorboard" in message and "pip install tensorboard" in message
    assert not (tmp_path / "run").exists()
