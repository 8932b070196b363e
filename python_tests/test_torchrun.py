"""`torchrun -m janus_ext.train`: one run, written by one process, that ends in a line wherever one of them ends.

docs/method.md, property 5.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trees
from torch.distributed.run import get_args_parser

ERRORS = "janus_ext.train: "
SMALL = ["--epochs", "2", "--batch-size", "7", "--no-plots", "--amp", "off", "--workers", "0", "--rank", "4"]


def call(
    weights: Path, tree: Path, folder: Path, *flags: str, processes: int = 2, torchrun: tuple[str, ...] = ()
) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), *torchrun]
    launcher = launcher if processes > 1 or torchrun else []
    benchmark = ["--benchmark", "folder", "--backbone", "emoji", "--weights", str(weights), "--data-dir", str(tree)]
    train = ["-m", "janus_ext.train", *benchmark, "--tasks", "2", "--output", str(folder), *SMALL, *flags]
    return [sys.executable, *launcher, *train]


def said(stderr: str) -> list[str]:
    """The lines of ours; torchrun adds a report of its own."""
    return [line.partition(ERRORS)[2] for line in stderr.splitlines() if ERRORS in line]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def processes_of(folder: Path) -> list[int]:
    """All that have a path below ``folder`` in their command line: launchers, processes that train, their workers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if os.fsencode(folder) in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """Ends what a test that fails has left behind: torchrun's processes are in sessions of their own."""
    yield
    for process in processes_of(tmp_path):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def assert_all_end(folder: Path) -> None:
    """Without anybody's help; a worker looks every few seconds whether its parent is there."""
    deadline = time.monotonic() + 60
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(folder)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree") / "photos"
    trees.sides(folder, 4, 6, 4)
    return folder


def begun(arguments: list[str], folder: Path) -> subprocess.Popen:
    """A run that has kept its first state."""
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kept, deadline = folder / "checkpoints" / "within.safetensors", time.monotonic() + 120
    while not kept.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert kept.exists(), run.communicate()
    return run


def workers_of(run: subprocess.Popen) -> list[int]:
    children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    return [pid for pid in children if b"janus_ext.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def assert_goes_on(arguments: list[str]) -> None:
    """From what is kept of its task; what goes on is ended then."""
    resumed = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert any("and within the next task behind" in line for line in iter(resumed.stdout.readline, ""))
    resumed.kill()
    resumed.communicate()


@pytest.mark.parametrize(("rank", "workers"), [(1, 0), (0, 2)])
def test_a_killed_process_ends_all_and_the_run_goes_on(tree, weights, tmp_path, rank, workers) -> None:
    """Within seconds, and with another number of processes than before; those that decode images end, too.

    torchrun looks every two seconds here: as it is by default, every 0.1, now and then it ends the other one first.
    """
    folder, flags = tmp_path / "run", ("--epochs", "300", "--workers", str(workers))
    run = begun(call(weights, tree, folder, *flags, torchrun=("--monitor-interval", "2")), folder)
    ranks = workers_of(run)
    assert len(ranks) == 2 and len(processes_of(tmp_path)) == 1 + 2 * (1 + workers)
    os.kill(ranks[rank], signal.SIGKILL)
    killed = time.monotonic()
    _, stderr = run.communicate(timeout=60)
    assert time.monotonic() - killed < 30 and run.returncode != 0
    assert len(said(stderr)) == 1, stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert_all_end(tmp_path)
    assert_goes_on(call(weights, tree, folder, "--resume", *flags, processes=1))


@pytest.mark.parametrize(("number", "node"), [(signal.SIGTERM, 1), (signal.SIGKILL, 0)])
def test_one_machine_of_two_ends_all(tree, weights, tmp_path, number, node) -> None:
    """Asked to end, its launcher has the run kept; killed with what it has begun, it leaves nobody waiting.

    With the launcher of the first one goes what all agree by, on who says why they end.
    """
    folder = tmp_path / "run"
    calls = on_two_machines(weights, tree, folder, "--epochs", "300")
    other = subprocess.Popen(calls[1 - node], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = begun(calls[node], folder)
    for process in (run.pid, *(workers_of(run) if number == signal.SIGKILL else [])):
        os.kill(process, number)
    ended = time.monotonic()
    lines = [line for process in (run, other) for line in said(process.communicate(timeout=60)[1])]
    assert time.monotonic() - ended < 30 and run.returncode != 0 and other.returncode != 0
    assert len(lines) == 1, lines
    assert lines[0].startswith("another process ended" if number == signal.SIGKILL else "interrupted; the same call")
    assert_all_end(tmp_path)


HANGING = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
from janus_ext import processes, train
from janus_ext.training.loop import Learner

processes.{limit} = timedelta(seconds=8)
load, step, since = train.load_benchmark, Learner._step, Path({since!r})

def hang(seconds, *arguments):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    since.touch()
    time.sleep(seconds)

def preparing(config):
    if processes.rank() == 0:
        hang({preparing})
    return load(config)

def stepping(*arguments):
    if processes.rank() == 1:
        hang({stepping})
    return step(*arguments)

train.load_benchmark, Learner._step = preparing, stepping
since.with_name("here-" + os.environ["RANK"]).touch()
while len(list(since.parent.glob("here-*"))) < 2:  # both have imported what they need
    time.sleep(0.02)
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("limit", "preparing", "stepping"), [("PATIENCE", 10, 600), ("PREPARING", 600, 0)], ids=["a step", "preparing"]
)
def test_a_process_that_hangs_is_given_up(tree, weights, tmp_path, limit, preparing, stepping) -> None:
    """Who trains, after a shorter time than who prepares something for the others."""
    since, script = tmp_path / "since", tmp_path / "hanging.py"
    script.write_text(HANGING.format(limit=limit, since=str(since), preparing=preparing, stepping=stepping))
    words = call(weights, tree, tmp_path / "run")
    place = words.index("janus_ext.train") - 1
    words[place : place + 2] = [str(script)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert time.time() - since.stat().st_mtime < 60 and run.returncode != 0
    assert (tmp_path / "run").exists() == (limit == "PATIENCE"), "what is prepared may take longer than a step"
    assert len(said(run.stderr)) == 1, run.stderr
    assert said(run.stderr)[0].startswith("another process ended, or does not answer: ")
    assert_all_end(tmp_path)


PASSED_ON = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "5")


@pytest.mark.parametrize(
    ("number", "torchrun"), [(signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGUSR1, PASSED_ON)]
)
def test_a_signal_to_torchrun_keeps_the_run(tree, weights, tmp_path, number, torchrun) -> None:
    """docs/processes.md; SIGUSR1, a cluster's warning, where torchrun is told to pass it on."""
    if not all(flag in get_args_parser().format_help() for flag in torchrun[::2]):
        pytest.skip("this torchrun passes no other signals on")
    folder = tmp_path / "run"
    flags = ("--epochs", "5000", "--save-every", "10m")
    run = subprocess.Popen(call(weights, tree, folder, *flags, torchrun=torchrun), stderr=subprocess.PIPE, text=True)
    epochs, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline and not (epochs.exists() and epochs.stat().st_size):
        time.sleep(0.02)
    workers, kept = workers_of(run), folder / "checkpoints" / "within.safetensors"
    assert len(workers) == 2 and not kept.exists()
    run.send_signal(number)
    _, stderr = run.communicate(timeout=60)
    assert kept.exists(), stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert_goes_on(call(weights, tree, folder, *flags, "--resume", processes=1))


def test_two_processes_make_one_run(tree, weights, tmp_path) -> None:
    folder = tmp_path / "run"
    run = subprocess.run(call(weights, tree, folder), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("run folder: ") == run.stdout.count("ACC by head") == 1
    assert "in each of 2 processes" in run.stdout
    found = results(folder)
    assert len(found["accuracy_matrix"]) == 2 and found["versions"]["processes"] == 2
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    other = subprocess.run(call(weights, tree, folder, "--lr", "0.5", "--resume"), capture_output=True, text=True)
    assert other.returncode != 0 and len(said(other.stderr)) == 1
    assert said(other.stderr)[0].startswith(f"{folder} holds a run with other settings: --lr")


def test_several_seeds_and_their_plots(tree, weights, tmp_path) -> None:
    """The first process draws, and the others go on; taken up again, it draws what is missing."""
    folder, flags = tmp_path / "runs", ("--seed", "0", "1", "--plots", "--epochs", "1")
    run = subprocess.run(call(weights, tree, folder, *flags), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    plots = [folder / f"seed-{seed}" / "plots" / "accuracy_matrix.png" for seed in (0, 1)]
    assert all(plot.exists() for plot in plots) and (folder / "summary.json").exists()
    plots[1].unlink()
    again = subprocess.run(call(weights, tree, folder, *flags, "--resume"), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and plots[1].exists(), again.stderr


def on_two_machines(weights: Path, tree: Path, folder: Path, *flags: str) -> list[list[str]]:
    """Two launchers, as on two machines, of a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port))
    nodes = [("--node-rank", str(i), *group) for i in range(2)]
    return [call(weights, tree, folder, *flags, processes=1, torchrun=node) for node in nodes]


def test_two_machines_make_one_run(tree, weights, tmp_path) -> None:
    calls = on_two_machines(weights, tree, tmp_path / "run")
    runs = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for words in calls]
    printed = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed
    assert ["run folder: " in stdout for stdout, _ in printed] == [True, False]
    found = results(tmp_path / "run")
    assert len(found["accuracy_matrix"]) == 2 and found["versions"]["processes"] == 2


def test_an_image_that_one_process_cannot_read_ends_all(weights, tmp_path) -> None:
    """Of the second task, damaged while the first is learned; once it is mended the run goes on."""
    tree, folder = tmp_path / "photos", tmp_path / "run"
    trees.sides(tree, 4, 6, 4)
    run = begun(call(weights, tree, folder, "--epochs", "20"), folder)
    image = sorted(path for path in (tree / "train").rglob("*.*") if path.is_file())[-1]
    whole = image.read_bytes()
    image.write_bytes(whole[:60])
    _, stderr = run.communicate(timeout=120)
    assert run.returncode != 0
    assert time.time() - (folder / "checkpoints" / "model.safetensors").stat().st_mtime < 30, "of the first task"
    assert len(said(stderr)) == 1 and said(stderr)[0].startswith(f"{image} cannot be read"), stderr
    assert "Traceback" not in stderr.partition("torch/distributed")[0]
    image.write_bytes(whole)
    again = subprocess.run(call(weights, tree, folder, "--epochs", "20", "--resume"), capture_output=True, text=True)
    assert again.returncode == 0 and "goes on after task 1/2" in again.stdout, again.stderr
    assert len(results(folder)["accuracy_matrix"]) == 2


def test_what_all_refuse_is_said_once(weights, tmp_path) -> None:
    run = subprocess.run(call(weights, Path("nowhere"), tmp_path / "run"), capture_output=True, text=True)
    assert run.returncode != 0
    assert len(said(run.stderr)) == 1 and said(run.stderr)[0].startswith("--data-dir nowhere does not exist"), (
        run.stderr
    )
