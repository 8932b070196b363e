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
import hashlib
import json
import multiprocessing
import statistics
import tempfile
from pathlib import Path
from typing import Any

from provenance import commit

from janus_ext.terminal import until_closed

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "janus_ext" / "assets"
TRACKED = ("--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")  # these grow with every cell
METRICS = ("acc", "maa", "bwt", "plasticity", "violation", "danger", "seconds")

# The seven rows of the paper's ablation, plain LoRA once more at the rate that suits it best, and two exact rows.
ABLATION: dict[str, dict[str, Any]] = {
    "nothing": {"method": "lora", "lr": 1.6e-2},  # Janus-LoRA's rate
    "nothing, at its own best rate": {"method": "lora", "lr": 1.5e-3},  # what the sweep of all methods chose
    "DML": {"rectify": "none", "estimator": "none"},
    "OE": {"rectify": "project", "margin_weight": 0.0},
    "GR": {"rectify": "tangent", "estimator": "none", "margin_weight": 0.0},
    "OE + GR": {"rectify": "tangent", "margin_weight": 0.0},
    "OE + DML": {"rectify": "project"},
    "OE + GR + DML": {"rectify": "tangent"},
    "OE + GR, exact": {"rectify": "exact", "margin_weight": 0.0},
    "OE + GR + DML, exact": {"rectify": "exact"},
}

# Where the trials started, spelled out so that they stay what they were when the defaults move.
START: dict[str, Any] = {
    "lr": 1e-3,
    "head_lr": 1e-2,
    "epochs": 12,
    "energy_start": 0.7,
    "energy_end": 0.9,
    "damping": 0.1,
    "share": 0.5,
    "balance": True,
    "margin_weight": 0.0,
    "margin": 0.2,
    "temperature": 16.0,
}
PLAIN = {"method": "lora"} | {name: START[name] for name in ("lr", "head_lr", "epochs")}

# One change at a time from START, which is exact rectification without the margin loss; and plain LoRA beside it.
TUNING: dict[str, dict[str, Any]] = {
    "start": START,
    "plain LoRA": PLAIN,
    "head lr 0.005": START | {"head_lr": 5e-3},
    "plain LoRA, head lr 0.005": PLAIN | {"head_lr": 5e-3},
    **{
        f"energy {a:g} to {b:g}": START | {"energy_start": a, "energy_end": b}
        for a, b in ((0.5, 0.7), (0.9, 0.97), (0.97, 0.99))
    },
    **{f"lr {v:g}": START | {"lr": v} for v in (5e-4, 2e-3)},
    **{f"plain LoRA, lr {v:g}": PLAIN | {"lr": v} for v in (5e-4, 2e-3)},
    **{f"DML weight {w:g}": START | {"margin_weight": w} for w in (0.1, 0.5)},
    "DML weight 0.5, margin 0.4": START | {"margin_weight": 0.5, "margin": 0.4},
    "no balance": START | {"balance": False},
    **{f"share {v:g}": START | {"share": v} for v in (0.0, 1.0)},
    **{f"damping {v:g}": START | {"damping": v} for v in (0.01, 1.0)},
}
# Second round: the first showed factors that hardly move at lr 0.001, so every row came out alike.
for _lr in (4e-3, 8e-3):
    TUNING[f"plain LoRA, lr {_lr:g}"] = PLAIN | {"lr": _lr}
    for _start, _end in ((0.7, 0.9), (0.9, 0.97), (0.97, 0.99)):
        TUNING[f"lr {_lr:g}, energy {_start:g} to {_end:g}"] = START | {
            "lr": _lr,
            "energy_start": _start,
            "energy_end": _end,
        }
TUNING["lr 0.004, energy 0.9 to 0.97, DML weight 0.5"] = TUNING["lr 0.004, energy 0.9 to 0.97"] | {"margin_weight": 0.5}
TUNING["lr 0.004, energy 0.9 to 0.97, no balance"] = TUNING["lr 0.004, energy 0.9 to 0.97"] | {"balance": False}
_CHOSEN = TUNING["lr 0.008, energy 0.9 to 0.97"]
for _weight, _margin in ((0.2, 0.2), (0.5, 0.2), (0.5, 0.5)):
    _change = {"margin_weight": _weight, "margin": _margin}
    TUNING[f"lr 0.008, energy 0.9 to 0.97, DML weight {_weight:g}, margin {_margin:g}"] = _CHOSEN | _change
# Third round: the form of the rectification at the chosen rate and energies.
_FINAL = TUNING["lr 0.008, energy 0.9 to 0.97, DML weight 0.5, margin 0.2"]
for _name, _value in (("share", 0.0), ("share", 1.0), ("damping", 0.01), ("damping", 1.0), ("balance", False)):
    TUNING[f"chosen, {_name} {_value:g}"] = _FINAL | {_name: _value}
SWEEPS = {"ablation": ABLATION, "tuning": TUNING}

# Nine candidates for each method: the learning rate, and the setting that matters most beside it.
SELECTION_SEEDS = (100, 101)
_RATES = [{"lr": v} for v in (2.5e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 8e-3, 1.6e-2)]


def _grid(rates: tuple[float, ...], *others: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"lr": lr} | other for lr in rates for other in others]


def _energies(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"energy_start": start, "energy_end": end} for start, end in pairs]


_MEMORY = _grid((2e-3, 8e-3, 1.6e-2), *_energies((0.7, 0.9), (0.9, 0.97), (0.97, 0.99)))
_TRIPLET = _grid((5e-4, 1e-3, 4e-3, 8e-3), {"margin_weight": 0.05}, {"margin_weight": 0.2})
_TRIPLET += [{"lr": 2e-3, "margin_weight": 0.2}]
_GPM = _grid((1e-3, 4e-3, 8e-3, 1.6e-2), *_energies((0.9, 0.97), (0.97, 0.99)))
_GPM += [{"lr": 8e-3, "energy_start": 0.99, "energy_end": 0.999}]
METHODS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "janus": ({"method": "janus"}, _MEMORY),
    "lora": ({"method": "lora"}, _RATES),
    "joint": ({"method": "joint"}, [{"lr": v} for v in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2, 3.2e-2)]),
    "lora-gpm": ({"method": "lora-gpm"}, _GPM),
    "lora-gpm + GR": ({"method": "lora-gpm", "rectify": "exact"}, _MEMORY),
    "inflora": ({"method": "inflora"}, _grid((1e-3, 4e-3, 1.6e-2), *_energies((0.95, 1), (0.98, 1), (0.999, 1)))),
    "lora-drs": ({"method": "lora-drs"}, _TRIPLET),
    "lora-drs + GR": ({"method": "lora-drs", "rectify": "exact"}, _TRIPLET),
    "bilora": ({"method": "bilora"}, [{"lr": v} for v in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 2e-2, 5e-2, 1e-1, 2e-1)]),
    "janus, ncm": ({"method": "janus", "head": "ncm"}, _MEMORY),
    "lora, ncm": ({"method": "lora", "head": "ncm"}, _RATES),
    "frozen, ncm": ({"method": "lora", "head": "ncm", "epochs": 1}, [{"lr": 1e-12}]),  # nothing to tune
}


def resolved(change: dict[str, Any], seed: int) -> Any:
    """The resolved configuration of one cell."""
    from janus_ext.config import TrainConfig

    return TrainConfig(**change, seed=(seed,), shuffle_classes=True, plots=False).resolved()


def cell_config(change: dict[str, Any], seed: int) -> dict[str, Any]:
    """The resolved configuration of one cell as JSON, without what does not touch the result."""
    config = resolved(change, seed)
    return {key: value for key, value in config.to_json().items() if key not in {"output", *config.without_effect()}}


def assets_sha256() -> str:
    """Fingerprint of the embedded images, classes and backbone."""
    digest = hashlib.sha256()
    for name in ("backbone.safetensors", "emoji.json", "emoji.zip"):
        digest.update((ASSETS / name).read_bytes())
    return digest.hexdigest()


def run_cell(cell: tuple[str, dict[str, Any], int, int]) -> dict[str, Any]:
    """Trains one cell (row, change, seed, threads) in this process and returns its line."""
    import torch

    from janus_ext.config import TrainConfig
    from janus_ext.train import train

    row, change, seed, threads = cell
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(**change, seed=(seed,), shuffle_classes=True, plots=False, output=Path(folder) / "run")
        results = train(config)[0]
    line = {"row": row, "seed": seed, "config": cell_config(change, seed), "assets": assets_sha256()}
    line |= {metric: total_of(metric, results[metric]) for metric in METRICS}
    return line | {
        "split_sha256": results["split_sha256"],
        "versions": results["versions"],
        "commit": commit(*TRACKED),
    }


def try_cell(cell: tuple[str, dict[str, Any], int, int]) -> dict[str, Any]:
    """`run_cell`, or what it failed with: the cells beside it go on."""
    try:
        return run_cell(cell)
    except Exception as error:
        return {"row": cell[0], "seed": cell[2], "error": f"{type(error).__name__}: {error}"}


def total_of(metric: str, value: Any) -> float | None:
    """One number of a metric: the sum of the seconds, the mean over the tasks that have one, or the number itself."""
    if not isinstance(value, list):
        return value
    known = [v for v in value if v is not None]
    if metric == "seconds":
        return sum(known)
    return statistics.fmean(known) if known else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All finished cells in the file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_done(line: dict[str, Any], row: str, config: dict[str, Any], assets: str) -> bool:
    """Whether a finished cell is this one, under this configuration and these assets.

    Settings that came into the program after the cell had run must stand at their defaults.
    """
    if line["row"] != row or line["assets"] != assets or line["seed"] != config["seed"][0]:
        return False
    if all(config.get(name) == value for name, value in line["config"].items() if name in config):
        defaults = resolved({"method": config["method"]}, line["seed"]).to_json()
        return all(value == defaults[name] for name, value in config.items() if name not in line["config"])
    return False


Cell = tuple[str, dict[str, Any], int]


def run_cells(cells: list[Cell], jobs: int, threads: int, path: Path) -> None:
    """Runs those of `cells` that `path` lacks, `jobs` at a time, appending each as it ends."""
    path.parent.mkdir(exist_ok=True)
    assets, finished = assets_sha256(), read_lines(path)
    wanted = [
        (row, change, seed)
        for row, change, seed in cells
        if not any(is_done(line, row, cell_config(change, seed), assets) for line in finished)
    ]
    print(f"{path.stem}: {len(wanted)} of {len(cells)} cells to run, {jobs} at a time")
    failed = []
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        finishing = pool.imap_unordered(try_cell, [(*cell, threads) for cell in wanted])
        for count, line in enumerate(finishing, 1):
            name = f"{line['row']}, seed {line['seed']}"
            if "error" in line:
                failed.append(name)
            else:
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            print(f"[{count}/{len(wanted)}] {name}: {line.get('error') or format(line['acc'], '.2f')}", flush=True)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def candidates(method: str) -> dict[str, dict[str, Any]]:
    """The configurations tried for `method`, by the name of their row."""
    fixed, changes = METHODS[method]
    return {f"{method} | {', '.join(f'{k} {v:g}' for k, v in change.items())}": fixed | change for change in changes}


def ranked(method: str, rows: dict[str, dict[str, Any]], seeds: tuple[int, ...], path: Path) -> list[str]:
    """The names of `rows` by their mean ACC over `seeds`, best first."""
    assets, lines = assets_sha256(), read_lines(path)

    def mean(row: str) -> float:
        configs = [cell_config(rows[row], seed) for seed in seeds]
        found = [[line["acc"] for line in lines if is_done(line, row, config, assets)] for config in configs]
        if not all(found):
            raise SystemExit(f"{row}: not tried yet on seeds {', '.join(map(str, seeds))}; run the methods sweep first")
        return statistics.fmean(accuracies[0] for accuracies in found)

    return sorted(rows, key=mean, reverse=True)


def chosen(method: str, path: Path) -> tuple[str, dict[str, Any]]:
    """The candidate that goes to the reported seeds, from finished trials."""
    rows = candidates(method)
    best = ranked(method, rows, SELECTION_SEEDS[:1], path)[:2]
    row = ranked(method, {row: rows[row] for row in best}, SELECTION_SEEDS, path)[0]
    return row, rows[row]


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


def table(name: str, path: Path) -> str:
    """Mean and sample deviation of each row's finished cells as Markdown, in the sweep's order."""
    if name == "methods":
        return methods_table(path)
    text = ["| row | seeds | ACC | MAA | BWT | plasticity | violation | danger |", "|---|---|---|---|---|---|---|---|"]
    for row, cells in finished({row: (row, change) for row, change in SWEEPS[name].items()}, path).items():
        text.append(f"| {row} | {len(cells)} | " + " | ".join([*accuracies(cells), danger(cells)]) + " |")
    return "\n".join(text)


def methods_table(path: Path) -> str:
    """What was chosen for each method and what it reached on the reported seeds, also seed by seed against janus."""
    rows, reported = reported_cells(path)
    text = ["| method | chosen | ACC | MAA | BWT | plasticity | violation | ACC less janus's |"]
    text.append("|" + "---|" * 8)
    janus = {line["seed"]: line["acc"] for line in reported["janus"]}
    for method, cells in reported.items():
        ahead = spread([line["acc"] - janus[line["seed"]] for line in cells if line["seed"] in janus], "{:+.2f}")
        setting = rows[method][0].partition(" | ")[2]
        text.append(f"| {method} | {setting} | " + " | ".join([*accuracies(cells), ahead]) + " |")
    return "\n".join(text)


def differences(name: str, path: Path, against: str) -> str:
    """How far every method or row is ahead of `against`, seed by seed, as Markdown: mean and sample deviation."""
    if name == "methods":
        reported = reported_cells(path)[1]
    else:
        reported = finished({row: (row, change) for row, change in SWEEPS[name].items()}, path)
    if against not in reported:
        raise SystemExit(f"--against {against}: no such finished row; there are {', '.join(reported)}")
    base = {line["seed"]: line for line in reported[against]}
    metrics = ("acc", "maa", "bwt", "plasticity")
    text = [f"| less {against} | ACC | MAA | BWT | plasticity | seeds ahead in ACC, MAA |", "|---|---|---|---|---|---|"]
    for method, cells in reported.items():
        pairs = [(line, base[line["seed"]]) for line in cells if line["seed"] in base]
        if method == against or not pairs or pairs[0][0]["bwt"] is None:
            continue
        gains = {metric: [ours[metric] - theirs[metric] for ours, theirs in pairs] for metric in metrics}
        ahead = [f"{sum(gain > 0 for gain in gains[metric])} of {len(pairs)}" for metric in ("acc", "maa")]
        columns = [spread(gains[metric], "{:+.2f}") for metric in metrics]
        text.append(f"| {method} | " + " | ".join([*columns, ", ".join(ahead)]) + " |")
    return "\n".join(text)


def trials(path: Path) -> str:
    """Every candidate's ACC on the selection seeds, and its means on the reported ones, as Markdown."""
    rows = {row: (row, change) for method in METHODS for row, change in candidates(method).items()}
    seeds = " | ".join(f"ACC, seed {seed}" for seed in SELECTION_SEEDS)
    text = [f"| method | candidate | {seeds} | reported seeds | ACC | MAA | BWT |", "|" + "---|" * 8]
    for row, cells in finished(rows, path).items():
        selected = [spread([c["acc"] for c in cells if c["seed"] == seed], "{:.2f}") for seed in SELECTION_SEEDS]
        reported = [c for c in cells if c["seed"] not in SELECTION_SEEDS]
        columns = [*row.split(" | "), *selected, str(len(reported)), *accuracies(reported)[:3]]
        text.append("| " + " | ".join(columns) + " |")
    return "\n".join(text)


Rows = dict[str, tuple[str, dict[str, Any]]]


def reported_cells(path: Path) -> tuple[Rows, dict[str, list[dict[str, Any]]]]:
    """What was chosen for each method, as (row, change), and its finished cells on the reported seeds."""
    rows = {method: chosen(method, path) for method in METHODS}
    cells = finished(rows, path).items()
    return rows, {method: [line for line in lines if line["seed"] not in SELECTION_SEEDS] for method, lines in cells}


def finished(rows: Rows, path: Path) -> dict[str, list[dict[str, Any]]]:
    """The finished cells of every (row, change), under the keys of `rows`; rows without any are left out."""
    assets, lines = assets_sha256(), read_lines(path)
    cells = {
        shown: [line for line in lines if is_done(line, row, cell_config(change, line["seed"]), assets)]
        for shown, (row, change) in rows.items()
    }
    return {shown: found for shown, found in cells.items() if found}


def accuracies(cells: list[dict[str, Any]]) -> list[str]:
    """Columns of a table: ACC, MAA, BWT, plasticity, violation."""
    columns = [spread([c[metric] for c in cells], "{:.2f}") for metric in ("acc", "maa", "bwt", "plasticity")]
    return [*columns, spread([c["violation"] for c in cells], "{:.1e}")]


def danger(cells: list[dict[str, Any]]) -> str:
    """Column of a table: danger."""
    return spread([c["danger"] for c in cells], "{:.3f}")


def spread(values: list[float | None], form: str) -> str:
    """'mean ± deviation' of the values; a dash where the row has no such number."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = form.format(statistics.fmean(known))
    return mean if len(known) == 1 else f"{mean} ± {form.replace('+', '').format(statistics.stdev(known))}"


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
    shown = HERE / "results" / f"{arguments.name}.jsonl"
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
    path = HERE / "results" / f"{arguments.action}.jsonl"
    how = (arguments.jobs, arguments.threads, path)
    if arguments.action == "methods":
        compare_methods(arguments.rows or list(METHODS), arguments.seeds, *how)
    else:
        sweep(arguments.action, arguments.seeds, arguments.rows, *how)


if __name__ == "__main__":
    main()
