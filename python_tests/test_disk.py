"""What may happen to a run's folder while it is written: full, read-only, no longer ours, moved, removed, replaced.

The run ends in one line, and what was kept before is taken up as if nothing had been.
"""

import logging
import os
import re
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

from janus_ext import train
from janus_ext.errors import CheckpointError
from janus_ext.runs.checkpoint import read_json_lines, write_sealed_json
from janus_ext.runs.run import Run
from janus_ext.terminal import logging_to

FLAGS = "--tasks 3 --limit-per-class 2 --epochs 12 --batch-size 64 --no-plots --resume --energy-start 0.9"
FLAGS += " --energy-end 0.9 --head linear --device cpu"
BEGUN = 13  # lines of metrics.jsonl: the second task has just begun
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
    assert re.search(said, done.stderr), done.stderr


def assert_goes_on(weights: Path, folder: Path, whole: Path, behind: int) -> None:
    done = subprocess.run(command(weights, folder), check=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert f"goes on after task {behind}/3" in done.stdout
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


def cut_off(arguments: list[str], folder: Path, happens: Callable[[], object]) -> subprocess.CompletedProcess:
    """Lets something happen to a run at the beginning of its second task."""
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as run:
        try:
            deadline = time.monotonic() + 120
            while len(read_json_lines(folder / "metrics.jsonl")) < BEGUN:
                assert run.poll() is None and time.monotonic() < deadline, run.communicate()
                time.sleep(0.002)
            happens()
            stdout, stderr = run.communicate(timeout=120)
        finally:
            run.kill()
    return subprocess.CompletedProcess(arguments, run.returncode, stdout, stderr)


def test_a_file_system_that_becomes_read_only(weights, tmp_path, whole):
    """A read-only mount over the run's folder, while it writes."""
    folder, began = tmp_path / "run", tmp_path / "began"
    folder.mkdir()
    script = (
        f'"$0" "$@" & until [ "$(cat "{folder}/metrics.jsonl" 2>/dev/null | wc -l)" -ge {BEGUN} ]; do '
        "sleep 0.01; done; "
        f'mount --bind "{folder}" "{folder}"; until mount -o remount,ro,bind "{folder}" 2>/dev/null; do sleep 0.01; '
        f'done; touch "{began}"; wait $!'  # it is refused while a file is open for writing
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

    done = cut_off([*plain, *command(weights, folder)], folder, forbid)
    (folder / "checkpoints").chmod(0o700)
    assert_ended_in_a_line(done, "Permission denied")
    assert_goes_on(weights, folder, whole, 1)


def test_a_folder_that_is_moved_away(weights, tmp_path, whole):
    """It goes on where it is now; under its name nothing is written any more."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    done = cut_off(command(weights, folder), folder, lambda: folder.rename(elsewhere))
    assert_ended_in_a_line(done, "was moved, removed or altered while the run|cannot be written: .*No such file")
    assert not folder.exists()
    assert_goes_on(weights, elsewhere, whole, 1)


# in this process, at every moment ------------------------------------------------------------------------------------
WRITES = ("prepare", "write_epoch", "write_within", "write_factors", "write_task", "finish")


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("happens", ["removed", "replaced", "other settings", "no settings"])
def test_nothing_is_written_to_another_folder(patterns, weights, tmp_path, monkeypatch, name, happens):
    trainer = trainer_of(patterns, weights, tmp_path / "run")
    run = trainer.run_on_disk
    write = getattr(run, name)

    def after_what_happens(*arguments):
        if happens == "removed":
            shutil.rmtree(tmp_path / "run")
        elif happens == "replaced":
            (tmp_path / "run").rename(tmp_path / "elsewhere")
            shutil.copytree(tmp_path / "elsewhere", tmp_path / "run")
        elif happens == "other settings":
            run.write_settings({"benchmark": "another"})
        else:
            (tmp_path / "run" / "config.json").unlink()
        before = sorted(tmp_path.rglob("*")), bytes_of(tmp_path)
        with pytest.raises(CheckpointError, match="run was moved, removed or altered while the run wrote there"):
            write(*arguments)
        assert (sorted(tmp_path.rglob("*")), bytes_of(tmp_path)) == before
        raise InterruptedError

    monkeypatch.setattr(run, name, after_what_happens)
    with run.opened({"benchmark": "one"}, begin=True), pytest.raises(InterruptedError):
        run.finish(trainer.run())


def test_a_new_folder_with_the_numbers_of_the_old_one_is_told_apart(tmp_path):
    """A file system gives them again, but not while the old one is held open."""
    run = Run(tmp_path / "run")
    with run.opened({}, begin=True):
        run.prepare()
        for _ in range(20):
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run" / "checkpoints").mkdir(parents=True)
            write_sealed_json(tmp_path / "run" / "config.json", {})
            with pytest.raises(CheckpointError, match="moved, removed or altered"):
                run.write_epoch({})


def test_no_pictures_of_a_run_whose_folder_is_gone(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.table, "format_table", lambda results: shutil.rmtree(tmp_path / "run") or "")
    flags = FLAGS.replace("--no-plots", "").replace("--epochs 12", "--epochs 1")
    assert train.main([*flags.split(), "--weights", str(weights), "--output", str(tmp_path / "run")]) == 2
    assert "run/results.json cannot be read" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_log_on_a_full_disk_is_an_error_and_leaves_no_handler_behind():
    log = logging.getLogger("janus_ext")
    before = log.handlers[:], log.level
    with pytest.raises(CheckpointError, match=r"^/dev/full cannot be written: .*No space left"):
        with logging_to(Path("/dev/full")):
            log.info("a line")
    assert (log.handlers, log.level) == before


def test_a_folder_may_be_made_where_one_may_write_and_not_read(tmp_path):
    plain = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    require(*plain, "true")
    parent = tmp_path / "drop"
    parent.mkdir()
    parent.chmod(0o333)
    code = "import sys; from pathlib import Path; from janus_ext.runs import checkpoint; "
    code += "checkpoint.make_folder(Path(sys.argv[1]))"
    subprocess.run([*plain, sys.executable, "-c", code, str(parent / "a")], check=True)
    parent.chmod(0o700)
    assert (parent / "a").is_dir()
