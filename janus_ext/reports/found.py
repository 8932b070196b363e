"""The finished runs in the folders that somebody names, with what of each can be shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.reports.table import NUMBERS
from janus_ext.runs.run import Run

MOST_EPOCHS = 10**6  # of a task; a line of a larger one is no run's

Results = dict[str, Any]
Epoch = tuple[int, int]  # task and epoch, from 0
OF_RUN = ("config.json", "results.json")  # a folder with either is a run


@dataclass(frozen=True)
class FoundRun:
    """A finished run: what ``results.json`` holds, its settings, and the line of every epoch."""

    folder: Path
    results: Results
    settings: dict[str, Any]
    """``config.json``; empty where the folder has none."""
    epochs: dict[Epoch, dict[str, Any]]
    """The lines of ``metrics.jsonl`` in the order of training; empty where the folder has none."""


def find_runs(folders: Sequence[Path]) -> tuple[list[FoundRun], list[str]]:
    """The finished runs in ``folders``, each once and in their order, and one line for each run that is left out.

    A folder is a run, holds the runs of several seeds (``seed-*``), or holds such folders.

    Raises:
        ArgumentError: no folder is named, one is none of these, or none of the runs can be shown.
    """
    if not folders:
        raise ArgumentError("name the folder of at least one RUN; --help has an example")
    runs, skipped = [], []
    for folder in dict.fromkeys(path for named in folders for path in _run_folders(named)):
        try:
            runs.append(_read(folder))
        except CheckpointError as error:
            skipped.append(f"{folder} is left out: {error}")
    if not runs:
        raise ArgumentError("no run can be shown: " + "; ".join(skipped))
    return _each_once(runs), skipped


def fault(results: Results) -> str | None:
    """What keeps ``results.json`` from being shown; None where nothing does. Most keys may be missing: older runs'."""
    missing = [key for key in ("benchmark", "method", "seed", "accuracy_matrix") if key not in results]
    if missing:
        return f"it lacks {', '.join(missing)}"
    tasks = len(results["accuracy_matrix"]) if isinstance(results["accuracy_matrix"], list) else 0
    for key, fits in SHAPES.items():
        if key in results and not fits(results[key], tasks):
            return f"{key} is not what a run of {tasks} tasks writes"
    return None


def _run_folders(named: Path) -> Iterator[Path]:
    """The folders of runs in one that the user named."""
    if not named.is_dir():
        raise ArgumentError(f"RUN {named} is {'no folder' if named.exists() else 'missing'}; name the folder of a run")
    try:
        found = list(_runs_below(named, levels=2))
    except OSError as error:
        raise ArgumentError(f"RUN {named} cannot be read: {error}") from error
    if not found:
        raise ArgumentError(f"RUN {named} is no run and holds none: there is no {' or '.join(OF_RUN)}")
    yield from found


def _runs_below(folder: Path, levels: int) -> Iterator[Path]:
    if any((folder / name).is_file() for name in OF_RUN):
        yield folder
    elif levels:
        for child in sorted(filter(Path.is_dir, folder.iterdir()), key=_natural):
            yield from _runs_below(child, levels - 1)


def _natural(folder: Path) -> tuple[str, int, str]:
    """Sorts seed-2 before seed-10."""
    stem = folder.name.rstrip("0123456789")
    number = folder.name[len(stem) :]
    return stem, int(number or 0), number


def _each_once(runs: Iterable[FoundRun]) -> list[FoundRun]:
    """Without those that another path led to already."""
    return list({run.folder.resolve(): run for run in runs}.values())


def _read(folder: Path) -> FoundRun:
    """CheckpointError where the run has not finished, or a file of it is damaged."""
    run = Run(folder)
    if not run.is_finished:
        kind = "is a saved learner" if run.is_begun and run.is_saved_learner else "has not finished"
        raise CheckpointError(f"it {kind} (no results.json)")
    results = run.results()
    reason = fault(results)
    if reason:
        raise CheckpointError(f"{folder}/results.json: {reason}")
    settings = run.settings() if (folder / "config.json").exists() else {}
    return FoundRun(folder, results, settings, _by_epoch(run.epochs(), len(results["accuracy_matrix"])))


def _by_epoch(lines: Iterable[dict[str, Any]], tasks: int) -> dict[Epoch, dict[str, Any]]:
    """The lines that say which epoch they are of and hold numbers; of two for one epoch the later."""
    numbers = ("loss", "accuracy")
    whole = (line for line in lines if _is_place(line.get("task"), tasks) and _is_place(line.get("epoch"), MOST_EPOCHS))
    by_epoch = {(line["task"], line["epoch"]): line for line in whole if all(_maybe(line.get(key)) for key in numbers)}
    return dict(sorted(by_epoch.items()))


def _is_place(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


# what the values of results.json must be; the second argument is the number of tasks ----------------------------------
def _number(value: Any) -> bool:
    if isinstance(value, float):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _maybe(value: Any) -> bool:
    return value is None or _number(value)


def _triangle(value: Any, tasks: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == tasks > 0
        and all(isinstance(row, list) and len(row) == t + 1 for t, row in enumerate(value))
        and all(_number(cell) for row in value for cell in row)
    )


def _per_task(value: Any, tasks: int) -> bool:
    return isinstance(value, list) and len(value) == tasks and all(map(_maybe, value))


def _per_layer(value: Any, tasks: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == tasks
        and all(isinstance(layers, dict) and all(map(_number, layers.values())) for layers in value)
    )


def _heads(value: Any, tasks: int) -> bool:
    return isinstance(value, dict) and all(
        isinstance(of, dict)
        and _triangle(of.get("accuracy_matrix"), tasks)
        and _number(of.get("acc"))
        and all(_maybe(number) for key, number in of.items() if key != "accuracy_matrix")
        for of in value.values()
    )


def _is(kind: type) -> Callable[[Any, int], bool]:
    return lambda value, tasks: isinstance(value, kind)


SHAPES: dict[str, Callable[[Any, int], bool]] = {
    **dict.fromkeys(("benchmark", "method"), _is(str)),
    "seed": _is(int),
    "validation": _is(bool),
    "versions": _is(dict),
    **dict.fromkeys(("accuracy_matrix", "accuracy_matrix_task_known", "task_recognition_matrix"), _triangle),
    **dict.fromkeys(("violation", "danger", "seconds"), _per_task),
    **dict.fromkeys(("violation_per_layer", "violation_rounding_per_layer", "basis_rank"), _per_layer),
    "heads": _heads,
    **dict.fromkeys(NUMBERS, lambda value, tasks: _maybe(value)),
}
