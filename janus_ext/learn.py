"""``janus_ext.learn``: adds classes to a finished run, which stays as it is. ``--help`` says how."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from janus_ext.data.layout import find_parts
from janus_ext.data.listing import subfolders
from janus_ext.data.tasks import split_classes
from janus_ext.data.workers import naming_lost_workers
from janus_ext.errors import ArgumentError, DataError
from janus_ext.learner import ContinualLearner
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
    """Folder of class folders, or of train and test with such folders: then the accuracy on the test images is shown."""
    output: Annotated[Path | None, arg(help_behavior_hint="")] = None
    """Folder of what comes out; by default that of the run with a number behind it."""
    tasks: int = 1
    """Number of tasks in which the new classes are learned, one after another."""
    device: Annotated[str | None, arg(help_behavior_hint="")] = None
    """cpu, cuda, cuda:1, ...; by default what the run was trained on, if it is there."""


@command("janus_ext.learn")
def main(argv: Sequence[str] | None = None) -> int:
    """Learns; 0 on success, 2 with one line on stderr for what the user can mend, 130 on Ctrl-C."""
    learn(tyro.cli(LearnArguments, prog="janus_ext.learn", args=argv))
    return 0


def learn(arguments: LearnArguments) -> Path:
    """Learns the new classes, saves after every task, says where; returns the folder."""
    output = arguments.output or _next_to(Run.open(arguments.run).folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ArgumentError(f"--output {output} is there already; choose another folder")
    train, test = _parts(arguments.data_dir)
    learner = ContinualLearner.load(arguments.run, arguments.device)
    names = subfolders(train)
    if not names:
        raise DataError(f"--data-dir {train} has no class folders; wanted {train}/<class>/*.jpg")
    with logging_to(), naming_lost_workers():
        for task in split_classes(range(len(names)), arguments.tasks, learner.config.head):
            chosen = [names[c] for c in task]
            learner.learn(train, chosen)
            learner.save(output)
            LOG.info("task %d learned: %s", len(learner.tasks), ", ".join(chosen))
    print(f"{len(learner.classes)} classes in {len(learner.tasks)} tasks: {output}")
    if test is not None:
        print(f"\non the images in {test}\n\n{learner.evaluate(test).format()}")
    return output


def _parts(folder: Path) -> tuple[Path, Path | None]:
    """The folders with the classes to learn and to test on."""
    if not folder.is_dir():
        raise DataError(f"--data-dir {folder} {'is no folder' if folder.exists() else 'does not exist'}")
    parts = find_parts(folder)
    return (folder / parts[0], folder / parts[1]) if parts else (folder, None)


def _next_to(run: Path) -> Path:
    """The first of RUN-2, RUN-3, ... that is not there."""
    number = 2
    while (folder := run.with_name(f"{run.resolve().name}-{number}")).exists():
        number += 1
    return folder


if __name__ == "__main__":
    sys.exit(main())
