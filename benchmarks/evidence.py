"""Every table of accuracy in REPRODUCIBILITY.md by one command: it runs what is missing, then makes the tables.

    python benchmarks/evidence.py --glyphs DATA/glyphs --fashion-mnist DATA/fashion-mnist

Days on two cores. Every script keeps what it has finished in benchmarks/results, and goes on from there, so that it may
be stopped at any time. What is to be measured anew is removed there first. The pictures of the README are of its first
command: its results.json is kept in benchmarks/results/emoji-janus-0. Tables of times have commands of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
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
    "merged.py run",
    "defaults.py run",
    "documents.py",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glyphs", type=Path, required=True, help="folder that benchmarks/glyphs/build.py has built")
    parser.add_argument("--fashion-mnist", type=Path, required=True, help="folder of the files")
    options = parser.parse_args()
    folders = {name: str(folder.resolve()) for name, folder in vars(options).items()}
    for run in RUNS:
        script, *words = (word.format(**folders, results=HERE / "results") for word in run.split())
        print(f"python benchmarks/{run}", flush=True)
        done = subprocess.run([sys.executable, str(HERE / script), *words], check=False)
        if done.returncode != 0:
            raise SystemExit(f"evidence.py: {run} ended with {done.returncode}; the same command goes on")


if __name__ == "__main__":
    main()
