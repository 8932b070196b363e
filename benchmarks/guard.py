"""Does the default fall below the frozen backbone? Janus-LoRA with `lda` and its guard, over eight held-out splits.

    python benchmarks/guard.py run glyphs --data-dir DATA/glyphs    # or emoji, fashion-mnist; goes on where it stopped
    python benchmarks/guard.py table                                # of all data sets that were run

Every seed holds out other training images (shares as in the study) and draws another order of the classes. Seeds 100
and 101 are left to the study, whose choices came from them. Every finished run is a line in
benchmarks/results/guard-<data>.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from study_cells import identity, is_done, read_lines, run_cells
from study_rows import DATA, VALIDATION, located
from study_tables import shown

SEEDS = range(102, 110)
HEAD = "lda"
BY_RATE: dict[str, dict[str, Any]] = {"": {}, ", rate 0.004": {"lr": 0.004}}  # the default, and a quarter of it
ROWS: dict[str, dict[str, Any]] = {"frozen": {"learn": "none", "epochs": None}}
ROWS |= {f"first task only{name}": {"learn": "first"} | rate for name, rate in BY_RATE.items()}
ROWS |= {f"as shipped{name}": {"drift_budget": 0.1} | rate for name, rate in BY_RATE.items()}
ROWS |= {
    "as shipped, budget 0.03": {"drift_budget": 0.03},
    "as shipped, energies 0.9999 to 0.99999": {"drift_budget": 0.1, "energy_start": 0.9999, "energy_end": 0.99999},
}


def path(data: str) -> Path:
    """Where the finished runs of a data set stand."""
    return Path(__file__).resolve().parent / "results" / f"guard-{data}.jsonl"


def change(data: str, row: str) -> dict[str, Any]:
    """The configuration of a row."""
    return {"method": "janus", "head": HEAD, "validation": VALIDATION[data]} | DATA[data] | ROWS[row]


def accuracies(data: str, row: str) -> dict[int, float]:
    """ACC by seed, of the runs that are finished."""
    lines = read_lines(path(data))
    wanted = {seed: identity(change(data, row), seed) for seed in SEEDS}
    return {s: x["heads"][HEAD]["acc"] for s, cell in wanted.items() for x in lines if is_done(x, cell)}


def table() -> str:
    """ACC of the frozen backbone, and how far the others are ahead of it, seed by seed, as Markdown."""
    known = [data for data in DATA if path(data).exists()]
    columns = {data: {row: accuracies(data, row) for row in ROWS} for data in known}
    frozen = [f"{statistics.fmean(column['frozen'].values()):.2f}" for column in columns.values()]
    text = [f"| | {' | '.join(known)} |", "|" + "---|" * (len(known) + 1), f"| frozen, ACC | {' | '.join(frozen)} |"]
    for row in list(ROWS)[1:]:
        cells = [
            shown([acc - column["frozen"][seed] for seed, acc in column[row].items() if seed in column["frozen"]])
            for column in columns.values()
        ]
        text.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run")
    run.add_argument("data", choices=list(DATA))
    run.add_argument("--data-dir", type=Path, help="where the images of glyphs or fashion-mnist lie")
    run.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    actions.add_parser("table")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table())
    else:
        cells = [(row, change(arguments.data, row), seed) for seed in SEEDS for row in ROWS]
        run_cells(cells, arguments.jobs, 1, path(arguments.data), located(arguments.data, arguments.data_dir))


if __name__ == "__main__":
    main()
