"""Would held-out images choose other defaults of the training? One change at a time.

    python benchmarks/defaults.py run      # on emoji; goes on where it stopped
    python benchmarks/defaults.py table    # as Markdown

The defaults come from trials that saw the test images. Here a run trains on a part of the training images and is
measured on the rest of them, on the first of the guard's splits: Janus-LoRA with linear heads as the program has it,
and plain LoRA, in all tasks and in the first only, at the rates that the study chooses for them, 6 epochs as there.
Every finished run is a line in benchmarks/results/defaults-emoji.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from study_cells import accuracies, finite, run_cells
from study_rows import DATA, VALIDATION
from study_tables import counted, shown

PATH = Path(__file__).resolve().parent / "results" / "defaults-emoji.jsonl"
SEEDS = (110, 111, 112, 113)
HEADS = ("linear", "ncm", "lda")
HEAD_RATES = {f"head rate {rate:g}": {"head_lr": rate} for rate in (0.0025, 0.005, 0.02, 0.04)}
WEIGHTS = {f"margin loss of weight {weight:g}": {"margin_weight": weight} for weight in (0.0, 0.25, 1.0, 2.0)}
MARGINS = {f"margin {margin:g}": {"margin": margin} for margin in (0.0, 0.1, 0.4)}
STEP = {
    **{f"share {share:g}": {"share": share} for share in (0.25, 0.75)},
    **{f"damping {damping:g}": {"damping": damping} for damping in (0.01, 0.03, 0.3, 1.0)},
    "no balance": {"balance": False},
}
EPOCHS = {f"{epochs} epochs": {"epochs": epochs} for epochs in (3, 12, 24)}
METHODS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "janus": ({"method": "janus"}, HEAD_RATES | WEIGHTS | MARGINS | STEP | EPOCHS),
    "lora": ({"method": "lora", "lr": 0.008}, HEAD_RATES),
    "first task only": ({"method": "lora", "lr": 0.032, "learn": "first"}, {}),
    "frozen": ({"learn": "none"}, {}),
}


def rows() -> dict[str, dict[str, Any]]:
    """The configuration of every row, each method's own first."""
    common = DATA["emoji"] | {"head": "linear", "validation": VALIDATION["emoji"]}
    return {
        ", ".join(filter(None, (method, name))): common | plain | change
        for method, (plain, changes) in METHODS.items()
        for name, change in ({"": {}} | changes).items()
    }


def table() -> str:
    """ACC of each method as it is, and how far the others are ahead of it, seed by seed."""
    text = [f"| | {' | '.join(HEADS)} |", "|" + "---|" * (len(HEADS) + 1)]
    plain: dict[str, dict[int, float]] = {}
    for row, change in rows().items():
        found = {head: finite(accuracies(PATH, change, head, SEEDS)) for head in HEADS}
        if row in METHODS:
            plain, row = found, f"{row}, ACC"
            values = [list(of.values()) for of in found.values()]
            cells = [f"{statistics.fmean(of):.2f}" if of else "–" for of in values]
        else:  # of a run that is not at its end, or diverged, a seed of either may be missing
            values = [[acc - plain[h][seed] for seed, acc in found[h].items() if seed in plain[h]] for h in HEADS]
            cells = [shown(of) for of in values]
        counted_cells = [counted(cell, len(of), len(SEEDS)) for cell, of in zip(cells, values, strict=True)]
        text.append(f"| {row} | {' | '.join(counted_cells)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    runs = actions.add_parser("run")
    runs.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    actions.add_parser("table")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table())
    else:
        run_cells([(row, c, seed) for seed in SEEDS for row, c in rows().items()], arguments.jobs, 1, PATH)


if __name__ == "__main__":
    main()
