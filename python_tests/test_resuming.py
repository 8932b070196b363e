"""--resume: a run that was cut off anywhere ends as if it never had been, and what does not belong to it is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_trainer, weights_of, without_time

from janus_ext import train
from janus_ext.config import TrainConfig
from janus_ext.errors import CheckpointError
from janus_ext.reports import plots
from janus_ext.runs import checkpoint
from janus_ext.runs import folder as run_folder
from janus_ext.runs import run as run_module
from janus_ext.training import trainer as trainer_module

FLAGS = "--tasks 4 --limit-per-class 1 --epochs 3 --batch-size 64 --no-plots --resume"
FLAGS += " --energy-start 0.9 --energy-end 0.9"  # the tiny backbone has room for these


class CutOff(BaseException):
    """Ends a run on the spot, as a kill does."""


def files_of(folder) -> dict:
    """What a run leaves that another one must repeat: tensors, results and epochs, without their times."""
    read = {path.name: checkpoint.read_tensors(path) for path in (folder / "checkpoints").iterdir()}
    epochs = [without_time(line) for line in checkpoint.read_json_lines(folder / "metrics.jsonl")]
    about = {name: without_time(metadata) for name, (_, metadata) in read.items()}
    for metadata in about.values():
        for seal in {run_module.CONFIG, "state"} & set(metadata):  # of config.json, which names the folder
            del metadata[seal]
        if "results" in metadata:
            metadata["results"] = without_time(json.loads(metadata["results"]))
    return {"tensors": {name: tensors for name, (tensors, _) in read.items()}, "about": about, "epochs": epochs}


def assert_same_files(folder, other) -> None:
    found, wanted = files_of(folder), files_of(other)
    assert found["epochs"] == wanted["epochs"]
    assert found["about"] == wanted["about"]
    assert found["tensors"].keys() == wanted["tensors"].keys()
    for name, tensors in wanted["tensors"].items():
        assert found["tensors"][name].keys() == tensors.keys()
        assert all(torch.equal(found["tensors"][name][key], value) for key, value in tensors.items()), name


def test_equal_runs_leave_equal_files(weights, tmp_path, monkeypatch) -> None:
    """All bytes of them but times: docs/commands.md."""
    found = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert train.main([*FLAGS.split(), "--weights", str(weights), "--output", "run"]) == 0
        found.append({str(path): path.read_bytes() for path in Path("run").rglob("*") if path.is_file()})
    assert found[0].keys() == found[1].keys() and "run/checkpoints/method-3.safetensors" in found[0]
    different = {path for path in found[0] if found[0][path] != found[1][path]}
    assert different == {"run/metrics.jsonl", "run/log.txt", "run/results.json", "run/checkpoints/model.safetensors"}
    assert_same_files(tmp_path / "one" / "run", tmp_path / "other" / "run")


# every moment at which files change ----------------------------------------------------------------------------------
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("write", range(16))  # 3 tasks x (2 epochs, factors, method, model), and one that never comes
def test_a_run_cut_off_at_any_write_goes_on(patterns, weights, tmp_path, monkeypatch, write, moment):
    whole = make_trainer(patterns, weights, tmp_path / "whole", epochs=2)
    results = without_time(whole.run())
    moves, replace_file = [], os.replace

    def cut(source, target):
        moves.append(target)
        if moment == "before" and len(moves) == write + 1:
            raise CutOff
        replace_file(source, target)
        if moment == "after" and len(moves) == write + 1:
            raise CutOff

    first = make_trainer(patterns, weights, tmp_path / "run", epochs=2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", cut)
        if write < 15:
            with pytest.raises(CutOff):
                first.run()
        else:
            first.run()
            assert len(moves) == 15
    second = make_trainer(patterns, weights, tmp_path / "run", epochs=2)
    second.restore()
    assert len(second.matrix) == (write + (moment == "after")) // 5
    assert without_time(second.run()) == results
    assert all(torch.equal(value, weights_of(second)[key]) for key, value in weights_of(whole).items())
    assert_same_files(tmp_path / "run", tmp_path / "whole")


def test_lines_of_unfinished_tasks_are_dropped_and_a_torn_one_with_them(patterns, weights, tmp_path):
    make_trainer(patterns, weights, tmp_path / "run").run()
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text()
    path.write_text(lines + '{"task": 3, "epoch": 0}\n{"task": 3, "ep')
    make_trainer(patterns, weights, tmp_path / "run").restore()
    assert path.read_text() == lines


def test_altered_lines_are_said(patterns, weights, tmp_path, caplog):
    make_trainer(patterns, weights, tmp_path / "run").run()
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for text in (lines[1:], [*lines, lines[-1]], [*lines[::-1]]):
        caplog.clear()
        path.write_text("".join(text))
        make_trainer(patterns, weights, tmp_path / "run").restore()
        assert "metrics.jsonl was altered" in caplog.text
    path.write_text("5\n")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl cannot be read"):
        make_trainer(patterns, weights, tmp_path / "run").restore()


def test_kills_do_not_change_the_result(weights, tmp_path):
    """SIGKILL at moments that nobody chose, in three of four tasks, through the command."""
    call = [sys.executable, "-m", "janus_ext.train", *FLAGS.split(), "--weights", str(weights), "--output"]
    subprocess.run([*call, str(tmp_path / "whole")], check=True, capture_output=True)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for lines in (1, 4, 8):
        run = subprocess.Popen([*call, str(tmp_path / "killed")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while run.poll() is None and len(checkpoint.read_json_lines(metrics)) < lines:
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert run.returncode == -signal.SIGKILL
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

    def cut(self, index, *rest):
        learn(self, index, *rest)
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
    assert "goes on after task 2/4" in (folder / "log.txt").read_text()
    assert not list(folder.rglob("*.tmp"))
    assert len(json.loads((folder / "results.json").read_text())["accuracy_matrix"]) == 4
    before = (folder / "results.json").read_bytes()
    capsys.readouterr()
    assert train.main(call) == 0
    assert "has finished before" in capsys.readouterr().out
    assert (folder / "results.json").read_bytes() == before


def test_without_the_flag_the_run_starts_over_and_says_so(cut_off, caplog):
    call, folder = cut_off
    assert train.main([flag for flag in call if flag != "--resume"]) == 0
    assert "holds an unfinished run: it starts over" in caplog.text
    assert "taken up" not in (folder / "log.txt").read_text()
    assert len(checkpoint.read_json_lines(folder / "metrics.jsonl")) == 12


@pytest.mark.parametrize("change", ["--lr 0.5", "--epochs 2", "--seed 1", "--amp off", "--clip-norm 1", "--tasks 5"])
def test_other_settings_are_refused_by_name(cut_off, capsys, change):
    call, folder = cut_off
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    stored = json.loads((folder / "config.json").read_text())
    if change == "--amp off" and stored["amp"] == "off":
        change = "--amp bf16"
    assert train.main([*call, *change.split()]) == 2
    message = capsys.readouterr().err
    flag, asked = change.split()
    was = stored[flag[2:].replace("-", "_")]
    was = {None: "left out"}.get(was, was) if flag != "--seed" else was[0]
    expected = (
        f"holds a run with other settings: {flag} {was} (asked: {float(asked) if flag == '--clip-norm' else asked});"
    )
    assert f"{expected} choose another folder" in message and message.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_number_of_tasks_is_a_setting_where_it_is_left_out(cut_off, capsys):
    call, folder = cut_off
    fewer = [*call[2:]]  # without --tasks 4: the benchmark's ten
    assert train.main(fewer) == 2
    assert "other settings: --tasks 4 (asked: 10); choose" in capsys.readouterr().err
    assert train.main(call) == 0
    assert train.main(fewer) == 2
    assert "other settings: --tasks 4 (asked: 10); choose" in capsys.readouterr().err


def test_a_lost_setting_is_noticed(cut_off, capsys):
    call, folder = cut_off
    stored = checkpoint.read_json(folder / "config.json")
    checkpoint.write_json(folder / "config.json", {key: value for key, value in stored.items() if key != "lr"})
    assert train.main(call) == 2
    assert "of another version of this program: --lr not stored (asked: 0.004); choose" in capsys.readouterr().err


def damage_tensors(path, how: str) -> None:
    """Truncates a file, changes one byte of its tensors, one of its metadata, or puts another file in its place."""
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[:-1000])
    elif how == "missing":
        path.unlink()
    elif how == "foreign":
        checkpoint.write_tensors(path, {"x": torch.zeros(1)}, checkpoint.read_tensors(path)[1])
    else:
        position = -1 if how == "tensor altered" else data.index(b'"task"') + len('"task":"')
        data[position] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "method-1.safetensors"])
@pytest.mark.parametrize("how", ["truncated", "missing", "foreign", "tensor altered", "metadata altered"])
def test_damaged_files_are_named_and_nothing_is_lost(cut_off, capsys, name, how):
    call, folder = cut_off
    damage_tensors(folder / "checkpoints" / name, how)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.name != "log.txt"}
    assert train.main(call) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and name in message
    assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.name != "log.txt"} == before


def test_the_state_of_another_run_is_refused(cut_off, capsys):
    call, folder = cut_off
    path = folder / "checkpoints" / "method-1.safetensors"
    state, about = checkpoint.read_tensors(path)
    checkpoint.write_tensors(path, {name: tensor * 2 for name, tensor in state.items()}, about)
    assert train.main(call) == 2
    assert "method-1.safetensors does not belong to" in capsys.readouterr().err


def test_a_model_of_an_earlier_version_is_refused(cut_off, capsys):
    call, folder = cut_off
    path = folder / "checkpoints" / "model.safetensors"
    tensors, about = checkpoint.read_tensors(path)
    older = {key: value for key, value in json.loads(about["results"]).items() if "task_recognition" not in key}
    for change in ({"results": json.dumps(older)}, {}):
        kept = {key: about[key] for key in ("task", "method", "scale")}
        checkpoint.write_tensors(path, tensors, kept | change)
        assert train.main(call) == 2
        assert "an earlier version of this program wrote it" in capsys.readouterr().err


def test_an_interrupt_is_one_line_that_tells_how_to_go_on(weights, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module.Trainer, "_learn", interrupt)
    assert train.main([*FLAGS.split(), "--weights", str(weights), "--output", str(tmp_path / "run")]) == 130
    message = capsys.readouterr().err
    assert "with --resume goes on" in message and "Traceback" not in message


def test_a_folder_in_use_is_refused_by_the_command(cut_off, capsys):
    call, folder = cut_off
    with run_folder.opened(folder, TrainConfig().resolved().to_json(), begin=False):
        assert train.main(call) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "in use" in message


def test_plots_that_a_kill_prevented_are_drawn(cut_off):
    call, folder = cut_off
    assert train.main(call) == 0
    assert train.main([flag for flag in call if flag != "--no-plots"]) == 0
    assert {path.stem for path in (folder / "plots").iterdir()} == set(plots.PLOTS)


@pytest.mark.parametrize("text", ["{}", "[]", '{"split_sha256": 5}'])
def test_damaged_results_are_named(cut_off, capsys, text):
    call, folder = cut_off
    (folder / "results.json").write_text(text)
    assert train.main(call) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "results.json" in message


def test_where_nothing_is_a_run_begins_and_files_of_others_are_left_alone(weights, tmp_path, capsys):
    flags = [*FLAGS.split(), "--weights", str(weights), "--output"]
    assert train.main([*flags, str(tmp_path / "fresh")]) == 0
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").touch()
    assert train.main([*flags, str(tmp_path / "theirs")]) == 2
    assert "no run of this program" in capsys.readouterr().err


def test_seeds_go_on_one_by_one_and_more_can_be_added(cut_off, weights, tmp_path, capsys):
    call, run = cut_off
    assert train.main([*call, "--seed", "0", "1"]) == 2  # nor do several go into the folder of one
    assert "holds a run with one seed" in capsys.readouterr().err
    many = tmp_path / "many"
    many.mkdir()
    run.rename(many / "seed-0")
    call = [*call[:-1], str(many)]
    assert train.main([*call, "--seed", "0", "1"]) == 0
    assert "goes on after task 2/4" in (many / "seed-0" / "log.txt").read_text()
    first = (many / "seed-0" / "results.json").read_bytes()
    assert train.main([*call, "--seed", "0", "1", "2"]) == 0
    assert json.loads((many / "summary.json").read_text())["seeds"] == [0, 1, 2]
    capsys.readouterr()
    assert train.main([*call, "--seed", "0", "3"]) == 2
    assert "has seeds [1, 2], too" in capsys.readouterr().err
    assert (many / "seed-0" / "results.json").read_bytes() == first
    capsys.readouterr()
    assert train.main([*call, "--seed", "0"]) == 2  # a single run does not go into the folder of several
    assert "holds a finished run" in capsys.readouterr().err


# what the trainer looks at -------------------------------------------------------------------------------------------
def test_other_images_are_refused(patterns, weights, tmp_path):
    make_trainer(patterns, weights, tmp_path / "run").run()
    other = replace(patterns, train=patterns.train.take(torch.arange(40)))
    with pytest.raises(CheckpointError, match="other image files"):
        make_trainer(other, weights, tmp_path / "run").restore()


def test_other_versions_are_said(patterns, weights, tmp_path, monkeypatch, caplog):
    make_trainer(patterns, weights, tmp_path / "run").run()
    now = trainer_module.result_versions()
    monkeypatch.setattr(trainer_module, "result_versions", lambda: now | {"torch": "1.0", "threads": 99})
    make_trainer(patterns, weights, tmp_path / "run").restore()
    assert "other versions, threads or processes (torch, threads)" in caplog.text


def test_what_an_earlier_version_measured_goes_on(patterns, weights, tmp_path):
    """Its results lack what came later: one head was measured, and how far features moved is not known."""
    results = make_trainer(patterns, weights, tmp_path / "run", epochs=1, head="linear").run()
    earlier = {name: value for name, value in results.items() if name not in ("heads", "head", "movement", "merged")}
    trainer = make_trainer(patterns, weights, tmp_path / "other", epochs=1, head="linear")
    trainer._restore_results(earlier)
    assert trainer.heads == {"linear": results["accuracy_matrix"]} and trainer.matrix == results["accuracy_matrix"]
    assert trainer.results()["movement"] == trainer.results()["merged"] == [None] * 3
