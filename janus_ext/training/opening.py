"""The lines with which a run opens: what it resolved, before it takes its time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from janus_ext import processes
from janus_ext.backbone.places import coverage
from janus_ext.devices import available_cores, device_name
from janus_ext.runs.metrics import measured_on

if TYPE_CHECKING:
    from janus_ext.methods.base import Method
    from janus_ext.training.loop import Learner
    from janus_ext.training.trainer import Trainer

PRECISIONS = {"off": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}


def lines(trainer: Trainer) -> list[str]:
    """Where the run computes; what the method trains; how it learns which tasks, and in which of them it cannot."""
    learner, learn = trainer.learner, trainer.config.learn
    doing = "the backbone stays as it is" if learn == "none" else adapted(learner.method)
    only = ", in the first task only" if learn == "first" else ""
    return [_device(learner), f"{learner.config.method}: {doing}{only}", _learning(trainer), *_resting(trainer)]


def adapted(method: Method) -> str:
    """Where the method adapts the backbone, and how many of its parameters it trains."""
    backbone = method.model.backbone
    trained = sum(parameter.numel() for parameter in method.trainable())
    whole = sum(parameter.numel() for parameter in backbone.parameters())
    if not method.layers:
        return f"{trained:,} of {whole:,} parameters trained, and the heads"
    where, others = coverage(backbone, method.layers)
    return f"{where} adapted, {trained:,} of {whole:,} parameters trained, and the heads{others}"


def _device(learner: Learner) -> str:
    device, others = f"{learner.device} ({device_name(learner.device)})", processes.on_this_machine()[1]
    threads = _threads(torch.get_num_threads(), max(1, available_cores() // others))
    together = "" if processes.count() == 1 else f", in each of {processes.count()} processes"
    return f"{device}, {PRECISIONS[learner.config.amp]}, {threads}{together}"


def _threads(threads: int, cores: int) -> str:
    """How many; and a word where they are more than the cores: then each waits for the others, at every operation."""
    said = _count(threads, "thread")
    return f"{said} on {_count(cores, 'core')}: OMP_NUM_THREADS={cores} is faster" if threads > cores else said


def _learning(trainer: Trainer) -> str:
    config, benchmark = trainer.config, trainer.benchmark
    tasks, sizes = len(benchmark.tasks), [len(classes) for classes in benchmark.tasks]
    each = f"{min(sizes)}" if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
    steps = trainer.step_count(tasks)
    how = (
        f"{config.optimizer}, rate {config.lr:g}, of the heads {config.head_lr:g}, {config.schedule}; "
        f"{_count(config.epochs, 'epoch')}, batches of {config.batch_size}, {_count(steps, 'step')}"
    )
    return (
        f"{how if steps else f'nothing is trained, head {config.head} is fitted'}; "
        f"{_count(tasks, 'task')} x {each} classes, "
        f"{len(benchmark.train):,} training and {len(benchmark.test):,} {measured_on(benchmark.validation)}"
    )


def _resting(trainer: Trainer) -> list[str]:
    """A line where the backbone would learn in a task, but for its single class."""
    config, tasks = trainer.config, trainer.benchmark.tasks
    alone = any(len(classes) == 1 and config.lets_learn(task) for task, classes in enumerate(tasks))
    line = f"tasks of one class teach the head alone, here {config.head}: the backbone learns nothing from them"
    return [line] if alone else []


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
