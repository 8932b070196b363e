"""What a command shows while it works: the lines at the start, the bar, a line an epoch, and an end nobody reads."""

import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TextIO

import pytest
from conftest import make_trainer
from tqdm import tqdm

from janus_ext import info, report, train
from janus_ext.runs.checkpoint import read_json
from janus_ext.terminal import until_closed
from janus_ext.training import opening
from janus_ext.training.progress import BAR

FLAGS = "--method lora --tasks 3 --limit-per-class 1 --epochs 1 --batch-size 200 --no-plots".split()
CLOSED = 128 + signal.SIGPIPE


# the start -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "count"),  # two blocks, K and V, width 32, rank 4
    [("janus", 4 * 64 * 4), ("lora", 4 * 64 * 4), ("inflora", 4 * 32 * 4), ("bilora", 4 * 100)],
)
def test_a_run_says_what_it_resolved(patterns, weights, tmp_path, monkeypatch, method, count):
    monkeypatch.setattr(opening.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(opening, "available_cores", lambda: 4)
    spectral = {"frequencies": 100} if method == "bilora" else {}
    trainer = make_trainer(patterns, weights, tmp_path, method=method, epochs=3, batch_size=6, lr=2e-3, **spectral)
    device, adapted, learning = opening.lines(trainer)
    assert device.startswith("cpu (") and device.endswith("), float32, 3 threads")
    whole = sum(p.numel() for p in trainer.learner.model.backbone.parameters())
    assert adapted == (
        f"{method}: 2 of 2 attention layers adapted, {count:,} of {whole:,} parameters trained, and the heads"
    )
    assert learning == (
        "adam, rate 0.002, of the heads 0.01, cosine; 3 epochs, batches of 6, 27 steps; "
        "3 tasks x 2 classes, 48 training and 24 test images"
    )


@pytest.mark.parametrize(
    ("threads", "cores", "said"),
    [(2, 2, "2 threads"), (8, 2, "8 threads on 2 cores: OMP_NUM_THREADS=2 is faster"), (1, 8, "1 thread")],
)
def test_more_threads_than_cores_are_said(patterns, weights, tmp_path, monkeypatch, threads, cores, said):
    monkeypatch.setattr(opening.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(opening, "available_cores", lambda: cores)
    assert opening.lines(make_trainer(patterns, weights, tmp_path))[0].endswith(f"), float32, {said}")


def test_tasks_of_different_sizes_and_single_things_are_said_as_they_are(patterns, weights, tmp_path):
    single = replace(patterns, tasks=((0, 1, 2, 3, 4, 5),))
    trainer = make_trainer(single, weights, tmp_path, method="joint", tasks=1, epochs=1, batch_size=48)
    assert "; 1 epoch, batches of 48, 1 step; 1 task x 6 classes, " in opening.lines(trainer)[2]
    uneven = replace(patterns, tasks=((0, 1), (2, 3, 4, 5)))
    assert "2 tasks x 2 to 4 classes" in opening.lines(make_trainer(uneven, weights, tmp_path))[2]


def test_the_lines_come_before_the_first_task_and_into_the_log(weights, tmp_path, capsys):
    assert train.main([*FLAGS, "--weights", str(weights), "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out.splitlines()
    logged = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in logged] == printed[: len(logged)]
    assert printed[1].startswith("cpu (") and printed[2].startswith("lora: 2 of 2 attention layers")
    assert printed[3].endswith("3 tasks x 66 to 67 classes, 200 training and 200 test images")


# while it trains -----------------------------------------------------------------------------------------------------
def test_half_of_a_narrow_terminal_is_left_to_the_bar():
    line = tqdm.format_meter(
        4500, 10000, 4000.0, ncols=80, prefix="task 10/10: ", postfix="loss 0.123, accuracy 45 %", bar_format=BAR
    )
    assert len(line) == 80 and line.startswith("task 10/10:  45% |")
    assert len(line.split("|")[1]) >= 20
    assert line.endswith("1:21:28 left, loss 0.123, accuracy 45 %")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("out", "err", "lines"), [(io.StringIO, io.StringIO, 6), (io.StringIO, Terminal, 6), (Terminal, Terminal, 0)]
)
def test_output_into_a_pipe_has_a_line_an_epoch(patterns, weights, tmp_path, monkeypatch, caplog, out, err, lines):
    monkeypatch.setattr(sys, "stdout", out())
    monkeypatch.setattr(sys, "stderr", err())
    with caplog.at_level(logging.INFO, "janus_ext"):
        make_trainer(patterns, weights, tmp_path / "run", method="lora", epochs=2).run()
    epochs = [record.getMessage() for record in caplog.records if "epoch" in record.getMessage()]
    assert len(epochs) == lines
    if lines:
        assert epochs[3].startswith("task 2/3, epoch 2/2: loss ")
        metric = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[3]
        assert f'"accuracy": {float(epochs[3].split("accuracy ")[1].split(" ")[0])}' in metric
    if err is Terminal:
        assert "task 3/3: 100% |" in sys.stderr.getvalue()


# the end -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A stream into a pipe whose reader has left."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        yield stream


def test_training_ends_quietly_when_nobody_reads_on_and_can_be_taken_up(weights, tmp_path, monkeypatch, capsys, unread):
    call = [*FLAGS, "--weights", str(weights), "--output"]
    assert train.main([*call, str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", unread)
        with pytest.raises(SystemExit) as ended:
            train.main([*call, str(tmp_path / "run")])
    assert ended.value.code == CLOSED and capsys.readouterr().err == ""
    assert train.main([*call, str(tmp_path / "run"), "--resume"]) == 0
    whole, resumed = (read_json(tmp_path / name / "results.json") for name in ("whole", "run"))
    assert resumed["accuracy_matrix"] == whole["accuracy_matrix"]


def test_a_report_that_nobody_reads_ends_quietly(unread):
    done = subprocess.run([sys.executable, "-m", "janus_ext.info"], stdout=unread, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (CLOSED, b"")


def test_help_that_nobody_reads_ends_quietly(monkeypatch, capsys, unread):
    monkeypatch.setattr(sys, "stdout", unread)
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == CLOSED and capsys.readouterr().err == ""


def test_a_command_works_without_any_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert until_closed(lambda: print("into nothing") or sys.stdout.name)() == os.devnull
    sys.stdout.close()


def test_without_a_standard_error_nothing_else_comes_into_the_output(monkeypatch, capsys):
    """print() takes None for the standard output."""
    monkeypatch.setattr(sys, "stderr", None)
    assert report.main(["/absent"]) == 2
    assert capsys.readouterr().out == ""
    sys.stderr.close()


def test_a_pipe_that_breaks_elsewhere_is_an_error():
    @until_closed
    def command() -> None:
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        command()


@pytest.mark.parametrize("command", [info.main, train.main])
def test_help_has_no_marks(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit) as ended:
        command()
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "--help" in printed and "`" not in printed
