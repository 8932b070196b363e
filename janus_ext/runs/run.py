"""A run on disk: its configuration, its files, and what there is to take up."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.runs.checkpoint import (
    SHA256,
    append_json_line,
    make_folder,
    read_json,
    read_json_lines,
    read_sealed_json,
    read_tensors,
    remove,
    to_json,
    write_json_lines,
    write_sealed_json,
    write_tensors,
)
from janus_ext.runs.folder import is_finished, is_run, is_saved_learner, opened

LOG = logging.getLogger("janus_ext")
CONFIG = "config"  # metadata: the SHA-256 with which the config.json of the run is sealed
TASKS = "tasks"  # metadata: the names of the classes of every task, in the order of the model's outputs


@dataclass(frozen=True)
class Saved:
    """What a run has kept of its last finished task."""

    model: dict[str, Tensor]
    method: dict[str, Tensor]
    about: dict[str, str]
    tasks: tuple[tuple[str, ...], ...]
    """The names of the classes of every task, in the order of the model's outputs."""


class Run:
    """The run in ``folder``; making this object neither needs nor touches it.

    ``config.json`` is written first, a line of ``metrics.jsonl`` after every epoch, the files in ``checkpoints`` after
    every task, one of them within it, too, ``results.json`` at the end.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self._model_sha256: str | None = None  # of the last finished task, once there is one
        self._place: tuple[os.stat_result, str] | None = None  # where it works, while it does

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run or the saved learner in ``folder``; ArgumentError if there is none."""
        run = cls(folder)
        if not run.is_begun:
            seeds = sorted(run.folder.glob("seed-*/config.json"))
            if seeds:
                raise ArgumentError(
                    f"folder {folder} holds the runs of {len(seeds)} seeds: name one, such as {seeds[0].parent}"
                )
            found = f"folder {folder} holds no run of this program" if run.folder.is_dir() else f"{folder} is no folder"
            raise ArgumentError(f"{found}; wanted is what janus_ext.train or ContinualLearner.save wrote")
        return run

    @property
    def is_begun(self) -> bool:
        """Whether the folder holds the configuration of a run."""
        return is_run(self.folder)

    @property
    def is_saved_learner(self) -> bool:
        """Whether `ContinualLearner.save` has written it, and no training run."""
        return is_saved_learner(self.folder)

    @property
    def is_finished(self) -> bool:
        """Whether it holds results."""
        return is_finished(self.folder)

    def settings(self) -> dict[str, Any]:
        """``config.json``: the resolved settings, and what they stand for."""
        return read_json(self.folder / "config.json")

    def results(self) -> dict[str, Any]:
        """``results.json``; CheckpointError if it is missing or damaged."""
        return read_json(self.folder / "results.json")

    def epochs(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, none where there is no such file."""
        return read_json_lines(self.folder / "metrics.jsonl")

    # working in it ----------------------------------------------------------------------------------------------------
    @contextmanager
    def opened(self, settings: dict[str, Any], begin: bool) -> Iterator[None]:
        """Makes the folder and keeps other processes out of it; begins with ``settings``, or goes on.

        Within it nothing is written once the folder is gone: no command would open what a new one of its name held.
        """
        with opened(self.folder, settings, begin) as handle:
            self._place = os.fstat(handle), self._seal
            try:
                yield
            finally:
                self._place = None

    def prepare(self) -> None:
        """Makes the folder, that it fails before anything is computed where it cannot be made."""
        self._require_in_place()
        make_folder(self.checkpoints)

    def write_epoch(self, record: Mapping[str, Any]) -> None:
        """Appends a line to ``metrics.jsonl``."""
        self._require_in_place()
        append_json_line(self.folder / "metrics.jsonl", record)

    def keep_epochs(self, epochs: Sequence[int]) -> None:
        """Drops the lines of ``metrics.jsonl`` but for the first so many of each task."""
        path, lines = self.folder / "metrics.jsonl", self.epochs()
        if not path.exists() and not sum(epochs):
            return
        wanted = [(task, epoch) for task, number in enumerate(epochs) for epoch in range(number)]
        kept = [line for line in lines if (line.get("task"), line.get("epoch")) in wanted]
        if [(line["task"], line["epoch"]) for line in kept] != wanted:
            LOG.warning("%s was altered: it does not hold every epoch that is done once", path)
        write_json_lines(path, kept)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Writes ``config.json``."""
        write_sealed_json(self.folder / "config.json", settings)

    def write_factors(self, task: int, factors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Writes what a task has added to the weights."""
        self._be_ready()
        write_tensors(self.factors_path(task), factors, {**about, CONFIG: self._seal})

    def write_task(
        self,
        index: int,
        state: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        about: Mapping[str, str],
        tasks: Sequence[Sequence[str]],
        results: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes what the method keeps and the model, behind the factors: ``state`` has both, the model first.

        The model comes last and carries the results: with it the task is finished, and what the method kept before
        is not needed any more. Cut off anywhere, the files of one finished task are all there.
        """
        self._be_ready()
        model, method = state
        about = {**about, "task": str(index), TASKS: to_json(tasks), CONFIG: self._seal}
        about["state"] = write_tensors(self._method_path(index), method, about)
        if results is not None:
            about["results"] = to_json(results)
        self._require_in_place()
        self._model_sha256 = write_tensors(self._model_path, model, about)
        self.remove_methods_before(index)
        remove([self._within_path])

    def write_within(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes what there is of the task that is being learned, in place of what there was of it."""
        self._be_ready()
        write_tensors(self._within_path, tensors, {"behind": self._behind, "state": to_json(state)})

    def finish(self, results: Mapping[str, Any]) -> None:
        """Writes ``results.json``: the run is finished."""
        self._require_in_place()
        write_sealed_json(self.folder / "results.json", results)

    def _be_ready(self) -> None:
        """Before a file of tensors is written. A run that works in its folder has made that of its checkpoints."""
        if self._place is None:
            make_folder(self.checkpoints)
        self._require_in_place()

    def _require_in_place(self) -> None:
        """CheckpointError where another folder has the name of the one that is open, or other settings are in it."""
        if self._place is None:
            return
        held, seal = self._place  # the descriptor is open: no other folder gets its numbers meanwhile
        try:
            there = os.path.samestat(self.folder.stat(), held) and (self.folder / "config.json").exists()
        except FileNotFoundError:
            there = False
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error}") from error
        if not there or self._seal != seal:
            raise CheckpointError(
                f"{self.folder} was moved, removed or altered while the run wrote there: nothing more is written; "
                "--resume goes on with it where it is now"
            )

    # what it has kept -------------------------------------------------------------------------------------------------
    def saved(self) -> Saved | None:
        """What there is of the last finished task, None where none was finished.

        Raises:
            CheckpointError: a file is missing, damaged, or does not belong to the others.
        """
        if not self._model_path.exists():
            if any(path.name != "factors-0.safetensors" for path in self.checkpoints.glob("factors-*")):
                raise CheckpointError(
                    f"{self._model_path} is missing, and tasks were finished; without --resume the run starts over"
                )
            return None
        model, about = read_tensors(self._model_path)
        if not about.keys() >= {"task", "state"}:
            raise CheckpointError(f"{self._model_path} lacks results: an earlier version of this program wrote it")
        self._require_own(about, self._model_path)
        self._model_sha256 = about.get(SHA256, "")
        with self.fitting():
            beside, tasks = self._method_path(int(about["task"])), _task_names(about, model)
        method, of_method = read_tensors(beside)
        if of_method.get(SHA256) != about["state"]:
            raise CheckpointError(f"{beside} does not belong to {self._model_path}")
        return Saved(model, method, about, tasks)

    def within(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `write_within` was given of the task behind the one that `saved` gave; None where there is nothing.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not self._within_path.exists():
            return None
        try:
            tensors, about = read_tensors(self._within_path)
            if about.get("behind") != self._behind:  # of a task that was finished before this file could be removed
                remove([self._within_path])
                return None
            return tensors, json.loads(about["state"])
        except (CheckpointError, KeyError, ValueError, RecursionError) as error:
            reason = error if isinstance(error, CheckpointError) else f"{self._within_path} holds no state"
            raise CheckpointError(f"{reason}; without that file --resume goes on behind the last task") from error

    def factors(self, task: int) -> dict[str, Tensor]:
        """What a task has added to the weights, as it was before its merge; CheckpointError where it is of another."""
        tensors, about = read_tensors(self.factors_path(task))
        self._require_own(about, self.factors_path(task))
        if about.get("task") != str(task):
            raise CheckpointError(f"{self.factors_path(task)} is not of task {task}")
        return tensors

    def factors_path(self, index: int) -> Path:
        """The file of a task's factors, as they were before their merge."""
        return self.checkpoints / f"factors-{index}.safetensors"

    def remove_methods_before(self, index: int) -> None:
        """Removes what the method kept after earlier tasks."""
        remove(self._method_path(earlier) for earlier in range(index))

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Says in one line which file does not fit what takes up its tensors."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(f"{self._model_path} does not fit this run: {reason[-1].strip()}") from error

    @property
    def _seal(self) -> str:
        """The SHA-256 of ``config.json``, "" where there is none, or a version before this one wrote it."""
        path = self.folder / "config.json"
        return read_sealed_json(path)[1] if path.exists() else ""

    @property
    def _behind(self) -> str:
        """What a state within a task is behind: the model of the task before, or of the first one the settings."""
        return self._seal if self._model_sha256 is None else self._model_sha256

    def _require_own(self, about: Mapping[str, str], path: Path) -> None:
        if about.get(CONFIG, self._seal) != self._seal:
            raise CheckpointError(f"{path} does not belong to {self.folder / 'config.json'}")

    @property
    def _model_path(self) -> Path:
        return self.checkpoints / "model.safetensors"

    @property
    def _within_path(self) -> Path:
        return self.checkpoints / "within.safetensors"

    def _method_path(self, index: int) -> Path:
        return self.checkpoints / f"method-{index}.safetensors"


def _task_names(about: Mapping[str, str], model: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """The classes' names by task; an error that `Run.fitting` expects, where there are none."""
    tasks = json.loads(about[TASKS]) if TASKS in about else _earlier_task_names(about, model)
    if not all(isinstance(name, str) for task in tasks for name in task) or not all(isinstance(t, list) for t in tasks):
        raise ValueError(f"{TASKS} must be lists of names")
    return tuple(map(tuple, tasks))


def _earlier_task_names(about: Mapping[str, str], model: Mapping[str, Tensor]) -> list[list[str]]:
    """Of runs before that was written, from the order of the classes and the heads."""
    results = json.loads(about.get("results", "{}"))
    order = [results["class_names"][c] for c in results["class_order"]]
    sizes = [len(model[f"heads.{task}.weight"]) for task in range(int(about["task"]) + 1)]
    return [order[sum(sizes[:t]) : sum(sizes[: t + 1])] for t in range(len(sizes))]
