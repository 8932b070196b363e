"""What finished cells show: the candidates chosen by them, and tables in Markdown."""

import statistics
from pathlib import Path
from typing import Any

from sweep_cells import assets_sha256, cell_config, is_done, read_lines
from sweep_rows import METHODS, SELECTION_SEEDS, SWEEPS, candidates

Rows = dict[str, tuple[str, dict[str, Any]]]


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
