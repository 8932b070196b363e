"""Kills runs at random moments, goes on with --resume, and compares the end with a run that was left alone.

python benchmarks/kills.py [--times 20]

Each run is killed (SIGKILL) once, at a random moment of what a whole one takes from its first line to its last, every
other one within the first write behind that moment of a file of a kind: one kind after the other. Then it is taken up.
Status 1 unless results, epochs and every saved tensor are always the same, bit by bit, and no more than one epoch that
was on record was computed a second time. Tasks have six steps in each of two epochs. The disk seems a slow one: every
file takes 20 ms to be flushed before it is moved into place, so that a kill can hit any.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from same_runs import differences

FLAGS = "--limit-per-class 3 --batch-size 10 --epochs 2 --no-plots --resume"
SLOW_DISK = """
import os, sys, time
flush = os.fsync
os.fsync = lambda file: (time.sleep(0.02), flush(file))
from janus_ext.train import main
sys.exit(main())
"""
CALL = [sys.executable, "-c", SLOW_DISK, *FLAGS.split()]
KINDS = ("within", "factors", "method", "model")  # of files, as a task writes them one after the other


def begin(folder: Path) -> subprocess.Popen:
    """A run that has just written its first line."""
    run = subprocess.Popen([*CALL, "--output", str(folder)], stdout=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.readline()
    return run


def finish(folder: Path) -> tuple[float, int]:
    """Lets a run end; the seconds from its first line to its last, and how many epochs it computed."""
    run, started = begin(folder), time.perf_counter()
    said = run.communicate()[0].decode()
    if run.returncode:
        raise SystemExit(f"the run in {folder} ended with status {run.returncode}")
    return time.perf_counter() - started, said.count(": loss ")


def on_record(folder: Path) -> int:
    """How many epochs a run has noted."""
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def half_written(folder: Path, kind: str) -> list[str]:
    """The files of a kind that are being written: each is moved into place once it is whole."""
    return sorted(path.name for path in folder.rglob(f".{kind}*.tmp"))


def kill(folder: Path, moment: float, kind: str | None) -> bool:
    """Kills a run at a moment, or within the write of a file of ``kind`` behind it; False if it had ended before."""
    run = begin(folder)
    try:
        run.wait(moment)
    except subprocess.TimeoutExpired:
        while kind and run.poll() is None and not half_written(folder, kind):
            pass
        run.send_signal(signal.SIGKILL)
    run.communicate()
    return run.returncode == -signal.SIGKILL and (not kind or bool(half_written(folder, kind)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        seconds, epochs = finish(whole)
        killed = good = 0
        while killed < arguments.times:
            moment, run = moments.uniform(0, seconds), Path(folder) / f"killed-{killed}"
            kind = KINDS[killed // 2 % len(KINDS)] if killed % 2 else None
            if not kill(run, moment, kind):
                shutil.rmtree(run)  # it was faster than the first one, or than this process: another moment
                continue
            half = "".join(f", within the write of {name}" for name in half_written(run, kind or ""))
            tasks = len(list((run / "checkpoints").glob("factors-*")))
            again = on_record(run) + finish(run)[1] - epochs
            found = differences(run, whole)
            killed, good = killed + 1, good + (not found and again <= 1)
            end = "not the same: " + ", ".join(found) if found else "the same in the end"
            moment = f"killed after {moment:.2f} of {seconds:.2f} s, in task {tasks + 1}{half}"
            print(f"{killed}: {moment}; {again} epochs on record computed again; {end}", flush=True)
    print(f"bit-identical, at most an epoch lost: {good} of {arguments.times}")
    sys.exit(good < arguments.times)


if __name__ == "__main__":
    main()
