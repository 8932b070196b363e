"""``--task-list``: which classes form which task, in a text file with one class a line and a blank line between tasks.

A name takes its whole line, so it needs no quotes whatever it holds (commas, tabs, colons, "no", "7"), a list of names
that another program writes becomes a task list by blank lines alone, and there is no way to write an empty task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from janus_ext.data.layout import shorten
from janus_ext.data.lists import read_lines
from janus_ext.data.names import similar
from janus_ext.errors import DataError


def read_task_list(path: Path, class_names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The class ids of each task of the file, in its order; an id is the name's place in ``class_names``.

    Raises:
        DataError: the file cannot be read or names no class; a line names no class, or one that is named before; a
            class is in no task.
    """
    ids = {name: label for label, name in enumerate(class_names)}
    first: dict[str, int] = {}
    tasks = []
    for lines in _blocks(path):
        for number, name in lines:
            if name not in ids:
                raise DataError(
                    f"--task-list: {path}:{number} names no class of the benchmark: {name[:80]!r}{similar(name, ids)}"
                )
            if name in first:
                raise DataError(f"--task-list: {path}:{number} repeats {name} of line {first[name]}")
            first[name] = number
        tasks.append(tuple(ids[name] for _, name in lines))
    missing = [name for name in class_names if name not in first]
    if missing:
        raise DataError(
            f"--task-list: {path} must name every class of the benchmark, one a line, a blank line between tasks; "
            f"{len(missing)} of {len(ids)} are in no task: {shorten(missing)}"
        )
    return tuple(tasks)


def _blocks(path: Path) -> Iterator[list[tuple[int, str]]]:
    """The (number, text) of the lines between blank ones; blanks around a text do not count."""
    lines = [line.strip() for line in read_lines(path, "--task-list")]
    for holds, block in groupby(enumerate(lines, start=1), key=lambda line: bool(line[1])):
        if holds:
            yield list(block)
