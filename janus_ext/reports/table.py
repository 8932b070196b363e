"""What a finished run shows in the terminal: a table and headline numbers, made from ``results.json`` alone."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from janus_ext.errors import visible
from janus_ext.runs.metrics import mean_and_std, measured_on, trajectory

Results = dict[str, Any]
HEADLINES = {
    "acc": "ACC",
    "acc_task_known": "ACC with the task known",
    "task_recognition": "task recognition",
    "maa": "MAA",
    "bwt": "BWT",
    "forgetting": "forgetting",
    "plasticity": "plasticity",
}
NEEDED = (  # by the table, beside what every page needs
    *("violation", "violation_per_layer", "basis_rank", "danger", "seconds"),
    *("acc_sample_weighted", "maa_sample_weighted"),
)
NUMBERS = (*HEADLINES, "acc_sample_weighted", "maa_sample_weighted")  # what results.json has one of
TRAJECTORIES = {"task known": "accuracy_matrix_task_known", "recognised": "task_recognition_matrix"}
ROUNDED = "~ at the rounding of the weights: of the update itself it is less, or nothing"
LABEL = 12  # columns of the terminal before a row's cells
CELL = 5  # narrowest cell; a blank stands before each
MOST_ROWS = 30  # of the accuracy matrix
ELLIPSIS = "..."


def format_table(results: Results, width: int | None = None) -> str:
    """Accuracy matrix, per-task measurements and headline numbers as text.

    Lines have at most ``width`` characters, by default the terminal's, or 80 where there is none; the columns and rows
    in the middle are left out where there are too many tasks for that.
    """
    width = width or shutil.get_terminal_size().columns
    lines = [
        f"{results['benchmark']}, method {results['method']}{_head(results)}, seed {results['seed']}",
        "",
        *textwrap.wrap(
            f"accuracy (%) on {measured(results)} of task j after task t, over all classes seen so far", width
        ),
        *_task_columns(results, width),
        "",
        *_headlines(results, width),
    ]
    return visible("\n".join(lines))


def format_summary(runs: Sequence[Results], width: int | None = None) -> str:
    """Mean and deviation over several seeds as text, in lines of at most ``width`` characters."""
    width = width or shutil.get_terminal_size().columns
    summary = summarize_runs(runs)
    cells = [f"{label} {_mean_std(summary[key])}" for key, label in HEADLINES.items() if key in summary]
    by_head = [f"{name} {_mean_std(of['acc'])}" for name, of in summary["heads"].items()]
    cells = [*_flow(cells, width), *(_flow(["ACC by head:", *by_head], width) if len(by_head) > 1 else [])]
    heading = f"{len(runs)} seeds, on {measured(runs[0])}, mean +- standard deviation:"
    return visible("\n".join([heading, *cells]))


def summarize_runs(runs: Sequence[Results]) -> Results:
    """What ``summary.json`` holds: per metric the mean, the sample deviation (null for one seed) and the values.

    A metric that some run lacks, which an earlier version wrote, is left out. ``heads`` has the same for each head.
    """
    head = {key: runs[0][key] for key in ("benchmark", "method", "validation") if key in runs[0]}
    spreads = {key: spread([run[key] for run in runs]) for key in NUMBERS if all(key in run for run in runs)}
    return head | {"seeds": [run["seed"] for run in runs]} | spreads | {"heads": _heads_of(runs)}


def _heads_of(runs: Sequence[Results]) -> dict[str, Results]:
    """The same for every head that all runs have measured."""
    measured = [run.get("heads", {}) for run in runs]
    shared = [name for name in measured[0] if all(name in heads for heads in measured)]
    return {
        name: {
            key: spread([heads[name][key] for heads in measured])
            for key in NUMBERS
            if all(key in heads[name] for heads in measured)
        }
        for name in shared
    }


def measured(results: Results) -> str:
    """What a run has measured, in words; an earlier version knew test images alone."""
    return measured_on(results.get("validation", False))


def violations_rounded(results: Results) -> list[bool]:
    """Per task, whether no layer's violation is above what the rounding of W can make; False where that is unknown."""
    tasks = results["violation_per_layer"]
    roundings = results.get("violation_rounding_per_layer", [{}] * len(tasks))
    return [
        bool(violation) and all(name in rounding and value <= rounding[name] for name, value in violation.items())
        for violation, rounding in zip(tasks, roundings, strict=True)
    ]


def spread(values: list[float | None]) -> dict[str, Any]:
    """Mean, sample deviation (None for one value) and the values; mean and deviation are None if any value is."""
    if any(value is None for value in values):
        return {"mean": None, "std": None, "values": values}
    mean, std = mean_and_std(values)
    return {"mean": mean, "std": std, "values": values}


def mean_of_known(values: list[float | None]) -> float | None:
    """Mean of the numbers among them; None where there is none."""
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def thinned(count: int, room: int) -> list[int | None]:
    """0 .. count - 1 where they fit into ``room`` places, else the first and the last of them around a None."""
    if count <= room:
        return list(range(count))
    first = max(room, 3) // 2
    last = max(room, 3) - 1 - first
    return [*range(first), None, *range(count - last, count)]


def _task_columns(results: Results, width: int) -> list[str]:
    """The accuracy matrix and what was measured after each task, below each other, a column a task."""
    matrix = results["accuracy_matrix"]
    averages, measured = trajectory(matrix), _measured(results)
    cell = 1 + max(CELL, *(len(text) for row in measured.values() for text in row))
    shown = thinned(len(matrix), (width - LABEL - len("   mean")) // cell)

    def line(label: str, texts: Sequence[str]) -> str:
        cells = (ELLIPSIS if j is None else texts[j] if j < len(texts) else "" for j in shown)
        return label.ljust(LABEL) + "".join(text.rjust(cell) for text in cells)

    tasks = [str(j + 1) for j in range(len(matrix))]
    lines = [line("      t \\ j", tasks) + "   mean"]
    for t in thinned(len(matrix), MOST_ROWS):
        if t is None:
            lines.append(f"    {ELLIPSIS}")
        else:
            lines.append(line(f"  {t + 1:>5}", [f"{value:.1f}" for value in matrix[t]]) + f"{averages[t]:7.1f}")
    return [*lines, "", line("  after t", tasks), *(line(f"  {name}", texts) for name, texts in measured.items())]


def _measured(results: Results) -> dict[str, list[str]]:
    """Quantities measured after each task, by the heading of their row."""
    known = {label: trajectory(results[key]) for label, key in TRAJECTORIES.items() if key in results}
    marks = ["~" if rounded else "" for rounded in violations_rounded(results)]
    ranks = [_mean(list(rank.values())) if rank else None for rank in results["basis_rank"]]
    violations = zip(marks, _cells(_short_exponent, results["violation"]), strict=True)
    return {label: _cells("{:.1f}".format, values) for label, values in known.items()} | {
        "violation": [mark + text for mark, text in violations],
        "danger": _cells("{:.2f}".format, results["danger"]),
        "basis rank": _cells("{:.0f}".format, ranks),
        "seconds": _cells(_seconds, results["seconds"]),
    }


def _headlines(results: Results, width: int) -> list[str]:
    """The numbers people compare, their sample-weighted kin on another line, and what a mark says."""
    cells = [f"{label} {_number(results[key])}" for key, label in HEADLINES.items() if key in results]
    violation, danger = (mean_of_known(results[key]) for key in ("violation", "danger"))
    rounded = violations_rounded(results)
    known = [mark for mark, value in zip(rounded, results["violation"], strict=True) if value is not None]
    mark = "~" if known and all(known) else ""
    cells.append(f"violation {'-' if violation is None else f'{mark}{violation:.1e}'}")
    cells.append(f"danger {'-' if danger is None else format(danger, '.3f')}")
    weighted = f"ACC {_number(results['acc_sample_weighted'])}   MAA {_number(results['maa_sample_weighted'])}"
    footnote = textwrap.wrap(ROUNDED, width - 2) if any(rounded) else []
    return [
        *_flow(cells, width),
        f"  weighted by images: {weighted}",
        *_flow(_by_head(results), width),
        *(f"  {line}" for line in footnote),
    ]


def _head(results: Results) -> str:
    return f", head {results['head']}" if "head" in results else ""


def _by_head(results: Results) -> list[str]:
    """ACC of every head that was measured, where there is more than the run's own."""
    heads = results.get("heads", {})
    return ["ACC by head:", *(f"{name} {_number(of['acc'])}" for name, of in heads.items())] if len(heads) > 1 else []


def _flow(cells: Iterable[str], width: int) -> list[str]:
    """Cells beside each other, as many as a line of ``width`` takes."""
    lines: list[str] = []
    for cell in cells:
        if lines and len(lines[-1]) + 3 + len(cell) <= width:
            lines[-1] += f"   {cell}"
        else:
            lines.append(f"  {cell}")
    return lines


def _cells(form: Callable[[float], str], values: Iterable[float | None]) -> list[str]:
    return ["-" if value is None else form(value) for value in values]


def _short_exponent(value: float) -> str:
    """ "3e-7": with a mark before it no wider than other cells."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _mean_std(of: dict[str, Any]) -> str:
    std = "" if of["std"] is None else f" +- {of['std']:.2f}"
    return _number(of["mean"]) + std


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
