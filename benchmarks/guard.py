"""Does the default fall below the frozen backbone? Janus-LoRA with `lda` and its guard, over held-out splits.

    python benchmarks/guard.py run emoji                            # goes on where it stopped
    python benchmarks/guard.py run fashion-mnist --data-dir DATA/fashion-mnist
    python benchmarks/guard.py run glyphs-fonts --data-dir DATA/glyphs
    python benchmarks/guard.py table                                # of all data sets that were run
    python benchmarks/guard.py table --against "as shipped"         # held against another row than frozen

Every seed holds out other training images (shares as in the study) and draws another order of the classes. Seeds 100
to 109 are left out: what is shipped was chosen on them. "glyphs-fonts" holds out whole fonts, six of the 30 that
are there to learn from, so that what is measured is in a style that no task has seen, as the test images of glyphs are.
"emoji" has 16 splits, of 400 held-out images each, on which eight said little; the others have eight.
Every finished run is a line in benchmarks/results/guard-<data>.jsonl; where the guard is changed, remove them first.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import study_rows
from study_cells import accuracies, run_cells
from study_rows import VALIDATION, located
from study_tables import shown

BY_FONT = "glyphs-fonts"
SEEDS = {"emoji": range(110, 126), "fashion-mnist": range(110, 118), BY_FONT: range(110, 118)}
HEAD = "lda"
HELD_OUT_FONTS = 6
ROWS: dict[str, dict[str, Any]] = {
    "frozen": {"learn": "none"},
    "first task only": {"learn": "first"},
    "as shipped": {},
    "as shipped, 6 epochs": {"epochs": 6},
    "as shipped, 3 epochs": {"epochs": 3},
    "as shipped, rate 0.064": {"lr": 0.064},  # sixteen times the default's
    "without the guard": {"drift_budget": 1e9},
    "without the guard, rate 0.064": {"drift_budget": 1e9, "lr": 0.064},
}
DATA = {data: settings | {"epochs": None} for data, settings in study_rows.DATA.items()}  # the preset's own


def path(data: str) -> Path:
    """Where the finished runs of a data set stand."""
    return Path(__file__).resolve().parent / "results" / f"guard-{data}.jsonl"


def change(data: str, row: str) -> dict[str, Any]:
    """The configuration of a row."""
    held_out = {} if data == BY_FONT else {"validation": VALIDATION[data]}
    return {"method": "janus", "head": HEAD} | held_out | DATA["glyphs" if data == BY_FONT else data] | ROWS[row]


def run(data: str, folder: Path | None, jobs: int) -> None:
    """Runs what is missing, seed by seed."""
    where = located(data, folder)
    for seed in SEEDS[data]:
        cells = [(row, change(data, row), seed) for row in ROWS]
        with tempfile.TemporaryDirectory() as fonts:
            if data == BY_FONT:
                where = located(data, hold_out_fonts(folder, seed, Path(fonts)))
            run_cells(cells, jobs, 1, path(data), where)


def hold_out_fonts(glyphs: Path, seed: int, target: Path) -> Path:
    """The training images of `glyphs` as class folders in `target`: those of some fonts, drawn by `seed`, to test."""
    images = sorted((glyphs / "train").glob("*/*.png"))
    held_out = random.Random(seed).sample(sorted({image.name for image in images}), HELD_OUT_FONTS)
    for image in images:
        place = target / ("test" if image.name in held_out else "train") / image.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, place)
    return target


def table(against: str = "frozen") -> str:
    """ACC of the row `against`, and how far the others are ahead of it, seed by seed, as Markdown."""
    columns = {
        data: {row: accuracies(path(data), change(data, row), HEAD, SEEDS[data]) for row in ROWS} for data in SEEDS
    }
    columns = {data: column for data, column in columns.items() if column[against]}
    if not columns:
        raise SystemExit("nothing has been run yet: python benchmarks/guard.py run emoji")
    text = [f"| | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for row in ROWS:
        base = None if row == against else against
        cells = [cell(column.get(base), column[row], len(SEEDS[data])) for data, column in columns.items()]
        text.append(f"| {row if base else f'{row}, ACC'} | {' | '.join(cells)} |")
    return "\n".join(text)


def cell(base: dict[int, float | None] | None, found: dict[int, float | None], seeds: int) -> str:
    """How far a row is ahead of `base`, or its own ACC, in bold only where both have all seeds; how many it lacks."""
    known = {seed: acc for seed, acc in found.items() if acc is not None}
    if base is None:
        text = f"{statistics.fmean(known.values()):.2f}"
    else:
        gains = [acc - base[seed] for seed, acc in known.items() if base.get(seed) is not None]
        text = shown(gains) if len(gains) == seeds else shown(gains).replace("**", "")
    missing, diverged = seeds - len(found), len(found) - len(known)
    text += f" ({seeds - missing} of {seeds} seeds)" if 0 < missing < seeds else ""
    return text + (f" ({diverged} diverged)" if diverged else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    runs = actions.add_parser("run")
    runs.add_argument("data", choices=SEEDS)
    runs.add_argument("--data-dir", type=Path, help="where the images of fashion-mnist or glyphs lie")
    runs.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    shows = actions.add_parser("table")
    shows.add_argument("--against", choices=ROWS, default="frozen", help="the row that the others are held against")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table(arguments.against))
    else:
        run(arguments.data, arguments.data_dir, arguments.jobs)


if __name__ == "__main__":
    main()
