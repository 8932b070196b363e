"""Class order, division of classes into tasks, what is held out, and the fingerprint of a split: no images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from janus_ext.data.names import to_bytes
from janus_ext.data.task_list import read_task_list
from janus_ext.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig


def make_tasks(
    config: TrainConfig, class_names: Sequence[str], default: int, order_seed: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Class ids of each task, as --task-list says or else cut from an order of the classes.

    The order is that of the ids, or drawn from the seed with --shuffle-classes, or else from ``order_seed``; it is cut
    into --tasks, or ``default``.

    Raises:
        DataError: see :func:`~janus_ext.data.task_list.read_task_list`.
        ArgumentError: the list has another number of tasks than --tasks, or see :func:`split_classes`.
    """
    if config.task_list is None:
        order = class_order(len(class_names), config.seed[0] if config.shuffle_classes else order_seed)
        return split_classes(order, config.tasks or default, config.head)
    tasks = read_task_list(config.task_list, class_names)
    if config.tasks not in (None, len(tasks)):
        raise ArgumentError(
            f"--task-list {config.task_list} has {len(tasks)} tasks, --tasks {config.tasks} asks for others: leave one "
            "out (--method joint has one task)"
        )
    require_several_classes(tasks, f"--task-list {config.task_list}", config.head)
    return tasks


def class_order(classes: int, seed: int | None = None) -> tuple[int, ...]:
    """Order in which ``classes`` class ids are learned: identity without a seed, else a permutation fixed by it.

    The permutation sorts SHA-256 digests, so it is the same for every Python, PyTorch and platform.
    """
    if seed is None:
        return tuple(range(classes))
    return tuple(sorted(range(classes), key=lambda c: hashlib.sha256(f"{seed}/{c}".encode()).digest()))


def default_tasks(classes: int, most: int) -> int:
    """Number of tasks where nobody says one: ``most``, or fewer so that each has two classes at least."""
    return max(1, min(most, classes // 2))


def split_classes(order: Sequence[int], tasks: int, head: str = "linear") -> tuple[tuple[int, ...], ...]:
    """Cuts ``order`` into ``tasks`` consecutive groups whose sizes differ by one at most, the larger ones first.

    Raises:
        DataError: there are fewer than two classes.
        ArgumentError: there are fewer classes than tasks, or a linear ``head`` would get a task of one class: its
            cross entropy is 0, so nothing would be learned.
    """
    if len(order) < 2:
        raise DataError(f"a benchmark needs at least two classes, got {len(order)}")
    if not 1 <= tasks <= len(order):
        raise ArgumentError(f"--tasks must lie in 1..{len(order)} (the number of classes), got {tasks}")
    if 2 * tasks > len(order) and head == "linear":
        raise ArgumentError(
            f"--tasks {tasks} of {len(order)} classes makes tasks of one class, from which linear heads learn nothing; "
            f"--tasks 1 to {len(order) // 2} fit, or --head lda"
        )
    size, larger = divmod(len(order), tasks)
    starts = [t * size + min(t, larger) for t in range(tasks + 1)]
    return tuple(tuple(order[a:b]) for a, b in zip(starts, starts[1:], strict=False))


def require_several_classes(tasks: Sequence[Sequence[int]], whose: str, head: str) -> None:
    """ArgumentError where a linear ``head`` would get a task of one class; ``whose`` tasks they are."""
    single = [number for number, classes in enumerate(tasks, start=1) if len(classes) == 1]
    if single and head == "linear":
        raise ArgumentError(
            f"{whose}: task {single[0]} has one class, from which linear heads learn nothing; name two or more, or "
            "--head lda"
        )


def draw_share(samples: Sequence[str], share: float, seed: int, family: Callable[[str], str] = str) -> list[int]:
    """Places of ``share`` of a class's ``samples``, to the nearest whole number, one at least and never all.

    Samples of one ``family`` are drawn together, and a family of more than is still wanted is passed over. Where all
    are too large one of the smallest is drawn, and none where there is no second one. The draw sorts SHA-256 digests:
    it is the same for every Python, PyTorch and platform.
    """
    wanted = min(max(1, round(share * len(samples))), len(samples) - 1)
    families: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        families.setdefault(family(sample), []).append(place)
    names = sorted(families, key=lambda name: hashlib.sha256(to_bytes(f"{seed}/validation/{name}")).digest())
    in_order, drawn = [families[name] for name in names], list[int]()
    for places in in_order:
        if len(drawn) + len(places) <= wanted:
            drawn += places
    return drawn or (min(in_order, key=len) if len(in_order) > 1 else [])


def split_sha256(train: Iterable[str], test: Iterable[str], tasks: Sequence[Sequence[int]]) -> str:
    """SHA-256 (hex) of a split: names of the training and test samples in any order, and the classes of each task."""
    digest = hashlib.sha256()
    for part, samples in (("train", train), ("test", test)):
        digest.update(to_bytes("".join(f"{part} {sample}\n" for sample in sorted(samples, key=to_bytes))))
    for index, classes in enumerate(tasks):
        digest.update(f"task {index} {' '.join(map(str, classes))}\n".encode())
    return digest.hexdigest()
