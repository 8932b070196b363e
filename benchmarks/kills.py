"""Kills runs at random moments, goes on with --resume, and compares the end with a run that was left alone.

python benchmarks/kills.py [--times 20]

Each run is killed (SIGKILL) once, at a random moment of what a whole one takes from its first line to its last, and
then taken up. Status 1 unless the accuracy matrix and every saved tensor are always the same, bit by bit.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from janus_ext.checkpoint import read_tensors

CALL = [sys.executable, "-m", "janus_ext.train", "--limit-per-class", "2", "--epochs", "2", "--no-plots", "--resume"]


def begin(folder: Path) -> subprocess.Popen:
    """A run that has just written its first line."""
    run = subprocess.Popen([*CALL, "--output", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert run.stdout is not None
    run.stdout.readline()
    return run


def finish(folder: Path) -> float:
    """Lets a run end; the seconds from its first line to its last."""
    run, started = begin(folder), time.perf_counter()
    run.communicate()
    if run.returncode:
        raise SystemExit(f"{' '.join(run.args)} ended with status {run.returncode}")
    return time.perf_counter() - started


def kill(folder: Path, moment: float) -> str:
    """Kills a run at a moment; what it left."""
    run = begin(folder)
    try:
        run.wait(moment)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGKILL)
    run.communicate()
    done = sorted(path.stem.removeprefix("method-") for path in (folder / "checkpoints").glob("method-*"))
    return f"after {moment:.2f} s, method states of tasks {', '.join(done) or 'none'}"


def differences(folder: Path, other: Path) -> list[str]:
    """Names of the files that two runs do not have alike."""
    matrices = [json.loads((run / "results.json").read_text())["accuracy_matrix"] for run in (folder, other)]
    found = [] if matrices[0] == matrices[1] else ["results.json"]
    names = {path.name for run in (folder, other) for path in (run / "checkpoints").iterdir()}
    for name in sorted(names):
        paths = [run / "checkpoints" / name for run in (folder, other)]
        if not all(path.exists() for path in paths):
            found.append(name)
            continue
        ours, theirs = (read_tensors(path)[0] for path in paths)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            found.append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        seconds = finish(whole)
        same = 0
        for index in range(arguments.times):
            killed = Path(folder) / f"killed-{index}"
            print(f"{index + 1}: {kill(killed, moments.uniform(0, seconds))}", end="; ", flush=True)
            finish(killed)
            found = differences(killed, whole)
            same += not found
            print("not the same: " + ", ".join(found) if found else "the same in the end", flush=True)
    print(f"bit-identical: {same} of {arguments.times}")
    sys.exit(same < arguments.times)


if __name__ == "__main__":
    main()
