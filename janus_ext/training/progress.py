"""How a run is doing: the progress bar, a line an epoch where nobody sees one, and the losses, read now and then."""

from __future__ import annotations

import logging
import math
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from janus_ext import processes
from janus_ext.errors import TrainingError

if TYPE_CHECKING:
    from janus_ext.methods.base import TaskReport

LOG = logging.getLogger("janus_ext")
BAR = "{desc}{percentage:3.0f}% |{bar}| {remaining} left{postfix}"  # half of 80 columns are left to the bar itself
READ_EVERY = 20  # steps between two reads of the loss: each read waits for the device


def finite(value: Any) -> float:
    """``value``, if it is a finite number; ValueError or OverflowError otherwise."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a finite number is wanted, got {value!r:.40}")
    return float(value)


def make_bar(steps: int, done: int) -> tqdm:
    """The progress bar of a whole run; none where the standard error is no terminal, and in one process alone."""
    quiet = None if processes.is_first() else True
    return tqdm(total=steps, initial=done, bar_format=BAR, disable=quiet, dynamic_ncols=True)


class LossError(TrainingError):
    """The loss of a step, counted from 0 within its epoch, is not finite."""

    epoch = step = 0


@dataclass
class Progress:
    """The progress bar of a whole run of ``tasks`` with ``epochs`` each, and the losses not yet read from the device.

    Where the bar or the log does not go to a terminal, every epoch is logged. Losses are of all processes that train
    together.
    """

    bar: tqdm
    tasks: int
    epochs: int
    task: int = 0
    epoch: int = 0
    step: int = 0
    pending: list[tuple[int, Tensor, Tensor, int]] = field(default_factory=list)
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    started: float = 0.0

    def begin_epoch(self, task: int, epoch: int) -> None:
        """Starts the epoch's sums, and its clock."""
        self.task, self.epoch, self.step = task, epoch, 0
        self.totals, self.started = [0.0, 0.0, 0.0], time.perf_counter()
        self.bar.set_description(f"task {task + 1}/{self.tasks}", refresh=False)

    def end_epoch(self) -> None:
        """Logs the epoch where that is all there is to see of it."""
        if self.bar.disable or not sys.stdout.isatty():
            LOG.info(
                "task %d/%d, epoch %d/%d: loss %.3f, accuracy %.1f %%, %.1f s",
                *(self.task + 1, self.tasks, self.epoch + 1, self.epochs, self.loss, self.accuracy, self.seconds),
            )

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """Notes a step: the batch's mean loss and how many of its ``images`` are right, or this process's shares of
        both; reads the device every READ_EVERY steps.
        """
        self.pending.append((self.step, loss.detach(), correct, images))
        self.step += 1
        if len(self.pending) >= READ_EVERY:
            self.read()

    def read(self) -> None:
        """Fetches the pending losses in one transfer; LossError names the first that is not finite."""
        if not self.pending:
            return
        steps, losses, correct, images = zip(*self.pending, strict=True)
        self.pending = []
        values = torch.stack([torch.stack(losses).double(), torch.stack(correct).double()])
        values = processes.add_up(values).tolist()
        for step, value in zip(steps, values[0], strict=True):
            if not math.isfinite(value):
                message = f"the loss is {value} in task {self.task + 1}, epoch {self.epoch + 1}, step {step + 1}; "
                error = LossError(message + "a smaller --lr, --clip-norm 1 or --amp off may help")
                error.epoch, error.step = self.epoch, step
                raise error
        for value, n in zip(values[0], images, strict=True):  # one by one: when they are read must not change the sum
            self.totals[0] += value * n
        self.totals[1] += sum(values[1])
        self.totals[2] += sum(images)
        self.bar.set_postfix_str(f"loss {self.loss:.3f}, accuracy {self.accuracy:.0f} %", refresh=False)
        self.bar.update(len(steps))

    def state(self) -> dict[str, Any]:
        """The epoch so far; what is pending has to be read before."""
        return {"step": self.step, "totals": self.totals, "seconds": self.seconds}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on with it; ValueError, TypeError or OverflowError where it is none."""
        loss, correct, images = map(finite, state["totals"])
        step, seconds = state["step"], finite(state["seconds"])
        if type(step) is not int or not 0 <= correct <= images or images < 1 or seconds < 0:
            raise ValueError(f"{step!r:.40} steps in {seconds} s, with {correct} of {images} images right, cannot be")
        self.step, self.totals = step, [loss, correct, images]
        self.started -= seconds

    @property
    def seconds(self) -> float:
        """Of the epoch so far."""
        return time.perf_counter() - self.started

    @property
    def loss(self) -> float:
        """Mean loss of the epoch so far."""
        return self.totals[0] / self.totals[2]

    @property
    def accuracy(self) -> float:
        """Training accuracy of the epoch so far, percent, within the current task."""
        return 100 * self.totals[1] / self.totals[2]


def log_merged(task: int, share: float, report: TaskReport) -> None:
    """Says which share of the update was merged, and warns where that is little because of the task's own images."""
    moved = "features that hardly scatter"
    if report.movement is not None:
        moved = f"its own features by {report.movement:.3f} deviations"
    LOG.info("task %d: %.0f %% of the update merged, which moves %s", task + 1, 100 * share, moved)
    if report.spoiled:
        LOG.warning(
            "task %d: its whole update would tell its own images apart worse than before, and %.2g %% of it is "
            "merged; a smaller --lr may help",
            *(task + 1, 100 * share),
        )
