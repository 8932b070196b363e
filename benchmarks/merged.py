"""How much of an update is to be merged? `--merge-scale` with every head, on held-out images.

    python benchmarks/merged.py run      # on emoji; goes on where it stopped
    python benchmarks/merged.py table    # as Markdown

Janus-LoRA at the rate and energies that linear heads want, without the guard, where there is something to shrink, and
the frozen backbone; 6 epochs, as in the study, on the first of the guard's splits. A run measures all heads but
"aligned" and "lda 2000", which have runs of their own. Every finished run is a line in
benchmarks/results/merged-emoji.jsonl.
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
FROZEN = 0.0  # nothing is merged where nothing is learned
SETTING = {"method": "janus", "lr": 0.016, "energy_start": 0.97, "energy_end": 0.99, "head": "linear"}


def change(share: float, head: str) -> dict[str, Any]:
    """The configuration of the run that measures a head."""
    learns = {"learn": "none", "head": "linear"} if share == FROZEN else SETTING | {"merge_scale": share}
    own = OWN_RUNS[head]["frozen" if share == FROZEN else "janus"] if head in OWN_RUNS else {}
    return DATA["emoji"] | {"validation": VALIDATION["emoji"]} | learns | own


def found(share: float, head: str) -> dict[int, float]:
    """ACC by seed."""
    return finite(accuracies(PATH, change(share, head), head, SEEDS))


def table() -> str:
    """ACC where all is merged, and how far a part of it is ahead of that, seed by seed, as Markdown."""
    whole = {head: found(1.0, head) for head in ALL_HEADS}
    text = [f"| share merged | {' | '.join(ALL_HEADS)} |", "|" + "---|" * (len(ALL_HEADS) + 1)]
    means = [f"{statistics.fmean(of.values()):.2f}" if of else "–" for of in whole.values()]
    cells = [counted(mean, len(of), len(SEEDS)) for mean, of in zip(means, whole.values(), strict=True)]
    text.append(f"| all of it, ACC | {' | '.join(cells)} |")
    text += [f"| {titled(share)} | {' | '.join(ahead(share, whole))} |" for share in (*SHARES[1:], FROZEN)]
    return "\n".join(text)


def titled(share: float) -> str:
    """What a row is called."""
    return "frozen" if share == FROZEN else f"{share:g}"


def ahead(share: float, whole: dict[str, dict[int, float]]) -> list[str]:
    """The cells of a row: how far this share is ahead of all, by head."""
    cells = []
    for head, of in whole.items():
        values = [acc - of[seed] for seed, acc in found(share, head).items() if seed in of]
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
    tried = [(share, head) for head in ("linear", *OWN_RUNS) for share in (*SHARES, FROZEN)]
    rows = {f"{titled(share)} | {head}": change(share, head) for share, head in tried}
    cells = [(row, configuration, seed) for seed in SEEDS for row, configuration in rows.items()]
    run_cells(cells, arguments.jobs, 1, PATH)


if __name__ == "__main__":
    main()
