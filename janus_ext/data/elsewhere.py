"""A benchmark that somebody else's function makes: checked, and with all that the shared flags ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from janus_ext.data.benchmark import Benchmark
from janus_ext.data.tasks import make_tasks, require_several_classes, split_classes
from janus_ext.errors import ArgumentError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig


def load(function: Callable[[TrainConfig], Any], config: TrainConfig) -> Benchmark:
    """What ``function`` gives, under the name that was typed, with the tasks, images and memory that ``config`` wants.

    Raises:
        ArgumentError: it gives no `Benchmark`, or one whose labels or tasks are not of its classes.
    """
    benchmark = function(config)
    _check(benchmark, f"--benchmark {config.benchmark}")
    benchmark = replace(benchmark, name=config.benchmark, tasks=_tasks(benchmark, config)).as_asked(config)
    return benchmark.decoded() if config.cache_images else benchmark


def _check(benchmark: Any, name: str) -> None:
    if not isinstance(benchmark, Benchmark):
        raise ArgumentError(f"{name} must give a Benchmark, got an object of type {type(benchmark).__name__}")
    classes = range(len(benchmark.class_names))
    if sorted(benchmark.class_order) != list(classes):
        raise ArgumentError(f"{name}: tasks must have each of the class ids 0 .. {len(classes) - 1} once")
    for part, split in (("train", benchmark.train), ("test", benchmark.test)):
        strange = set(split.labels.tolist()) - set(classes)
        if strange:
            raise ArgumentError(f"{name}: {part} has label {min(strange)}, and there are {len(classes)} class names")


def _tasks(benchmark: Benchmark, config: TrainConfig) -> tuple[tuple[int, ...], ...]:
    """The function's own order and division of the classes, unless a flag has another."""
    if config.task_list is not None or config.shuffle_classes:
        return make_tasks(config, benchmark.class_names, len(benchmark.tasks))
    if config.tasks not in (None, len(benchmark.tasks)):
        return split_classes(benchmark.class_order, config.tasks, config.head)
    require_several_classes(benchmark.tasks, f"--benchmark {config.benchmark}", config.head)
    return benchmark.tasks
