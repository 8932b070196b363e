"""Whether runs are the same, bit by bit: results, epochs and every saved tensor, all but times and versions.

python benchmarks/same_runs.py BEFORE AFTER

Two runs, or two folders of them under the same names: those of a change that is to move nothing, for one. Make them
with the same number of threads on one machine: for m in janus lora ...; do janus_ext.train --method $m --output
BEFORE/$m; done. Status 1 and the names of what is not alike where something moved.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from janus_ext.runs.checkpoint import read_json, read_tensors

MOVING = ("seconds", "versions")


def differences(folder: Path, other: Path) -> list[str]:
    """Names of the files that two runs do not have alike."""
    ours, theirs = kept(folder), kept(other)
    alike = {name for name in ours.keys() & theirs.keys() if same(ours[name], theirs[name])}
    return sorted((ours.keys() | theirs.keys()) - alike)


def kept(folder: Path) -> dict[str, Any]:
    """What a run leaves that another one must repeat, by the names of the files."""
    results = read_json(folder / "results.json")
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tensors = {path.name: read_tensors(path)[0] for path in (folder / "checkpoints").iterdir()}
    timeless = [{key: value for key, value in row.items() if key not in MOVING} for row in (results, *epochs)]
    return {"results.json": timeless[0], "metrics.jsonl": timeless[1:], **tensors}


def same(ours: Any, theirs: Any) -> bool:
    """Whether two files are alike, tensors bit by bit."""
    if not isinstance(ours, dict) or not any(isinstance(value, torch.Tensor) for value in ours.values()):
        return ours == theirs
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def runs_in(folder: Path) -> dict[str, Path]:
    """The run in a folder, or those in its subfolders, by name."""
    if (folder / "results.json").exists():
        return {"": folder}
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/results.json"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    before, after = runs_in(arguments.before), runs_in(arguments.after)
    names = sorted(before.keys() & after.keys())
    if not names:
        sys.exit(f"no run of the same name lies in {arguments.before} and {arguments.after}")
    moved = {name: differences(before[name], after[name]) for name in names}
    for name in names:
        files = len(kept(after[name]))
        print(f"{name or after[name]}: {', '.join(moved[name]) + ' moved' if moved[name] else f'{files} files alike'}")
    sys.exit(any(moved.values()))


if __name__ == "__main__":
    main()
