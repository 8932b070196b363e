"""--resume: a run that was cut off anywhere ends as if it never had been, and what does not belong to it is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import make_trainer, weights_of, without_time

from janus_ext import checkpoint, train
from janus_ext import trainer as trainer_module
from janus_ext.errors import CheckpointError

FLAGS = (
    "--tasks 4 --limit-per-class 1 --epochs 2 --batch-size 64 --energy-start 0.9 --energy-end 0.9 --no-plots --resume"
)


class CutOff(BaseException):
    """Ends a run on the spot, as a kill does."""


def files_of(folder) -> dict:
    """What a run leaves that another one must repeat: tensors, results and epochs, without their times."""
    tensors = {path.name: checkpoint.read_tensors(path)[0] for path in (folder / "checkpoints").iterdir()}
    epochs = [without_time(line) for line in checkpoint.read_json_lines(folder / "metrics.jsonl")]
    return {"tensors": tensors, "epochs": epochs}


def assert_same_files(folder, other) -> None:
    found, wanted = files_of(folder), files_of(other)
    assert found["epochs"] == wanted["epochs"]
    assert found["tensors"].keys() == wanted["tensors"].keys()
    for name, tensors in wanted["tensors"].items():
        assert found["tensors"][name].keys() == tensors.keys()
        assert all(torch.equal(found["tensors"][name][key], value) for key, value in tensors.items()), name


# every moment at which files change ----------------------------------------------------------------------------------
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("write", range(10))  # 3 tasks x (factors, method, model), and one write that never comes
def test_a_run_cut_off_at_any_write_goes_on(benchmark, weights, tmp_path, monkeypatch, write, moment):
    whole = make_trainer(benchmark, weights, tmp_path / "whole", epochs=2)
    results = without_time(whole.run())
    moves, replace_file = [], os.replace

    def cut(source, target):
        moves.append(target)
        if moment == "before" and len(moves) == write + 1:
            raise CutOff
        replace_file(source, target)
        if moment == "after" and len(moves) == write + 1:
            raise CutOff

    first = make_trainer(benchmark, weights, tmp_path / "run", epochs=2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", cut)
        if write < 9:
            with pytest.raises(CutOff):
                first.run()
        else:
            first.run()
            assert len(moves) == 9
    second = make_trainer(benchmark, weights, tmp_path / "run", epochs=2)
    second.restore()
    assert len(second.matrix) == (write + (moment == "after")) // 3
    assert without_time(second.run()) == results
    assert all(torch.equal(value, weights_of(second)[key]) for key, value in weights_of(whole).items())
    assert_same_files(tmp_path / "run", tmp_path / "whole")


def test_lines_of_unfinished_tasks_are_dropped_and_a_torn_one_with_them(benchmark, weights, tmp_path):
    trainer = make_trainer(benchmark, weights, tmp_path / "run")
    trainer.run()
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text()
    path.write_text(lines + '{"task": 3, "epoch": 0}\n{"task": 3, "ep')
    make_trainer(benchmark, weights, tmp_path / "run").restore()
    assert path.read_text() == lines


def test_kills_do_not_change_the_result(weights, tmp_path):
    """SIGKILL at a moment that nobody chose, in every task, through the command."""
    call = [sys.executable, "-m", "janus_ext.train", *FLAGS.split(), "--weights", str(weights), "--output"]
    subprocess.run([*call, str(tmp_path / "whole")], check=True, capture_output=True)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for lines in (1, 4, 7):
        run = subprocess.Popen([*call, str(tmp_path / "killed")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while run.poll() is None and len(checkpoint.read_json_lines(metrics)) < lines:
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert run.returncode in (-signal.SIGKILL, 0)
    subprocess.run([*call, str(tmp_path / "killed")], check=True, capture_output=True)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole")]
    assert without_time(results[0]) == without_time(results[1])
    assert_same_files(tmp_path / "killed", tmp_path / "whole")


# through the command -------------------------------------------------------------------------------------------------
@pytest.fixture
def cut_off(weights, tmp_path, monkeypatch, capsys):
    """(the call, the folder of its run, which was cut off in the third of four tasks)."""
    call = [*FLAGS.split(), "--weights", str(weights), "--output", str(tmp_path / "run")]
    learn = trainer_module.Trainer._learn

    def cut(self, index, progress):
        learn(self, index, progress)
        if index == 2:
            raise CutOff

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module.Trainer, "_learn", cut)
        with pytest.raises(CutOff):
            train.main(call)
    capsys.readouterr()
    return call, tmp_path / "run"


def test_the_command_goes_on_and_then_takes_what_is_finished(cut_off, capsys):
    call, folder = cut_off
    (folder / "checkpoints" / ".model.safetensors.1.tmp").touch()  # of a write that was cut off
    (folder / ".metrics.jsonl.1.tmp").touch()
    assert train.main(call) == 0
    assert "taken up behind task 2/4" in (folder / "log.txt").read_text()
    assert not list(folder.rglob("*.tmp"))
    assert len(json.loads((folder / "results.json").read_text())["accuracy_matrix"]) == 4
    before = (folder / "results.json").read_bytes()
    capsys.readouterr()
    assert train.main(call) == 0
    assert "has finished before" in capsys.readouterr().out
    assert (folder / "results.json").read_bytes() == before


def test_without_the_flag_the_run_starts_over(cut_off):
    call, folder = cut_off
    assert train.main([flag for flag in call if flag != "--resume"]) == 0
    assert "taken up" not in (folder / "log.txt").read_text()
    assert len(checkpoint.read_json_lines(folder / "metrics.jsonl")) == 8


@pytest.mark.parametrize("change", ["--lr 0.5", "--epochs 3", "--seed 1", "--amp off", "--clip-norm 1", "--tasks 5"])
def test_other_settings_are_refused_by_name(cut_off, capsys, change):
    call, folder = cut_off
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if change == "--amp off" and json.loads((folder / "config.json").read_text())["amp"] == "off":
        change = "--amp bf16"
    assert train.main([*call, *change.split()]) == 2
    message = capsys.readouterr().err
    assert f"another {change.split()[0]}; choose another folder" in message and message.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["model.safetensors", "method-1.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign"])
def test_damaged_files_are_named_and_nothing_is_lost(cut_off, capsys, name, damage):
    call, folder = cut_off
    path = folder / "checkpoints" / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "foreign":
        checkpoint.write_tensors(path, {"x": torch.zeros(1)}, checkpoint.read_tensors(path)[1])
    else:
        path.unlink()
    if (name, damage) == ("model.safetensors", "missing"):  # no task was finished
        assert train.main(call) == 0
        assert "taken up behind task 0/4" in (folder / "log.txt").read_text()
        return
    before = {p: p.read_bytes() for p in folder.rglob("*.*") if p.name != "log.txt" and p.is_file()}
    assert train.main(call) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "safetensors" in message and (damage == "foreign" or name in message)
    assert {p: p.read_bytes() for p in folder.rglob("*.*") if p.name != "log.txt" and p.is_file()} == before


def test_where_nothing_is_a_run_begins_and_files_of_others_are_left_alone(weights, tmp_path, capsys):
    flags = [*FLAGS.split(), "--weights", str(weights), "--output"]
    assert train.main([*flags, str(tmp_path / "fresh")]) == 0
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").touch()
    assert train.main([*flags, str(tmp_path / "theirs")]) == 2
    assert "no run of this program" in capsys.readouterr().err


def test_seeds_go_on_one_by_one_and_more_can_be_added(cut_off, weights, tmp_path, capsys):
    call, run = cut_off
    many = tmp_path / "many"
    many.mkdir()
    run.rename(many / "seed-0")
    call = [*call[:-1], str(many)]
    assert train.main([*call, "--seed", "0", "1"]) == 0
    assert "taken up behind task 2/4" in (many / "seed-0" / "log.txt").read_text()
    first = (many / "seed-0" / "results.json").read_bytes()
    assert train.main([*call, "--seed", "0", "1", "2"]) == 0
    assert json.loads((many / "summary.json").read_text())["seeds"] == [0, 1, 2]
    assert (many / "seed-0" / "results.json").read_bytes() == first
    capsys.readouterr()
    assert train.main([*call, "--seed", "0"]) == 2  # a single run does not go into the folder of several
    assert "holds a finished run" in capsys.readouterr().err


# what the trainer looks at -------------------------------------------------------------------------------------------
def test_other_images_are_refused(benchmark, weights, tmp_path):
    make_trainer(benchmark, weights, tmp_path / "run").run()
    other = replace(benchmark, train=benchmark.train.take(torch.arange(40)))
    with pytest.raises(CheckpointError, match="other images"):
        make_trainer(other, weights, tmp_path / "run").restore()


def test_other_versions_are_said(benchmark, weights, tmp_path, monkeypatch, caplog):
    make_trainer(benchmark, weights, tmp_path / "run").run()
    now = trainer_module.result_versions()
    monkeypatch.setattr(trainer_module, "result_versions", lambda: now | {"torch": "1.0", "threads": 99})
    make_trainer(benchmark, weights, tmp_path / "run").restore()
    assert "begun with another torch, threads" in caplog.text
