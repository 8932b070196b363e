"""What may happen to a run's folder while it is written: full, read-only, no longer ours, moved, removed, replaced.

The run ends in one line, and what was kept before is taken up as if nothing had been.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_resuming import assert_same_files
from test_resuming_within import trainer_of
from test_surroundings import require

from janus_ext.errors import CheckpointError
from janus_ext.runs.checkpoint import read_json_lines

FLAGS = "--tasks 3 --limit-per-class 2 --epochs 4 --batch-size 64 --no-plots --resume --energy-start 0.9"
FLAGS += " --energy-end 0.9 --head linear --device cpu"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(weights: Path, folder: Path) -> list[str]:
    train = [sys.executable, "-m", "janus_ext.train", *FLAGS.split(), "--weights", str(weights)]
    return [*train, "--output", str(folder)]


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory) -> Path:
    """The run that nothing has happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(weights, folder), check=True, capture_output=True, env=ENVIRONMENT)
    return folder


def assert_ended_in_a_line(done: subprocess.CompletedProcess, said: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("janus_ext.train: ") and done.stderr.strip().count("\n") == 0, done.stderr
    assert said in done.stderr, done.stderr


def assert_goes_on(weights: Path, folder: Path, whole: Path, behind: int) -> None:
    done = subprocess.run(command(weights, folder), check=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert f"taken up behind task {behind}/3" in done.stdout
    assert_same_files(folder, whole)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("behind", [0, 1])
def test_a_full_disk(weights, tmp_path, whole, behind):
    """A file system of its own, with room for half of a model, or for one and a half."""
    model = (whole / "checkpoints" / "model.safetensors").stat().st_size
    size = model // 2 + behind * bytes_of(whole)
    folder, kept = tmp_path / "run", tmp_path / "kept"
    folder.mkdir()
    mount = ("unshare", "-m", "sh", "-c")
    require(*mount, f'mount -t tmpfs none "{folder}"')
    script = f'mount -t tmpfs -o size={size} none "{folder}" && "$0" "$@"; rc=$?; cp -r "{folder}" "{kept}"; exit $rc'
    done = subprocess.run([*mount, script, *command(weights, folder)], capture_output=True, text=True, env=ENVIRONMENT)
    assert_ended_in_a_line(done, "No space left on device")
    assert not list(kept.rglob("*.tmp"))
    assert_goes_on(weights, kept, whole, behind)


def cut_off(
    arguments: list[str], folder: Path, lines: int, happens: Callable[[], object]
) -> subprocess.CompletedProcess:
    """Lets something happen to a run in the middle of its second task, by its lines of metrics.jsonl."""
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline and len(read_json_lines(folder / "metrics.jsonl")) < lines:
        time.sleep(0.002)
    happens()
    stdout, stderr = run.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, run.returncode, stdout, stderr)


def test_a_file_system_that_becomes_read_only(weights, tmp_path, whole):
    """A read-only mount over the run's folder, while it writes."""
    folder, began = tmp_path / "run", tmp_path / "began"
    folder.mkdir()
    script = (
        f'"$0" "$@" & until [ "$(cat "{folder}/metrics.jsonl" 2>/dev/null | wc -l)" -ge 5 ]; do sleep 0.01; done; '
        f'mount --bind "{folder}" "{folder}" && mount -o remount,ro,bind "{folder}" && touch "{began}"; wait $!'
    )
    mount = ("unshare", "-m", "sh", "-c")
    require(*mount, f'mount --bind "{folder}" "{folder}" && mount -o remount,ro,bind "{folder}"')
    done = subprocess.run([*mount, script, *command(weights, folder)], capture_output=True, text=True, env=ENVIRONMENT)
    assert began.exists()
    assert_ended_in_a_line(done, "Read-only file system")
    assert_goes_on(weights, folder, whole, 1)


def test_a_permission_that_is_lost(weights, tmp_path, whole):
    """For the super-user without his privilege, too."""
    plain = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    require(*plain, "true")
    folder = tmp_path / "run"

    def forbid() -> None:
        (folder / "checkpoints").chmod(0o500)

    done = cut_off([*plain, *command(weights, folder)], folder, 5, forbid)
    (folder / "checkpoints").chmod(0o700)
    assert_ended_in_a_line(done, "Permission denied")
    assert_goes_on(weights, folder, whole, 1)


def test_a_folder_that_is_moved_away(weights, tmp_path, whole):
    """It goes on where it is now; under its name nothing is written any more."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    done = cut_off(command(weights, folder), folder, 5, lambda: folder.rename(elsewhere))
    assert_ended_in_a_line(done, f"{folder} is not as this run has made it")
    assert not folder.exists()
    assert_goes_on(weights, elsewhere, whole, 1)


# in this process, at every moment ------------------------------------------------------------------------------------
WRITES = ("write_epoch", "write_within", "write_factors", "write_task", "finish")


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("happens", ["removed", "replaced", "resealed"])
def test_nothing_is_written_to_another_folder(patterns, weights, tmp_path, monkeypatch, name, happens):
    trainer = trainer_of(patterns, weights, tmp_path / "run")
    run = trainer.run_on_disk
    run.folder.mkdir()
    run.write_settings({"benchmark": "a"})
    write = getattr(run, name)

    def after_what_happens(*arguments):
        if happens == "resealed":
            run.write_settings({"benchmark": "another"})
        else:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        if happens == "replaced":
            shutil.copytree(tmp_path / "elsewhere", tmp_path / "run")
        before = sorted(tmp_path.rglob("*")), bytes_of(tmp_path)
        with pytest.raises(CheckpointError, match="run is not as this run has made it: it was moved, removed or alt"):
            write(*arguments)
        assert (sorted(tmp_path.rglob("*")), bytes_of(tmp_path)) == before
        raise InterruptedError

    monkeypatch.setattr(run, name, after_what_happens)
    with pytest.raises(InterruptedError):
        run.finish(trainer.run())
