"""Tables and pictures of the documents by one command: it runs what is missing, then makes them.

    python benchmarks/evidence.py --glyphs DATA/glyphs --fashion-mnist DATA/fashion-mnist

Days on two cores. Every script keeps what it has finished in benchmarks/results, and goes on from there, so that it may
be stopped at any time. What is to be measured anew is removed there first. Times are those of the machine that it runs
on, which should do nothing else. Not made here: gpu-* and dry-h100.json, by benchmarks/gpu/run.sh on a GPU;
cpu-amd*.json, which are cpu.json of other processors; and the tables of peft_forgetting.py and `traffic.py measure`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = (
    "guard.py run emoji",
    "guard.py run fashion-mnist --data-dir {fashion_mnist}",
    "guard.py run glyphs-fonts --data-dir {glyphs}",
    "first_task.py run --glyphs {glyphs} --fashion-mnist {fashion_mnist} --json {results}/first-task.json",
    "breaks.py run fashion-mnist --data-dir {fashion_mnist}",
    "breaks.py run glyphs --data-dir {glyphs}",
    "input_energy.py run --glyphs {glyphs} --fashion-mnist {fashion_mnist} --json {results}/input-energy.json",
    "random_features.py run --glyphs {glyphs} --fashion-mnist {fashion_mnist} --json {results}/random-features.json",
    "study.py run emoji",
    "study.py run glyphs --data-dir {glyphs}",
    "study.py run fashion-mnist --data-dir {fashion_mnist}",
    "study.py run emoji --fresh",
    "study.py run glyphs --data-dir {glyphs} --fresh",
    "study.py run fashion-mnist --data-dir {fashion_mnist} --fresh",
    "merged.py run",
    "defaults.py run",
)
# What makes a file that is written once, by its name in benchmarks/results. The first is of the README's first command,
# which its pictures show: of the run's folder its results.json is kept.
FILES = {
    "emoji-janus-0/results.json": "-m janus_ext.train --output",
    "families.json": "families.py --json",
    "heads.json": "run.py run heads --json",
    "cpu.json": "run.py run kernels --json",
    "program.json": "run.py run program --json",
    "estimators.json": "estimators.py --json",
    "loader.json": "loader.py --json",
    "flatness.json": "flatness.py --json",
    "shares.json": "shares.py run",
    "dry-cpu.json": "full_size.py dry --json",
}


def call(first: str, *words: str) -> None:
    """Runs Python with these, a script of this folder or -m at first, and ends with what it fails with."""
    run = " ".join((first, *words))
    print(f"python {run}", flush=True)
    script = str(HERE / first) if first.endswith(".py") else first
    done = subprocess.run([sys.executable, script, *words], check=False)
    if done.returncode != 0:
        raise SystemExit(f"evidence.py: {run} ended with {done.returncode}; the same command goes on")


def make(path: Path, run: str) -> None:
    """Calls `run` with a new name behind it, and keeps at `path` what it made, once that is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "made"
        call(*run.split(), str(made))
        (made / path.name if made.is_dir() else made).replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glyphs", type=Path, required=True, help="folder that benchmarks/glyphs/build.py has built")
    parser.add_argument("--fashion-mnist", type=Path, required=True, help="folder of the files")
    options = parser.parse_args()
    folders = {name: str(folder.resolve()) for name, folder in vars(options).items()}
    results = HERE / "results"
    for run in RUNS:
        call(*(word.format(**folders, results=results) for word in run.split()))
    for name, run in FILES.items():
        if not (results / name).exists():
            make(results / name, run)
    call("documents.py")


if __name__ == "__main__":
    main()
