"""The run of several processes: the first one alone reads and writes its folder, and tells the others what it read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from janus_ext import processes
from janus_ext.runs.run import Run, Saved


def run_at(folder: Path) -> Run:
    """The run in ``folder``, of this process alone or of all that train together."""
    return Run(folder) if processes.count() == 1 else SharedRun(folder)


class SharedRun(Run):
    """A `Run` whose methods every process calls; what the first one cannot read ends all."""

    @property
    def is_begun(self) -> bool:
        return processes.from_first(lambda: Run(self.folder).is_begun)

    @property
    def is_finished(self) -> bool:
        return processes.from_first(lambda: Run(self.folder).is_finished)

    def settings(self) -> dict[str, Any]:
        return processes.from_first(super().settings)

    def results(self) -> dict[str, Any]:
        return processes.from_first(super().results)

    def saved(self) -> Saved | None:
        return processes.from_first(super().saved)

    def within(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return processes.from_first(super().within)

    @contextmanager
    def opened(self, settings: dict[str, Any], begin: bool) -> Iterator[None]:
        own = super().opened(settings, begin)
        with ExitStack() as stack:
            processes.from_first(lambda: stack.enter_context(own))
            yield

    # written by the first: its error ends the others at their next sum -----------------------------------------------
    def prepare(self) -> None:
        processes.from_first(super().prepare)

    def write_epoch(self, record: Mapping[str, Any]) -> None:
        if processes.is_first():
            super().write_epoch(record)

    def keep_epochs(self, epochs: Sequence[int]) -> None:
        if processes.is_first():
            super().keep_epochs(epochs)

    def write_factors(self, task: int, factors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        if processes.is_first():
            super().write_factors(task, factors, about)

    def write_task(self, *state: Any) -> None:
        if processes.is_first():
            super().write_task(*state)

    def write_within(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        if processes.is_first():
            super().write_within(tensors, state)

    def remove_methods_before(self, index: int) -> None:
        if processes.is_first():
            super().remove_methods_before(index)

    def finish(self, results: Mapping[str, Any]) -> None:
        if processes.is_first():
            super().finish(results)
