"""The numbers of a group of runs as the page shows them: means, deviations and the values behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from janus_ext.reports.found import FoundRun, Results
from janus_ext.reports.groups import Group
from janus_ext.reports.plots import short_name
from janus_ext.reports.table import NUMBERS, mean_of_known, spread, summarize_runs, violations_rounded
from janus_ext.runs.metrics import trajectory

MATRICES = {  # their names on the page and in results.json
    "all": "accuracy_matrix",
    "known": "accuracy_matrix_task_known",
    "recognised": "task_recognition_matrix",
}
Curve = dict[str, list[Any]]  # "mean" and "std" by task, and "values": for each run a list by task


def of_group(group: Group) -> dict[str, Any]:
    """Everything that the page shows of a group, as JSON; what any of its runs lacks is left out."""
    results = [run.results for run in group.runs]
    return {
        "name": group.name,
        "benchmark": results[0]["benchmark"],
        "method": results[0]["method"],
        "folder": str(group.folder),
        "seeds": [run["seed"] for run in results],
        "folders": [str(run.folder) for run in group.runs],
        "tasks": len(results[0]["accuracy_matrix"]),
        "numbers": _numbers(results),
        "heads": summarize_runs(results)["heads"],
        "curves": _curves(results),
        "matrices": {
            name: _matrix([run[key] for run in results]) for name, key in MATRICES.items() if _all(results, key)
        },
        "layers": {key: _by_layer(results, key) for key in ("violation_per_layer", "basis_rank") if _all(results, key)},
        "training": _training(group.runs),
    }


def curve(rows: Sequence[Sequence[float | None]]) -> Curve:
    """The spread over runs of one sequence a run, all of one length."""
    spreads = [spread(list(column)) for column in zip(*rows, strict=True)]
    return {key: [each[key] for each in spreads] for key in ("mean", "std")} | {"values": [list(row) for row in rows]}


def _all(results: Sequence[Results], *keys: str) -> bool:
    return all(key in run for run in results for key in keys)


def _numbers(results: Sequence[Results]) -> dict[str, Any]:
    """One number a run, as the summary of several seeds has them, and three more."""
    numbers = {key: value for key, value in summarize_runs(results).items() if key in NUMBERS}
    for key in ("violation", "danger"):
        if _all(results, key):
            numbers[key] = spread([mean_of_known(run[key]) for run in results])
    if _all(results, "seconds"):
        numbers["seconds"] = spread([sum(filter(None, run["seconds"])) for run in results])
    if "violation" in numbers:
        numbers["violation"]["rounded"] = [_all_rounded(run) for run in results]
    return numbers


def _all_rounded(results: Results) -> bool:
    """Whether no violation of the run is above what the rounding of the weights can make."""
    known = [mark for mark, value in zip(_rounded(results), results["violation"], strict=True) if value is not None]
    return bool(known) and all(known)


def _rounded(results: Results) -> list[bool]:
    tasks = len(results["accuracy_matrix"])
    return violations_rounded(results) if "violation_per_layer" in results else [False] * tasks


def _curves(results: Sequence[Results]) -> dict[str, Curve]:
    """What has one number after every task."""
    curves = {
        name: curve([trajectory(run[key]) for run in results]) for name, key in MATRICES.items() if _all(results, key)
    }
    curves["newest"] = curve([[row[-1] for row in run["accuracy_matrix"]] for run in results])
    for key in ("violation", "danger", "seconds"):
        if _all(results, key):
            curves[key] = curve([run[key] for run in results])
    if "violation" in curves:
        curves["violation"]["rounded"] = [all(marks) for marks in zip(*map(_rounded, results), strict=True)]
    for name, key in (("rounding", "violation_rounding_per_layer"), ("basis_rank", "basis_rank")):
        if _all(results, key):
            curves[name] = curve([[mean_of_known(list(of.values())) for of in run[key]] for run in results])
    return {name: each for name, each in curves.items() if any(value is not None for value in each["mean"])}


def _matrix(matrices: Sequence[Sequence[Sequence[float]]]) -> list[Curve]:
    """Row t has the spreads of the tasks 0..t."""
    return [curve(rows) for rows in zip(*matrices, strict=True)]


def _by_layer(results: Sequence[Results], key: str) -> list[dict[str, Any]]:
    """The curve of every layer, first to last."""
    names = dict.fromkeys(name for run in results for layers in run[key] for name in layers)
    return [
        {"name": name, "short": short_name(name)}
        | curve([[layers.get(name) for layers in run[key]] for run in results])
        for name in names
    ]


def _training(runs: Sequence[FoundRun]) -> dict[str, Any]:
    """Loss and accuracy of every epoch, whose place is where it ends, in tasks. Empty where runs have other epochs."""
    epochs = list(runs[0].epochs)
    if not epochs or any(list(run.epochs) != epochs for run in runs):
        return {}
    count = {task: epoch + 1 for task, epoch in epochs}
    by_epoch = {
        key: curve([[line.get(key) for line in run.epochs.values()] for run in runs]) for key in ("loss", "accuracy")
    }
    return {"places": [task + (epoch + 1) / count[task] for task, epoch in epochs]} | by_epoch
