"""How well a model classifies a set of images: overall, task by task, class by class, and what is taken for what."""

from __future__ import annotations

import csv
import io
import shutil
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_ext.errors import visible
from janus_ext.reports.confusion import save_confusion
from janus_ext.reports.table import ELLIPSIS, MOST_ROWS, thinned
from janus_ext.runs.checkpoint import make_folder, replace_file, write_json
from janus_ext.runs.metrics import Confusion

GAP = "  "  # between columns of the terminal's tables
NARROWEST = 8  # columns that a name keeps


@dataclass(frozen=True)
class ClassResult:
    """One class: how many ``images`` it has, how many are ``right`` (``accuracy``: in per cent, None without images).

    ``taken_for`` is the class that most of the others were taken for, ``times`` how many; None and 0 if none was.
    """

    name: str
    images: int
    right: int
    accuracy: float | None
    taken_for: str | None
    times: int


@dataclass(frozen=True)
class TaskResult:
    """One task, counted from 1: its numbers of ``classes`` and ``images``, and shares of these in per cent.

    They are right over all classes, right over the task's own alone, and taken for a class of the task, right or wrong;
    None without images.
    """

    task: int
    classes: int
    images: int
    accuracy: float | None
    accuracy_task_known: float | None
    task_recognition: float | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was counted over a set of images; ``evaluate`` makes one from scores.

    ``confusion`` is int64 [C, C], a row per true class and a column per predicted one, in the order of ``class_names``.
    ``task_sizes`` are the numbers of classes of each task, in the same order, and ``task_hits`` (int64 [T, 3]) their
    counts as in :func:`~janus_ext.runs.metrics.hits`; both are empty where the tasks are not known. ``head`` is what
    classified, None where nobody says it.
    """

    class_names: tuple[str, ...]
    confusion: Tensor
    task_sizes: tuple[int, ...] = ()
    task_hits: Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.int64))
    head: str | None = None

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def right(self) -> int:
        """Number of images whose largest score is their class's."""
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float | None:
        """Per cent of all images that are right; None without images."""
        return _percent(self.right, self.images)

    @cached_property
    def per_class(self) -> tuple[ClassResult, ...]:
        """The classes in the order of ``class_names``."""
        errors = self.confusion.clone().fill_diagonal_(0)
        times, others = errors.max(dim=1)
        counts = (self.confusion.sum(1), self.confusion.diagonal(), times, others)
        return tuple(
            ClassResult(name, images, right, _percent(right, images), self.class_names[other] if n else None, n)
            for name, images, right, n, other in zip(self.class_names, *(c.tolist() for c in counts), strict=True)
        )

    @cached_property
    def per_task(self) -> tuple[TaskResult, ...]:
        """The tasks in order; none where they are not known."""
        images = (
            [int(rows.sum()) for rows in self.confusion.sum(1).split(list(self.task_sizes))] if self.task_sizes else []
        )
        return tuple(
            TaskResult(index, size, n, *(_percent(count, n) for count in counts))
            for index, (size, n, counts) in enumerate(
                zip(self.task_sizes, images, self.task_hits.tolist(), strict=True), 1
            )
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of all of it; shares in per cent, null where there are no images."""
        return {
            "head": self.head,
            "accuracy": self.accuracy,
            "images": self.images,
            "right": self.right,
            "tasks": [asdict(task) for task in self.per_task],
            "classes": [asdict(result) for result in self.per_class],
            "confusion": self.confusion.tolist(),
        }

    def save(self, folder: Path) -> list[Path]:
        """Writes evaluation.json, per_class.csv, confusion.csv and confusion.png, and returns their paths.

        Raises:
            CheckpointError: a file cannot be written; those that were there before are whole.
        """
        make_folder(folder)
        paths = [folder / name for name in ("evaluation.json", "per_class.csv", "confusion.csv", "confusion.png")]
        write_json(paths[0], self.to_json())
        results = [{"number": number} | asdict(result) for number, result in enumerate(self.per_class, start=1)]
        write_csv(paths[1], list(results[0]), [list(result.values()) for result in results])
        rows = ([name, *counts] for name, counts in zip(self.class_names, self.confusion.tolist(), strict=True))
        write_csv(paths[2], ["class \\ taken for", *self.class_names], rows)
        save_confusion(self, paths[3])
        return paths

    def headline(self) -> str:
        """The overall accuracy in a few words."""
        share = "-" if self.accuracy is None else f"{self.accuracy:.2f} %"
        head = "" if self.head is None else f", head {self.head}"
        return f"accuracy {share} of {self.images:,} images, {len(self.class_names)} classes{head}"

    def format(self, width: int | None = None) -> str:
        """Headline, tasks and classes as text in lines of at most ``width`` characters, by default the terminal's.

        Of many classes those with the lowest accuracy are shown, of many tasks the first and the last.
        """
        width = width or shutil.get_terminal_size().columns
        parts = [textwrap.wrap(self.headline(), width), self._task_lines(width), self._class_lines(width)]
        return visible("\n\n".join("\n".join(lines) for lines in parts if lines))

    def _task_lines(self, width: int) -> list[str]:
        if not self.per_task:
            return []
        rows = [
            [str(t.task), str(t.classes), f"{t.images:,}"]
            + [_share(value) for value in (t.accuracy, t.accuracy_task_known, t.task_recognition)]
            for t in self.per_task
        ]
        shown = [[ELLIPSIS, *[""] * 5] if i is None else rows[i] for i in thinned(len(rows), MOST_ROWS)]
        heading = ["task", "classes", "images", "accuracy", "task known", "recognised"]
        return format_columns(heading, shown, width)

    def _class_lines(self, width: int) -> list[str]:
        tested = [result for result in self.per_class if result.images]
        empty = len(self.per_class) - len(tested)
        hidden = max(0, len(tested) - MOST_ROWS)
        if hidden:
            tested = sorted(tested, key=lambda result: result.accuracy)[:MOST_ROWS]
        rows = [
            [r.name, f"{r.images:,}", _share(r.accuracy), r.taken_for or "", f"{r.times:,}" if r.times else ""]
            for r in tested
        ]
        lines = format_columns(["class", "images", "accuracy", "most taken for", "times"], rows, width, texts=(0, 3))
        notes = [f"{hidden:,} more with higher accuracy"] if hidden else []
        return lines + notes + ([f"{empty:,} classes without images"] if empty else [])


def evaluate(
    batches: Iterable[tuple[Tensor, Tensor]],
    class_names: Sequence[str],
    task_sizes: Sequence[int] = (),
    head: str | None = None,
) -> Evaluation:
    """Counts batch after batch of (scores [b, C], labels int64 [b]); label c is the column of class ``class_names[c]``.

    ``task_sizes`` says how many of the classes, from the first on, belong to each task; ``head`` what made the scores.

    Raises:
        ArgumentError: sizes that do not fit the classes, or as :meth:`~janus_ext.runs.metrics.Confusion.add`.
    """
    confusion = Confusion(len(class_names), task_sizes)
    for scores, labels in batches:
        confusion.add(scores, labels)
    return Evaluation(tuple(class_names), confusion.counts, confusion.task_sizes, confusion.hits, head)


def write_csv(path: Path, heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table as CSV in UTF-8; None is an empty cell, and bytes of a name that are no text become escapes."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([heading, *rows])
    data = buffer.getvalue().encode("utf-8", "backslashreplace")
    replace_file(path, lambda temporary: temporary.write_bytes(data))


# the terminal --------------------------------------------------------------------------------------------------------
def format_columns(
    heading: Sequence[str], rows: Sequence[Sequence[str]], width: int, texts: Sequence[int] = ()
) -> list[str]:
    """A table in lines of at most ``width`` columns; numbers to the right, the columns ``texts`` to the left.

    Texts are shortened where they have to be; what does not fit even then is left out from the right.
    """
    cells = [[" ".join(cell.split()) for cell in row] for row in (heading, *rows)]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    room = width - sum(w for i, w in enumerate(widths) if i not in texts) - len(GAP) * (len(widths) - 1)
    for left, index in zip(range(len(texts), 0, -1), sorted(texts, key=widths.__getitem__), strict=True):
        widths[index] = min(widths[index], max(NARROWEST, room // left))
        room -= widths[index]
    while sum(widths) + len(GAP) * (len(widths) - 1) > width and len(widths) > 1:
        widths.pop()
    return [GAP.join(_cells(row, widths, texts)).rstrip() for row in cells]


def _cells(row: Sequence[str], widths: Sequence[int], texts: Sequence[int]) -> Iterator[str]:
    for index, (cell, width) in enumerate(zip(row, widths, strict=False)):
        text = _cut(cell, width)
        blanks = " " * (width - _width(text))
        yield text + blanks if index in texts else blanks + text


def _cut(text: str, width: int) -> str:
    """``text`` in at most ``width`` columns."""
    if _width(text) <= width:
        return text
    while _width(text) > width - len(ELLIPSIS):
        text = text[:-1]
    return text + ELLIPSIS


def _width(text: str) -> int:
    """Columns of a terminal that a text takes: two for a wide character, none for an accent of its own."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def _percent(count: int, images: int) -> float | None:
    return 100 * count / images if images else None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
