"""How much of an update is to be merged? `--merge-scale` with every head, on held-out images.

    python benchmarks/merged.py run emoji                                      # goes on where it stopped
    python benchmarks/merged.py run fashion-mnist --data-dir DATA/fashion-mnist
    python benchmarks/merged.py table                                          # of all data sets that were run

Janus-LoRA at the rate and energies that linear heads want on `emoji`, without the guard, where there is something to
shrink; the study's epochs, the first of the guard's splits. A run measures all heads but "aligned" and "lda 2000",
which have runs of their own. Every finished run is a line in benchmarks/results/merged-<data>.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from study_cells import identity, is_done, read_lines, run_cells
from study_rows import ALL_HEADS, DATA, OWN_RUNS, VALIDATION, located
from study_tables import counted, shown

RESULTS = Path(__file__).resolve().parent / "results"
SETS = ("emoji", "fashion-mnist")
SEEDS = (110, 111, 112, 113)
SHARES = (1.0, 0.75, 0.5, 0.25)
SETTING = {"method": "janus", "lr": 0.016, "energy_start": 0.97, "energy_end": 0.99, "head": "linear"}


def change(data: str, share: float, head: str) -> dict[str, Any]:
    """The configuration of the run that measures a head."""
    own = OWN_RUNS[head][1]["janus"] if head in OWN_RUNS else {}
    return DATA[data] | {"validation": VALIDATION[data]} | SETTING | {"merge_scale": share} | own


def path(data: str) -> Path:
    """Where the finished runs of a data set stand."""
    return RESULTS / f"merged-{data}.jsonl"


def run(data: str, folder: Path | None, jobs: int) -> None:
    """Runs what is missing, seed by seed."""
    rows = {f"{share:g} merged | {head}": change(data, share, head) for head in ("lda", *OWN_RUNS) for share in SHARES}
    cells = [(row, configuration, seed) for seed in SEEDS for row, configuration in rows.items()]
    run_cells(cells, jobs, 1, path(data), located(data, folder))


def accuracies(data: str, share: float, head: str) -> dict[int, float]:
    """ACC by seed, of the runs that are finished and did not diverge."""
    lines, configuration = read_lines(path(data)), change(data, share, head)
    found = {seed: next((x for x in lines if is_done(x, identity(configuration, seed))), None) for seed in SEEDS}
    name = "lda" if head == "lda 2000" else head
    return {seed: line["heads"][name]["acc"] for seed, line in found.items() if line and line["heads"]}


def table() -> str:
    """ACC where all is merged, and how far a part of it is ahead of that, seed by seed, as Markdown."""
    text = [f"| data, share merged | {' | '.join(ALL_HEADS)} |", "|" + "---|" * (len(ALL_HEADS) + 1)]
    for data in SETS:
        whole = {head: accuracies(data, 1.0, head) for head in ALL_HEADS}
        if any(whole.values()):
            means = [f"{statistics.fmean(of.values()):.2f}" if of else "–" for of in whole.values()]
            cells = [counted(mean, len(of), len(SEEDS)) for mean, of in zip(means, whole.values(), strict=True)]
            text.append(f"| {data}, all of it: ACC | {' | '.join(cells)} |")
            text += [f"| {data}, {share:g} | {' | '.join(ahead(data, share, whole))} |" for share in SHARES[1:]]
    return "\n".join(text)


def ahead(data: str, share: float, whole: dict[str, dict[int, float]]) -> list[str]:
    """A row: how far this share is ahead of all, by head."""
    cells = []
    for head, of in whole.items():
        found = accuracies(data, share, head)
        values = [acc - of[seed] for seed, acc in found.items() if seed in of]
        cells.append(counted(shown(values), len(values), len(SEEDS)))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    runs = actions.add_parser("run")
    runs.add_argument("data", choices=SETS)
    runs.add_argument("--data-dir", type=Path, help="where the images of fashion-mnist lie")
    runs.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    actions.add_parser("table")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table())
    else:
        run(arguments.data, arguments.data_dir, arguments.jobs)


if __name__ == "__main__":
    main()
