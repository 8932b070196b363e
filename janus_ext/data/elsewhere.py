"""A benchmark that somebody else's function makes: checked, and with all that the shared flags ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from janus_ext.arguments import naming
from janus_ext.data.benchmark import Benchmark
from janus_ext.data.tasks import make_tasks, require_several_classes, split_classes
from janus_ext.errors import ArgumentError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig


def load(function: Callable[[TrainConfig], Any], config: TrainConfig) -> Benchmark:
    """What ``function`` gives, under the name that was typed, with the tasks, images and memory that ``config`` wants.

    Raises:
        ArgumentError: it gives no `Benchmark`. Errors of ours that it raises itself begin with the name that was typed.
    """
    with naming(f"--benchmark {config.benchmark}"):
        benchmark = function(config)
    if not isinstance(benchmark, Benchmark):
        found = f"an object of type {type(benchmark).__name__}"
        raise ArgumentError(f"--benchmark {config.benchmark} must give a Benchmark, got {found}")
    benchmark = replace(benchmark, name=config.benchmark, tasks=_tasks(benchmark, config)).as_asked(config)
    return benchmark.decoded() if config.cache_images else benchmark


def _tasks(benchmark: Benchmark, config: TrainConfig) -> tuple[tuple[int, ...], ...]:
    """The function's own order and division of the classes, unless a flag has another."""
    if config.task_list is not None or config.shuffle_classes:
        return make_tasks(config, benchmark.class_names, len(benchmark.tasks))
    if config.tasks not in (None, len(benchmark.tasks)):
        return split_classes(benchmark.class_order, config.tasks, config.head)
    require_several_classes(benchmark.tasks, f"--benchmark {config.benchmark}", config.head)
    return benchmark.tasks
