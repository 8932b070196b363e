"""Continual-learning metrics: pure functions of the accuracy matrix and the sizes of the tasks' test sets.

R[t][j] is the accuracy (percent) on the test images of task j after learning task t, argmax over all classes seen so
far. Two more matrices tell why an image is missed: K[t][j] is the accuracy with the task known, argmax over the classes
of task j alone, and D[t][j] the share of images whose argmax over all classes seen falls into a class of task j, right
or wrong (task recognition). R[t][j] is at most either of them. ``matrix`` is any of the three and lower triangular: row
t is a list of the t + 1 numbers of tasks 0..t. T is the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from janus_ext.arguments import WIDEST, called, check_floats, check_integer, check_tensor, shown
from janus_ext.errors import ArgumentError

__all__ = [
    "Confusion",
    "accuracy",
    "accuracy_sample_weighted",
    "accuracy_task_known",
    "backward_transfer",
    "forgetting",
    "mean_and_std",
    "mean_average_accuracy",
    "mean_average_accuracy_sample_weighted",
    "plasticity",
    "summarize",
    "summarize_head",
    "task_recognition",
    "trajectory",
    "trajectory_sample_weighted",
]

Matrix = Sequence[Sequence[float]]
LARGEST_SIZE = 2**53  # of a test set: all integers up to it are floats


def measured_on(validation: bool) -> str:
    """What a run measures, in words: its test images, or training images that it has held out for validation."""
    return "held-out training images" if validation else "test images"


def hits(scores: Tensor, labels: Tensor, first: int, classes: int) -> Tensor:
    """int64 [3]: of images of one task, those right over all classes seen, right over its own, and recognised.

    ``scores`` [b, C], the largest wins; ``labels`` int64 [b] are columns of it, all within the task's own, which are
    the ``classes`` from ``first`` on. Sums over the batches of task j after task t are the counts behind R, K and D.
    """
    winners = scores.argmax(-1)
    known = scores[:, first : first + classes].argmax(-1) + first
    recognised = (winners >= first) & (winners < first + classes)
    return torch.stack([(winners == labels).sum(), (known == labels).sum(), recognised.sum()])


def untold(scores: Tensor) -> Tensor:
    """bool [b]: images of which no class can be said to win, since the largest of their ``scores`` [b, C] is no number.

    Of a network whose numbers overflow argmax would take the first class, or any.
    """
    return ~scores.amax(-1).isfinite()


class Confusion:
    """Counts of what the classes of images were taken for, batch after batch; no score is kept.

    ``classes`` is the number C of outputs, ``task_sizes`` how many of them, from the first on, belong to each task;
    with it the `hits` of every task are counted, too. ``counts`` is int64 [C, C], a row per true class and a column per
    predicted one; ``hits`` is int64 [T, 3]. Both are on the CPU.
    """

    def __init__(self, classes: int, task_sizes: Sequence[int] = ()) -> None:
        check_integer("Confusion: classes", classes, lambda n: 1 <= n <= WIDEST, f"from 1 to {WIDEST}")
        task_sizes = _checked_sizes("Confusion: task_sizes", task_sizes)
        if task_sizes and sum(task_sizes) != classes:
            raise ArgumentError(f"Confusion: task_sizes must add up to {classes} classes, got {shown(task_sizes)}")
        self.classes = classes
        self.task_sizes = tuple(task_sizes)
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)
        self.hits = torch.zeros(len(self.task_sizes), 3, dtype=torch.int64)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Counts a batch: ``scores`` [b, C], the largest wins; ``labels`` int64 [b], the columns of the true classes.

        Raises:
            ArgumentError: a shape does not fit, a label is no column, or a score is NaN; nothing is counted then.
        """
        self._check(scores, labels)
        cells = labels * self.classes + scores.argmax(-1)
        self.counts += torch.bincount(cells, minlength=self.classes**2).view_as(self.counts).cpu()
        first = 0
        for task, size in enumerate(self.task_sizes):
            rows = (labels >= first) & (labels < first + size)
            self.hits[task] += hits(scores[rows], labels[rows], first, size).cpu()
            first += size

    def _check(self, scores: Tensor, labels: Tensor) -> None:
        check_tensor("Confusion: labels", labels, "int64 [b]", lambda y: y.dtype == torch.int64 and y.ndim == 1)
        check_floats("Confusion: scores", scores, [len(labels), self.classes])
        strange = labels[(labels < 0) | (labels >= self.classes)]
        if len(strange):
            raise ArgumentError(f"Confusion: labels must lie in 0..{self.classes - 1}, got {int(strange[0])}")
        if scores.isnan().any():
            raise ArgumentError("Confusion: scores must be numbers, got NaN")


@called
def accuracy(matrix: Matrix) -> float:
    """ACC, every task weighs the same: mean_j R[T-1][j]."""
    return trajectory(matrix)[-1]


@called
def accuracy_sample_weighted(matrix: Matrix, test_sizes: Sequence[int]) -> float:
    """ACC, every image weighs the same: sum_j n_j R[T-1][j] / sum_j n_j with n_j test images in task j."""
    return trajectory_sample_weighted(matrix, test_sizes)[-1]


@called
def mean_average_accuracy(matrix: Matrix) -> float:
    """MAA, every task weighs the same: mean_t mean_{j<=t} R[t][j]."""
    return _mean(trajectory(matrix))


@called
def mean_average_accuracy_sample_weighted(matrix: Matrix, test_sizes: Sequence[int]) -> float:
    """MAA, every image weighs the same: mean_t (sum_{j<=t} n_j R[t][j] / sum_{j<=t} n_j)."""
    return _mean(trajectory_sample_weighted(matrix, test_sizes))


@called
def accuracy_task_known(known: Matrix) -> float:
    """Accuracy with the task known, every task weighs the same: mean_j K[T-1][j]."""
    return accuracy(_checked("known", known))


@called
def task_recognition(recognised: Matrix) -> float:
    """Share of test images that fall to a class of their own task, every task weighs the same: mean_j D[T-1][j]."""
    return accuracy(_checked("recognised", recognised))


@called
def backward_transfer(matrix: Matrix) -> float | None:
    """BWT: mean_{j<T-1} (R[T-1][j] - R[j][j]); None for a single task."""
    matrix = _checked("matrix", matrix)
    return _mean_or_none([last - matrix[j][j] for j, last in enumerate(matrix[-1][:-1])])


@called
def forgetting(matrix: Matrix) -> float | None:
    """Forgetting: mean_{j<T-1} (max_{j<=t<=T-2} R[t][j] - R[T-1][j]); None for a single task."""
    matrix = _checked("matrix", matrix)
    best = [max(row[j] for row in matrix[j:-1]) for j in range(len(matrix) - 1)]
    return _mean_or_none([b - last for b, last in zip(best, matrix[-1], strict=False)])


@called
def plasticity(matrix: Matrix) -> float:
    """Plasticity, or learning accuracy (LA): mean_j R[j][j]."""
    return _mean([row[-1] for row in _checked("matrix", matrix)])


@called
def trajectory(matrix: Matrix) -> list[float]:
    """ACC after each task, every task weighs the same: mean_{j<=t} R[t][j] for t = 0..T-1."""
    return [_mean(row) for row in _checked("matrix", matrix)]


@called
def trajectory_sample_weighted(matrix: Matrix, test_sizes: Sequence[int]) -> list[float]:
    """ACC after each task, every image weighs the same: sum_{j<=t} n_j R[t][j] / sum_{j<=t} n_j."""
    matrix = _checked("matrix", matrix)
    test_sizes = _checked_sizes("test_sizes", test_sizes)
    if len(test_sizes) != len(matrix):
        raise ArgumentError(f"test_sizes must be {len(matrix)} positive numbers, got {shown(test_sizes)}")
    return [sum(n * r for n, r in zip(test_sizes, row, strict=False)) / sum(test_sizes[: len(row)]) for row in matrix]


@called
def summarize(matrix: Matrix, known: Matrix, recognised: Matrix, test_sizes: Sequence[int]) -> dict[str, float | None]:
    """All of the above under the names of ``results.json``, in percent or percentage points; of R, K and D."""
    return {
        "acc": accuracy(matrix),
        "maa": mean_average_accuracy(matrix),
        "bwt": backward_transfer(matrix),
        "forgetting": forgetting(matrix),
        "plasticity": plasticity(matrix),
        "acc_task_known": accuracy_task_known(known),
        "task_recognition": task_recognition(recognised),
        "acc_sample_weighted": accuracy_sample_weighted(matrix, test_sizes),
        "maa_sample_weighted": mean_average_accuracy_sample_weighted(matrix, test_sizes),
    }


@called
def summarize_head(matrix: Matrix) -> dict[str, Any]:
    """R of one of several heads of a run, and what follows from it, under the names of ``results.json``."""
    return {
        "accuracy_matrix": matrix,
        "acc": accuracy(matrix),
        "maa": mean_average_accuracy(matrix),
        "bwt": backward_transfer(matrix),
        "forgetting": forgetting(matrix),
        "plasticity": plasticity(matrix),
    }


@called
def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None instead of a deviation for a single value."""
    if not _are_numbers(values) or not len(values):
        raise ArgumentError(f"values must be one or more numbers, got {shown(values)}")
    values = _floats("values", values)
    mean = _mean(values)
    if len(values) < 2:
        return mean, None
    try:
        return mean, (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    except OverflowError as error:
        raise ArgumentError(f"values must be numbers that can be squared, got {shown(values)}") from error


def _checked_sizes(name: str, sizes: Any) -> list[int]:
    """The sizes as Python's integers; ArgumentError unless they are integers, 1 at least, in a list."""
    if not _are_numbers(sizes) or not all(isinstance(size, Integral) and 1 <= size <= LARGEST_SIZE for size in sizes):
        raise ArgumentError(f"{name} must be integers from 1 to 2^53, one a task, got {shown(sizes)}")
    return [int(size) for size in sizes]


def _checked(name: str, matrix: Matrix) -> list[list[float]]:
    """The matrix in Python's floats, whatever numbers it had; rows must have 1, 2, 3, ... of them."""
    if not isinstance(matrix, Sequence) or not all(map(_are_numbers, matrix)):
        raise ArgumentError(f"{name} must be a list of rows of numbers, got {shown(matrix)}")
    lengths = [len(row) for row in matrix]
    if not lengths or lengths != list(range(1, len(lengths) + 1)):
        raise ArgumentError(f"{name} must have rows of 1, 2, 3, ... entries, got rows of {lengths}")
    return [_floats(name, row) for row in matrix]


def _floats(name: str, values: Sequence[float]) -> list[float]:
    """In double precision: sums of NumPy's integers could wrap round, and those of its float16 lose digits."""
    try:
        return [float(value) for value in values]
    except OverflowError as error:
        raise ArgumentError(f"{name} must have numbers that a float holds, got {shown(values)}") from error


def _are_numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(v, Real) and not isinstance(v, bool) for v in values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_or_none(values: Sequence[float]) -> float | None:
    return _mean(values) if values else None
