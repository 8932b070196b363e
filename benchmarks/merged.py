"""How much of an update is to be merged? `--merge-scale` with every head, on held-out images.

    python benchmarks/merged.py run      # on emoji; goes on where it stopped
    python benchmarks/merged.py table    # as Markdown

Janus-LoRA at the rate and energies that linear heads want, without the guard, where there is something to shrink; the
same where the backbone learns in the first task only; and the frozen backbone. 6 epochs, as in the study, on the first
of the guard's splits. A run measures all heads but "aligned" and "lda 2000", which have runs of their own. Every
finished run is a line in benchmarks/results/merged-emoji.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from study_cells import accuracies, finite, run_cells
from study_rows import ALL_HEADS, DATA, OWN_RUNS, VALIDATION
from study_tables import counted, shown

PATH = Path(__file__).resolve().parent / "results" / "merged-emoji.jsonl"
SEEDS = (110, 111, 112, 113)
SHARES = (1.0, 0.75, 0.5, 0.25)
LESS = {"first task only": {"learn": "first"}, "frozen": {"learn": "none"}}  # rows in which less is learned
SETTING = {"method": "janus", "lr": 0.016, "energy_start": 0.97, "energy_end": 0.99, "head": "linear"}


def rows() -> dict[str, dict[str, Any]]:
    """What each row changes, the whole update first."""
    return {f"{share:g}": {"merge_scale": share} for share in SHARES} | LESS


def change(row: str, head: str) -> dict[str, Any]:
    """The configuration of the run that measures a head."""
    learns = {"head": "linear"} if row == "frozen" else SETTING
    own = OWN_RUNS[head][row if row in LESS else "janus"] if head in OWN_RUNS else {}
    return DATA["emoji"] | {"validation": VALIDATION["emoji"]} | learns | rows()[row] | own


def found(row: str, head: str) -> dict[int, float]:
    """ACC by seed."""
    return finite(accuracies(PATH, change(row, head), head, SEEDS))


def table() -> str:
    """ACC where all is merged, and how far a part of it is ahead of that, seed by seed, as Markdown."""
    first, *others = rows()
    whole = {head: found(first, head) for head in ALL_HEADS}
    text = [f"| share merged | {' | '.join(ALL_HEADS)} |", "|" + "---|" * (len(ALL_HEADS) + 1)]
    means = [f"{statistics.fmean(of.values()):.2f}" if of else "–" for of in whole.values()]
    cells = [counted(mean, len(of), len(SEEDS)) for mean, of in zip(means, whole.values(), strict=True)]
    text.append(f"| all of it, ACC | {' | '.join(cells)} |")
    text += [f"| {row} | {' | '.join(ahead(row, whole))} |" for row in others]
    return "\n".join(text)


def ahead(row: str, whole: dict[str, dict[int, float]]) -> list[str]:
    """The cells of a row: how far it is ahead of the whole update, by head."""
    cells = []
    for head, of in whole.items():
        values = [acc - of[seed] for seed, acc in found(row, head).items() if seed in of]
        cells.append(counted(shown(values), len(values), len(SEEDS)))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    runs = actions.add_parser("run")
    runs.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    actions.add_parser("table")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table())
        return
    tried = {f"{row} | {head}": change(row, head) for head in ("linear", *OWN_RUNS) for row in rows()}
    cells = [(row, configuration, seed) for seed in SEEDS for row, configuration in tried.items()]
    run_cells(cells, arguments.jobs, 1, PATH)


if __name__ == "__main__":
    main()
