"""Where a run may find itself: no locks, little shared memory, few open files, one core, no home, nothing writable, a
clock that jumps, long and odd names. It ends with the same results as anywhere, or in a line before anything is lost.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trees
from conftest import without_time

from janus_ext import ContinualLearner, evaluate, predict, train
from janus_ext.runs import folder as run_folder
from janus_ext.runs.checkpoint import read_json

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--benchmark folder --backbone emoji --epochs 2 --tasks 2 --batch-size 8 --device cpu --amp off"
FLAGS += " --energy-start 0.6 --energy-end 0.6 --energy-power 1 --head ncm"
ALONE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # of the environment
LONG = "n" * 251  # with an ending the longest name of a file
ODD = "a b\nc\td \u00e9 \U0001f600 %s {x} 'q\" -"


def call(photos: Path, weights: Path, output: Path | None, *more: str) -> list[str]:
    where = [] if output is None else ["--output", str(output)]
    return [*FLAGS.split(), "--data-dir", str(photos), "--weights", str(weights), *where, *more]


def results_of(folder: Path) -> dict:
    return without_time(read_json(folder / "results.json"))


def of_a_process(
    words: list[str], before: str = "", prefix: tuple[str, ...] = (), **options
) -> subprocess.CompletedProcess:
    """The command in a process of its own, in which something is done first."""
    code = "import sys; sys.path[:] = filter(None, sys.path)"  # without the current folder
    code += f"; {before}\nfrom janus_ext.train import main\nsys.exit(main({words!r}))"
    return subprocess.run(
        [*prefix, sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, **options
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    trees.folders(root, 4, 4)
    return root


@pytest.fixture(scope="module")
def wanted(images, weights, tmp_path_factory) -> dict:
    """What a run comes to where nothing is in its way; in a process with one thread, as all that are compared."""
    output = tmp_path_factory.mktemp("wanted") / "run"
    done = of_a_process(call(images, weights, output, "--workers", "0", "--no-plots"), env=os.environ | ALONE)
    assert done.returncode == 0, done.stderr
    return results_of(output)


def require(*words: str) -> None:
    """Skips where the system does not let this user do that."""
    if shutil.which(words[0]) is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip(f"{' '.join(words)} does not work here")


# a process ------------------------------------------------------------------------------------------------------------
def test_shared_memory_that_is_full(images, weights, tmp_path, wanted):
    """One page of it, for two workers."""
    mount = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=4k none /dev/shm && exec "$0" "$@"')
    require(*mount, "true")
    words = call(images, weights, tmp_path / "run", "--workers", "2", "--no-plots")
    done = of_a_process(words, prefix=mount, env=os.environ | ALONE)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "/dev/shm is full: this process reads" in done.stdout
    assert results_of(tmp_path / "run") == wanted


def test_few_files_may_be_open(images, weights, tmp_path, wanted):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    words = call(images, weights, tmp_path / "run", "--workers", "2", "--no-plots")
    done = of_a_process(words, limit, env=os.environ | ALONE)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert results_of(tmp_path / "run") == wanted


def test_one_core_and_an_environment_with_nothing_in_it(images, weights, tmp_path, wanted):
    """No HOME, no PATH, no language; plots are drawn all the same."""
    core = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    done = of_a_process(call(images, weights, tmp_path / "run"), core, env=ALONE, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert results_of(tmp_path / "run") == wanted and len(list((tmp_path / "run" / "plots").iterdir())) > 2


def test_a_checkout_and_a_cache_that_are_read_only(images, weights, tmp_path, wanted):
    """For the super-user, too: a mount for the one, permissions without his privilege for the other."""
    script = f'mount --bind "{ROOT}" "{ROOT}" && mount -o remount,ro,bind "{ROOT}" && cd "{ROOT}" && exec "$0" "$@"'
    mount = ("unshare", "-m", "sh", "-c", script)
    plain = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    require(*mount, *plain, "true")
    (tmp_path / "cache").mkdir(mode=0o500)
    in_checkout, elsewhere = (
        call(images, weights, output, "--workers", "0", "--no-plots") for output in (None, tmp_path / "run")
    )
    first = f"from janus_ext.train import main; print(main({in_checkout!r}))"
    environment = os.environ | ALONE | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = of_a_process(elsewhere, first, (*mount, *plain), env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "2\n" in done.stdout and "Read-only file system" in done.stderr
    assert "choose another folder with --output" in done.stderr, done.stderr
    assert (
        "Permission denied" in done.stdout + done.stderr and "will check the images again" in done.stdout + done.stderr
    )
    assert results_of(tmp_path / "run") == wanted


# this process ---------------------------------------------------------------------------------------------------------
def test_a_file_system_without_locks(images, weights, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    assert train.main(call(images, weights, tmp_path / "run", "--workers", "0", "--no-plots")) == 0
    assert "cannot be locked" in caplog.text
    assert train.main(call(images, weights, tmp_path / "run", "--workers", "0", "--no-plots", "--resume")) == 0


def test_a_clock_that_jumps(images, weights, tmp_path, monkeypatch, capsys):
    """By a century at every look, and files that are of the future and of before 1970."""
    tree = Path(shutil.copytree(images, tmp_path / "tree"))
    for number, path in enumerate(sorted(tree.rglob("*.jpg"))):
        os.utime(path, (0, (-1, 1)[number % 2] * 4e9))
    assert train.main(call(images, weights, tmp_path / "plain", "--workers", "0", "--no-plots")) == 0
    looks, now = [], time.time

    def jumping() -> float:
        looks.append(None)
        return now() + (3e9 if len(looks) % 2 else -1e9)

    monkeypatch.setattr(time, "time", jumping)
    assert (
        train.main(call(tree, weights, tmp_path / "run", "--workers", "0", "--no-plots", "--save-every", "0.001m")) == 0
    )
    assert looks and results_of(tmp_path / "run") == results_of(tmp_path / "plain")
    assert all(seconds >= 0 for seconds in read_json(tmp_path / "run" / "results.json")["seconds"])
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [LONG, ODD], ids=["as long as can be", "odd"])
def test_names(weights, tmp_path, capsys, name):
    """Of classes, images, the data and what is written, through all commands."""
    tree, output = tmp_path / name, tmp_path / f"{name[::-1]}.run"
    trees.folders(tree, 2, 3)
    for folder in sorted(tree.iterdir()):
        for path in sorted(folder.iterdir()):
            path.rename(path.with_name(f"{path.stem[-1]}{name[1:]}.jpg"))
        folder.rename(tree / f"{folder.name[-1]}{name[1:]}")
    words = call(tree, weights, output, "--workers", "0", "--tasks", "1", "--epochs", "1")
    assert train.main(words) == 0 and train.main([*words, "--resume"]) == 0
    assert predict.main([str(output), str(tree), "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()[-6:]
    assert all(".jpg " in line for line in lines)  # a line an image
    assert evaluate.main([str(output), "--output", str(tmp_path / f"{name}.ev")]) == 0
    learner = ContinualLearner.load(output)
    for _ in range(2):  # in a free place, and in that of the same
        learner.save(tmp_path / f"{name}.x")
    assert ContinualLearner.load(tmp_path / f"{name}.x").classes == learner.classes
    assert sorted(json.loads((tmp_path / f"{name}.ev" / "evaluation.json").read_text())) and not capsys.readouterr().err
