"""What destroys the features on Fashion-MNIST without a guard? One change at a time of a run that does.

    python benchmarks/breaks.py run fashion-mnist --data-dir DATA/fashion-mnist   # goes on where it stopped
    python benchmarks/breaks.py run glyphs --data-dir DATA/glyphs                 # some of it elsewhere
    python benchmarks/breaks.py table                                             # of both, as Markdown

Janus-LoRA with `lda`, without a guard, at the rate 0.004 and energies of 0.97 to 0.99, on three of the guard's held-out
splits. Every finished run is a line in benchmarks/results/breaks-<data>.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from study_cells import OFF, identity, is_done, read_lines, run_cells
from study_rows import DATA, VALIDATION, located
from study_tables import counted, spread

SEEDS = (110, 111, 112)
PLAIN = {"method": "janus", "head": "lda", "lr": 0.004, "energy_start": 0.97, "energy_end": 0.99} | OFF
MORE_ENERGY = {"energy_start": 0.999, "energy_end": 0.9999}
FREE: dict[str, Any] = {"energy_start": None, "energy_end": None}  # nothing is remembered that could be protected
CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    "energies of 0.999 to 0.9999": MORE_ENERGY,
    "no margin loss": {"margin_weight": 0.0},
    "both": MORE_ENERGY | {"margin_weight": 0.0},
    "rate 0.001": {"lr": 0.001},
    "two tasks": {"tasks": 2},
    "the first task only": {"learn": "first"} | FREE,
    "nothing protected, no margin loss": {"method": "lora"} | FREE,
}
FEW = tuple(CHANGES)[:5]  # what is tried with 12 epochs


def _rows(epochs: int, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    said = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    return {", ".join(filter(None, (said, name))): CHANGES[name] | {"epochs": epochs} for name in names}


ROWS: dict[str, dict[str, Any]] = {
    "frozen": {"learn": "none", "lr": None, "epochs": None, "drift_budget": None} | FREE,
    **_rows(1, ("",)),
    **_rows(3, tuple(CHANGES)),
    **_rows(12, FEW),
}
OF = {"fashion-mnist": tuple(ROWS), "glyphs": ("frozen", "3 epochs", "12 epochs", "3 epochs, the first task only")}


def path(data: str) -> Path:
    """Where the finished runs of a data set stand."""
    return Path(__file__).resolve().parent / "results" / f"breaks-{data}.jsonl"


def change(data: str, row: str) -> dict[str, Any]:
    """The configuration of a row."""
    return {"validation": VALIDATION[data]} | DATA[data] | PLAIN | ROWS[row]


def finished(data: str, row: str) -> list[dict[str, Any]]:
    """The lines of a row, by seed."""
    lines = read_lines(path(data))
    cells = [identity(change(data, row), seed) for seed in SEEDS]
    return [line for cell in cells for line in lines if is_done(line, cell)]


def table() -> str:
    """ACC and by how far tasks move their own features, mean and deviation over the splits."""
    sets = [data for data in OF if path(data).exists()]
    text = [f"| | {' | '.join(f'{data}: ACC | deviations moved' for data in sets)} |", "|---|" + "---|---|" * len(sets)]
    for row in ROWS:
        lines = [finished(data, row) if row in OF[data] else [] for data in sets]
        cells = [
            f"{cell([x['heads'].get('lda', {}).get('acc') for x in of])} | {cell([x['movement'] for x in of])}"
            for of in lines
        ]
        text.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(text)


def cell(values: list[float | None]) -> str:
    """Mean and deviation, and of how many of the splits where that is not all."""
    return counted(spread(values), sum(value is not None for value in values), len(SEEDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    runs = actions.add_parser("run")
    runs.add_argument("data", choices=OF)
    runs.add_argument("--data-dir", type=Path, required=True, help="where the images lie")
    runs.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    actions.add_parser("table")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table())
        return
    data = arguments.data
    cells = [(row, change(data, row), seed) for seed in SEEDS for row in OF[data]]
    run_cells(cells, arguments.jobs, 1, path(data), located(data, arguments.data_dir))


if __name__ == "__main__":
    main()
