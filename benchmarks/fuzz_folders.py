"""Alters the files of runs at random, and lets evaluate, predict and --resume take them: refused in a line, or the same
results as before; never a traceback, a crash, another process, a connection or an unpickled object.

python benchmarks/fuzz_folders.py [--flips 1000 --others 300 --forged 300]

A *flip* is one bit of one file, *others* are files that are cut, emptied, removed, lengthened, swapped, doubled or of
another run. *Forged* files hold wild values under a SHA-256 that is right, as a stranger could write them: these may
give other results, but must not do anything else. Status 1 where something did.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fuzz_commands import ACTIONS, Outcome, in_child, make_runs, outcomes
from fuzz_forged import forge

from janus_ext.runs.checkpoint import SHA256

HEAD = 4096  # bytes at the beginning of a file, where half of the flips are: names, shapes and metadata


class Case(NamedTuple):
    """What is done to which file of which run."""

    kind: str
    run: str
    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number} of {self.run}/{self.file}"


def flip(path: Path, rng: random.Random, other: Path) -> None:
    """Changes one bit."""
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data) if rng.random() < 0.5 else min(HEAD, len(data)))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random, other: Path) -> None:
    """Drops the end."""
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)])


def empty(path: Path, rng: random.Random, other: Path) -> None:
    """Leaves no byte."""
    path.write_bytes(b"")


def remove(path: Path, rng: random.Random, other: Path) -> None:
    """As if it had never been."""
    path.unlink()


def lengthen(path: Path, rng: random.Random, other: Path) -> None:
    """Appends some bytes."""
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def swap(path: Path, rng: random.Random, other: Path) -> None:
    """Changes places with another file of the run."""
    neighbour, data = _neighbour(path, rng), path.read_bytes()
    path.write_bytes(neighbour.read_bytes())
    neighbour.write_bytes(data)


def double(path: Path, rng: random.Random, other: Path) -> None:
    """Gets the contents of another file of the run."""
    path.write_bytes(_neighbour(path, rng).read_bytes())


def take_other(path: Path, rng: random.Random, other: Path) -> None:
    """Becomes the file of that name of a run with another seed."""
    shutil.copy(other, path)


def _neighbour(path: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(file for file in path.parent.iterdir() if file.is_file() and file.suffix == path.suffix))


OTHERS: tuple[Callable[[Path, random.Random, Path], None], ...] = (
    *(cut, empty, remove, lengthen, swap, double, take_other),
)


def files_of(folder: Path) -> list[str]:
    """The names of all files of a run."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def cases(root: Path, flips: int, others: int, forged: int, seed: int) -> Iterator[Case]:
    """So many of each kind, over all files of all runs in turn."""
    rng = random.Random(seed)
    files = [(run, file) for run in ACTIONS for file in files_of(root / run)]
    for kind, count in (("flip", flips), ("others", others), ("forged", forged)):
        fitting = [(run, file) for run, file in files if kind != "forged" or not file.endswith("log.txt")]
        rng.shuffle(fitting)
        for number in range(count):
            yield Case(kind, *fitting[number % len(fitting)], number)


def alter(root: Path, work: Path, case: Case) -> str:
    """A copy of the case's run in ``work``, altered; returns what was done."""
    _copy(root / case.run, work)
    path, rng = work / case.file, random.Random(f"{case}")
    if case.kind == "forged":
        return forge(path, rng)
    change = flip if case.kind == "flip" else OTHERS[case.number % len(OTHERS)]
    change(path, rng, root / f"{case.run}-other" / case.file)
    return change.__name__


def fault(case: Case, found: Outcome, wanted: Outcome) -> str | None:
    """What is wrong with what a command did; None where nothing is."""
    if found.trouble:
        return found.trouble
    if "Traceback" in found.err or found.status not in (0, 1, 2):
        return f"ended with status {found.status}: {found.err.strip()[-300:]}"
    if found.same_as(wanted) or (case.kind == "forged" and found.status == 0):
        return None
    last = found.err.strip().rpartition("\n")[2]
    if found.status == 2 and last.startswith("janus_ext.") and SHA256 not in last:
        return None
    return f"other results without a word, status {found.status}: {found.err.strip()[-300:]}"


def fuzz(root: Path, flips: int, others: int, forged: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """How often commands refused and gave the same or, of what was forged, others; and every fault in a line."""
    make_runs(root)
    work, tally, faults = root / "work", Counter(), []
    with contextlib.redirect_stdout(io.StringIO()):
        _copy(root / "finished", work)
        outcomes(root, work, "finished")  # imports here what every forked process would import
    wanted = {run: _unaltered(root, work, run) for run in ACTIONS}
    for case in cases(root, flips, others, forged, seed):
        how = alter(root, work, case)
        answers = in_child(lambda run=case.run: outcomes(root, work, run))
        for action in ACTIONS[case.run]:
            found = answers if isinstance(answers, Outcome) else answers[action]
            reason = fault(case, found, wanted[case.run][action])
            if reason is not None:
                faults.append(f"{case}, {how}, {action}: {reason}")
            elif found.status == 2 and wanted[case.run][action].status == 0:
                tally[f"{case.kind}: refused"] += 1
            else:
                tally[f"{case.kind}: {'the same' if found.same_as(wanted[case.run][action]) else 'others'}"] += 1
    return tally, faults


def _unaltered(root: Path, work: Path, run: str) -> dict[str, Outcome]:
    _copy(root / run, work)
    return in_child(lambda: outcomes(root, work, run))


def _copy(folder: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--others", type=int, default=300)
    parser.add_argument("--forged", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sizes = (arguments.flips, arguments.others, arguments.forged)
        tally, faults = fuzz(Path(folder), *sizes, arguments.seed)
    print("\n".join(faults))
    for name, count in sorted(tally.items()):
        print(f"{name:<20} {count:>6,}")
    print(f"faults: {len(faults)}; {time.perf_counter() - started:.0f} s")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
