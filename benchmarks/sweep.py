"""Sweeps over the embedded benchmark: all methods, the paper's ablation rows, and the trials that chose the defaults.

    python benchmarks/sweep.py methods --seeds 0 1 2 3 4   # tunes every method alike, then runs the best on these seeds
    python benchmarks/sweep.py ablation --seeds 0 1 2 3 4  # ten rows, appended to benchmarks/results/ablation.jsonl
    python benchmarks/sweep.py tuning --seeds 100 101      # candidates, on seeds that no reported run uses
    python benchmarks/sweep.py table methods               # mean and spread as Markdown
    python benchmarks/sweep.py differences --against lora-drs   # of all methods to one of them, seed by seed
    python benchmarks/sweep.py differences ablation --against OE
    python benchmarks/sweep.py trials                      # every candidate of every method, as far as it was run

Every finished cell is one line of JSON; a sweep goes on where it stopped, and runs a cell again only when its
configuration, the embedded images or the backbone have changed. The class order is drawn from the seed.

`methods` gives every method nine candidates on seed 100 and its best two once more on seed 101; the better mean ACC of
both goes to the reported seeds. (How the candidates themselves came to be nine stands in REPRODUCIBILITY.md.)
"""

import argparse
from pathlib import Path

from sweep_cells import run_cells
from sweep_rows import METHODS, SELECTION_SEEDS, SWEEPS, candidates
from sweep_tables import chosen, differences, ranked, table, trials

from janus_ext.terminal import until_closed

RESULTS = Path(__file__).resolve().parent / "results"


def compare_methods(methods: list[str], seeds: list[int], jobs: int, threads: int, path: Path) -> None:
    """Tunes every method with the same number of trials and runs what was chosen on `seeds`."""
    rows = {method: candidates(method) for method in methods}
    first, second = SELECTION_SEEDS
    run_cells([(row, c, first) for table in rows.values() for row, c in table.items()], jobs, threads, path)
    best = {method: ranked(method, rows[method], (first,), path)[:2] for method in methods}
    run_cells([(row, rows[m][row], second) for m in methods for row in best[m]], jobs, threads, path)
    run_cells([(*chosen(method, path), seed) for seed in seeds for method in methods], jobs, threads, path)


def sweep(name: str, seeds: list[int], rows: list[str], jobs: int, threads: int, path: Path) -> None:
    """Runs what is missing of a sweep with fixed rows."""
    wanted = {row: SWEEPS[name][row] for row in rows or SWEEPS[name]}
    run_cells([(row, change, seed) for seed in seeds for row, change in wanted.items()], jobs, threads, path)


@until_closed
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["methods", *SWEEPS, "table", "differences", "trials"])
    parser.add_argument("name", nargs="?", choices=["methods", *SWEEPS], default="methods", help="what is shown")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", default=[], help="only these rows, or methods")
    parser.add_argument("--against", default="janus", help="row that the differences are taken to")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each")
    arguments = parser.parse_args()
    shown = RESULTS / f"{arguments.name}.jsonl"
    if arguments.action == "differences":
        print(differences(arguments.name, shown, arguments.against))
        return
    if arguments.action == "trials":
        print(trials(shown))
        return
    if arguments.action == "table":
        print(table(arguments.name, shown))
        return
    unknown = set(arguments.rows) - set(METHODS if arguments.action == "methods" else SWEEPS[arguments.action])
    if unknown:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    used = set(arguments.seeds) & set(SELECTION_SEEDS)
    if arguments.action == "methods" and used:
        parser.error(f"--seeds {', '.join(map(str, sorted(used)))}: methods are tuned on them, they are not reported")
    path = RESULTS / f"{arguments.action}.jsonl"
    how = (arguments.jobs, arguments.threads, path)
    if arguments.action == "methods":
        compare_methods(arguments.rows or list(METHODS), arguments.seeds, *how)
    else:
        sweep(arguments.action, arguments.seeds, arguments.rows, *how)


if __name__ == "__main__":
    main()
