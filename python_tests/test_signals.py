"""Signals: the run is kept before it ends, whoever gets them, and what was ignored stays so."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import without_time
from PIL import Image
from test_resuming import assert_same_files
from test_resuming_within import signalled, trainer_of

from janus_ext import processes
from janus_ext.errors import Interrupted
from janus_ext.methods.janus import Janus
from janus_ext.runs import checkpoint
from janus_ext.training import keeping as keeping_module
from janus_ext.training.keeping import Keeping
from janus_ext.training.trainer import Trainer


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """SIGINT is heeded here, as in a terminal, and by the processes that a test starts: shells have those that they
    start in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_it_at_once(patterns, weights, tmp_path, monkeypatch, number):
    trainer = trainer_of(patterns, weights, tmp_path / "run")
    signalled(monkeypatch, 6, number, times=2)
    with pytest.raises(Interrupted) as stop:
        trainer.run()
    assert stop.value.number == number
    second = trainer_of(patterns, weights, tmp_path / "run")
    second.restore()
    assert second.keeping.start.position == (1, 0)  # behind the first epoch


def test_under_torchrun_a_signal_may_come_twice(patterns, weights, tmp_path, monkeypatch):
    """From the cluster, and from torchrun, which passes its own on."""
    monkeypatch.setattr(processes, "by_torchrun", lambda: True)
    trainer = trainer_of(patterns, weights, tmp_path / "run")
    signalled(monkeypatch, 6, signal.SIGTERM, times=2)
    with pytest.raises(Interrupted):
        trainer.run()
    second = trainer_of(patterns, weights, tmp_path / "run")
    second.restore()
    assert second.keeping.start.position == (1, 2)


def test_behind_an_epoch_the_state_is_written_first(patterns, weights, tmp_path, monkeypatch):
    trainer = trainer_of(patterns, weights, tmp_path / "run", save_every="100")
    write = trainer.run_on_disk.write_epoch
    trainer.run_on_disk.write_epoch = lambda record: (write(record), os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        trainer.run()
    second = trainer_of(patterns, weights, tmp_path / "run")
    second.restore()
    assert second.keeping.start.position == (1, 0)


def test_outside_the_epochs_it_ends_at_once(patterns, weights, tmp_path, monkeypatch):
    trainer = trainer_of(patterns, weights, tmp_path / "run")
    monkeypatch.setattr(Trainer, "_evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        trainer.run()
    second = trainer_of(patterns, weights, tmp_path / "run")
    second.restore()
    assert second.keeping.start.position == (3, 0) and not second.matrix


def test_handlers_are_those_of_before_again(patterns, weights, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with Keeping().listening():
        assert all(signal.getsignal(number) != handler for number, handler in zip(numbers, before, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_command_ends_with_a_line_and_goes_on(weights, tmp_path, number):
    flags = "--tasks 2 --limit-per-class 4 --epochs 6 --batch-size 8 --no-plots --resume"
    flags += " --energy-start 0.9 --energy-end 0.9"
    call = [sys.executable, "-m", "janus_ext.train", *flags.split(), "--weights", str(weights), "--output"]
    subprocess.run([*call, str(tmp_path / "whole")], check=True, capture_output=True)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    run = subprocess.Popen([*call, str(tmp_path / "cut")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and len(checkpoint.read_json_lines(metrics)) < 8:  # two of the second task
        time.sleep(0.002)
    run.send_signal(number)
    _, message = run.communicate()
    if number == signal.SIGKILL:
        assert run.returncode == -number
    else:
        assert run.returncode == 128 + number
        assert "the same call with --resume goes on" in message and "Traceback" not in message
    again = subprocess.run([*call, str(tmp_path / "cut")], check=True, capture_output=True, text=True)
    assert "goes on after task 1/2" in again.stdout and "and within the next task behind" in again.stdout
    assert_same_files(tmp_path / "cut", tmp_path / "whole")


MANY = "--epochs 30 --batch-size 8 --head-init small --lr 0.001 --no-plots --resume --amp off"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Six classes of eight images, in files."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for name in "abcdef":
        (root / name).mkdir()
        for i in range(8):
            pixels = torch.randint(256, (48, 48, 3), dtype=torch.uint8, generator=generator).numpy()
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_leaves_the_workers_at_work(photos, weights, tmp_path, number):
    """As a terminal, `timeout` and a cluster send it."""
    flags = f"--benchmark folder --tasks 2 --workers 2 --save-every 10m {MANY} --energy-start 0.9 --energy-end 0.9"
    call = [sys.executable, "-m", "janus_ext.train", *flags.split(), "--data-dir", str(photos)]
    call += ["--weights", str(weights), "--backbone", "emoji", "--image-size", "32", "--output", str(tmp_path / "run")]
    run = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while run.poll() is None and len(checkpoint.read_json_lines(metrics)) < 3:
        time.sleep(0.002)
    os.killpg(run.pid, number)
    _, message = run.communicate(timeout=120)
    assert run.returncode == 128 + number, message
    assert "with --resume goes on" in message and "worker" not in message
    assert (tmp_path / "run" / "checkpoints" / "within.safetensors").exists()


def test_a_warning_ends_nothing_outside_the_tasks_either(weights, tmp_path):
    code = (
        "import os, signal; from janus_ext import train; from janus_ext.training.trainer import Trainer; "
        "evaluate = Trainer._evaluate; "
        "Trainer._evaluate = lambda *a: (os.kill(os.getpid(), signal.SIGUSR1), evaluate(*a))[1]; "
        "load = train.load_benchmark; "
        "train.load_benchmark = lambda c: (os.kill(os.getpid(), signal.SIGUSR1), load(c))[1]; "
        "flags = '--tasks 2 --limit-per-class 1 --epochs 1 --no-plots --seed 0 1 --energy-start 0.9 --energy-end 0.9'; "
        f"raise SystemExit(train.main([*flags.split(), '--weights', '{weights}', '--output', '{tmp_path}/run']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_signal_that_was_ignored_stays_so(patterns, weights, tmp_path, monkeypatch):
    wanted = without_time(trainer_of(patterns, weights, tmp_path / "whole").run())
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        trainer = trainer_of(patterns, weights, tmp_path / "run")
        signalled(monkeypatch, 6, signal.SIGTERM)
        assert without_time(trainer.run()) == wanted
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_a_method_draws_behind_its_last_epoch_is_the_same(patterns, weights, tmp_path, monkeypatch):
    """Where the run goes on behind that epoch."""
    end = Janus.end_epochs

    def drawing(self):
        end(self)
        for layer in self.layers.values():
            layer.B.data.mul_(1 + torch.rand(()))

    monkeypatch.setattr(Janus, "end_epochs", drawing)
    wanted = without_time(trainer_of(patterns, weights, tmp_path / "whole").run())
    first = trainer_of(patterns, weights, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(Janus, "end_epochs", lambda self: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            first.run()
    second = trainer_of(patterns, weights, tmp_path / "run")
    second.restore()
    assert without_time(second.run()) == wanted


def test_what_lies_between_steps_makes_none_slow(monkeypatch):
    """An evaluation before them, and the write of a state among them, of a minute each."""
    agreed, now = [], 100.0
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "largest", lambda values: agreed.append(step) or list(values))
    monkeypatch.setattr(keeping_module.time, "monotonic", lambda: now)
    underway = type("Underway", (), {"state": lambda self, epoch, step: None})()

    def writing(state):
        nonlocal now
        now += 60

    keeping = Keeping(writing, every="0.01m")
    now += 60
    with keeping.stepping():
        for step in range(1, 62):
            now += 0.03
            keeping.step_done(underway, 0, step)
    assert agreed == [1, 21, 41, 61]


@pytest.mark.parametrize(("seconds", "apart"), [(0.001, 20), (0.25, 8), (5.0, 1)])
def test_several_agree_soon_however_slow_a_step_is(monkeypatch, seconds, apart):
    """Behind the first step, which tells how long one takes, and about every two seconds from then on."""
    steps, agreed, now = 40, [], 100.0
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "largest", lambda values: agreed.append(step) or list(values))
    monkeypatch.setattr(keeping_module.time, "monotonic", lambda: now)
    keeping = Keeping()
    for step in range(1, steps + 1):
        now += seconds
        keeping.step_done(None, 0, step)
    assert agreed == list(range(1, steps + 1, apart))
    keeping.epoch_done(None, 0, 2)  # at once behind a step: says nothing of how long one takes
    for step in range(steps + 1, steps + apart + 1):
        now += seconds
        keeping.step_done(None, 1, step)
    assert agreed[-1] == steps + apart and agreed.count(steps + apart) == 1
