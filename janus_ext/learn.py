"""``janus_ext.learn``: adds classes to a finished run, which stays as it is. ``--help`` says how."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from janus_ext.config.parts import HEAD_NAMES
from janus_ext.data.collect import labelled, labelled_as
from janus_ext.data.layout import find_parts, shorten
from janus_ext.data.listing import subfolders
from janus_ext.data.tasks import split_classes
from janus_ext.data.workers import naming_lost_workers
from janus_ext.errors import ArgumentError, DataError
from janus_ext.learner import ContinualLearner
from janus_ext.plugins import typed
from janus_ext.runs.folder import reserved
from janus_ext.runs.run import Run
from janus_ext.terminal import command, logging_to

LOG = logging.getLogger("janus_ext")


@dataclass(frozen=True)
class LearnArguments:
    """Adds the classes in a folder to what a run has learned, as its next task; the run stays as it is.

    For example: janus_ext.learn runs/photos --data-dir two-more-classes --output runs/photos-and-two
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of a run of janus_ext.train, or of a learner that was saved."""
    data_dir: Path
    """Folder of class folders; or of train and test with such folders, which also shows the accuracy on the latter."""
    output: Annotated[Path | None, arg(help_behavior_hint="")] = None
    """Folder of what comes out; by default that of the run with -learned behind its name."""
    tasks: int = 1
    """Number of tasks in which the new classes are learned, one after another."""
    head: Annotated[str | None, arg(metavar=HEAD_NAMES, help_behavior_hint="")] = None
    """Another classifier than the run's own, from now on; one of your own has to be said again."""
    method: Annotated[str | None, arg(metavar="MODULE:CLASS", help_behavior_hint="")] = None
    """The run's method, where it is one of your own: saying it is what lets its code be loaded."""
    device: Annotated[str | None, arg(help_behavior_hint="")] = None
    """cpu, cuda, cuda:1, ...; by default what the run was trained on, if it is there."""


@command("janus_ext.learn")
def main(argv: Sequence[str] | None = None) -> int:
    """Learns; 0 on success, 2 with one line on stderr for what the user can mend, 130 on Ctrl-C."""
    learn(tyro.cli(LearnArguments, prog="janus_ext.learn", args=argv))
    return 0


def learn(arguments: LearnArguments) -> Path:
    """Learns the new classes, saves after every task, says where; returns the folder."""
    run = Run.open(arguments.run)
    with ExitStack() as stack:
        output = _reserve(arguments.output, run, stack)
        train, test = _parts(arguments.data_dir)
        learner = _load(arguments, run)
        stack.enter_context(logging_to())
        stack.enter_context(naming_lost_workers())
        _learn(learner, train, _planned(learner, train, test, arguments.tasks), output)
    print(f"{len(learner.classes)} classes in {len(learner.tasks)} tasks: {output}")
    if test is not None:
        print(f"\non the images in {test}\n\n{learner.evaluate(test).format()}")
    return output


def _learn(learner: ContinualLearner, train: Path, tasks: Sequence[Sequence[str]], output: Path) -> None:
    """Task after task; what ends it early leaves those that are learned, and is told how to go on with the others."""
    left = list(tasks)
    try:
        while left:
            learner.learn(train, left[0])
            learner.save(output)
            LOG.info("task %d learned: %s", len(learner.tasks), ", ".join(left.pop(0)))
    finally:
        if 0 < len(left) < len(tasks):
            others = ", ".join(name for task in left for name in task)
            LOG.warning("%d of %d tasks are learned and saved in %s", len(tasks) - len(left), len(tasks), output)
            LOG.warning("janus_ext.learn %s --data-dir FOLDER goes on, with a folder of the others: %s", output, others)


def _reserve(output: Path | None, run: Run, stack: ExitStack) -> Path:
    """``output`` or its default, where nothing is yet, for this process alone.

    The default is the first of RUN-learned, RUN-learned-2, ... that is free: names that janus_ext.train never takes.
    """
    if output is not None:
        stack.enter_context(reserved(output))
        return output
    folder = run.folder.resolve()
    for number in count(1):
        name = f"{folder.name}-learned" + ("" if number == 1 else f"-{number}")
        with suppress(ArgumentError):  # something is there, or another process has it
            stack.enter_context(reserved(folder.with_name(name)))
            return folder.with_name(name)


def _load(arguments: LearnArguments, run: Run) -> ContinualLearner:
    if run.settings()["method"] == "joint":
        raise ArgumentError(f"{run.folder} is of --method joint, which learns all classes at once and none later")
    return ContinualLearner.load(
        run.folder, arguments.device, head=typed(arguments.head), method=typed(arguments.method)
    )


def _parts(folder: Path) -> tuple[Path, Path | None]:
    """The folders with the classes to learn and to test on."""
    if not folder.is_dir():
        raise DataError(f"--data-dir {folder} {'is no folder' if folder.exists() else 'does not exist'}")
    parts = find_parts(folder)
    return (folder / parts[0], folder / parts[1]) if parts else (folder, None)


def _planned(learner: ContinualLearner, train: Path, test: Path | None, tasks: int) -> list[list[str]]:
    """The names of the classes of each task; what cannot be learned or tested is an error before the first one."""
    names = subfolders(train)
    if not names:
        raise DataError(f"--data-dir {train} has no class folders; wanted {train}/<class>/*.jpg")
    known = [name for name in names if name in learner.classes]
    if known:
        raise ArgumentError(f"--data-dir {train}: classes must be new, and the run knows {shorten(known)} already")
    alone = len(names) == tasks == 1  # which is for the head to refuse or to take
    planned = [[0]] if alone else split_classes(range(len(names)), tasks, learner.config.head)
    labelled(train, view=learner.view)  # decodes every image, and refuses a level of folders above the classes
    if test is not None:
        labelled_as(test, [*learner.classes, *names], learner.view)
    return [[names[c] for c in task] for task in planned]


if __name__ == "__main__":
    sys.exit(main())
