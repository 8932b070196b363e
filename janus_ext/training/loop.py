"""The one training loop: a method teaches a model one task after another. It knows no benchmark and no folder.

Every random number derives from (seed, task, epoch, purpose), never from what ran before: a task learned in a new
process, from what the last one left, gives the same bits as one learned at once.

Several processes share the images of every batch and of every pass. Once a step they add up the gradients of their
shares, which is the gradient of the whole batch; what follows, rectification first, is the same in all of them.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from janus_ext import processes
from janus_ext.arguments import first_of
from janus_ext.config.parts import TRAINED_HEADS
from janus_ext.errors import StatisticsError, TrainingError
from janus_ext.methods.base import Step, Task
from janus_ext.overflow import said_of_overflow
from janus_ext.runs.metrics import hits, untold
from janus_ext.training.keeping import Keeping
from janus_ext.training.optimization import make_optimizer, schedule
from janus_ext.training.parallel import add_up_gradients, align
from janus_ext.training.progress import LossError, log_merged
from janus_ext.training.underway import Underway

if TYPE_CHECKING:
    from janus_ext.classifier import ContinualClassifier
    from janus_ext.config import LearnConfig
    from janus_ext.data.benchmark import Selection
    from janus_ext.heads.base import Decision
    from janus_ext.methods.base import Method, TaskReport
    from janus_ext.training.progress import Progress
    from janus_ext.training.underway import State

Batches = Iterator[tuple[Tensor, Tensor]]
Record = Callable[[dict[str, Any]], None]
LOG = logging.getLogger("janus_ext")
PROBE = 256  # images on which it is measured how far features move


class Learner:
    """``model``, which ``method`` teaches one task after another with the optimizer of ``config``.

    ``planned`` is the number of tasks to come in all, over which a method may spread what it gives up; there may be
    more.
    """

    def __init__(
        self, config: LearnConfig, model: ContinualClassifier, method: Method, seed: int, planned: int
    ) -> None:
        self.config = config
        self.model = model
        self.method = method
        self.seed = seed
        self.planned = planned
        self.device = next(model.parameters()).device
        if config.compile:
            model.compile_backbone()

    @property
    def sizes(self) -> list[int]:
        """Number of classes of each task learned so far."""
        return [head.out_features for head in self.model.heads]

    def learn(
        self, images: Selection, classes: int, progress: Progress, record: Record, keeping: Keeping | None = None
    ) -> TaskReport:
        """Trains the next task, of ``classes`` classes, and lets the method consolidate it.

        ``record`` is given each epoch: its task and number, loss, accuracy (percent, within the task), learning rates
        and seconds. ``keeping`` is what writes the state within the task, and what it goes on from.

        Raises:
            TrainingError: the loss, a layer's statistics or the gradients are not finite; torch.compile or a kernel
                without a repeatable form fails.
        """
        with naming_task(len(self.sizes), self.model), compiling(), repeatable(), self._naming_module(images):
            report = self._learn(self._task(images, classes), images, progress, record, keeping or Keeping())
            align(self, with_method=True)
            return report

    def _learn(self, task: Task, images: Selection, progress: Progress, record: Record, keeping: Keeping) -> TaskReport:
        torch.manual_seed(derive_seed(self.seed, task.index, -1, "factors and head"))
        self.method.begin_task(task)
        align(self, with_method=False)
        trained = self.method.trainable() if task.learns else []
        optimizer = make_optimizer(self.config, trained, list(self.model.heads[-1].parameters()))
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.amp == "fp16")
        scaler.scale(torch.zeros((), device=self.device))  # begins, also where the first batch leaves no image here
        underway = Underway(self.method, optimizer, scaler, progress, self.device)
        self.model.train()
        start = keeping.take_start()
        if start is not None:
            underway.restore(start)
        with keeping.stepping():
            for epoch in range(start.position[0] if start else 0, task.epochs):
                record(self._train_epoch(task, epoch, images, underway, keeping, start))
                keeping.epoch_done(underway, epoch, task.epochs)
                start = None
        torch.manual_seed(derive_seed(self.seed, task.index, self.config.epochs, "next factors"))
        if task.learns:
            self.method.end_epochs()
        report = self.method.end_task(task)
        if report.merged is not None and (report.merged < 1 or self.config.drift_budget is not None):
            log_merged(task.index, report.merged, report)
        return report

    @contextmanager
    def _naming_module(self, images: Selection) -> Iterator[None]:
        """Says of a loss that is not finite where it began, unless the weights are spoiled by then and would tell all.

        So it is in float16, which holds no large numbers, and whose spoiled steps are left out.
        """
        try:
            yield
        except LossError as error:
            if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
                raise
            batches = self._training_batches(images, len(self.sizes) - 1, error.epoch, error.step)
            batch = next(batches)[0]
            pieces = batch.split(self.model.images_at_once) if len(batch) else ()
            passes = (partial(self.model, piece) for piece in pieces)
            raise TrainingError(f"{error}; {said_of_overflow(self.model, passes)} there") from error

    def _train_epoch(
        self,
        task: Task,
        epoch: int,
        images: Selection,
        underway: Underway,
        keeping: Keeping,
        start: State | None,
    ) -> dict[str, Any]:
        optimizer, scaler, progress = underway.optimizer, underway.scaler, underway.progress
        share = schedule(self.config, epoch)
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        own = f" of process {processes.rank()}" if processes.rank() else ""
        torch.manual_seed(derive_seed(self.seed, task.index, epoch, f"model{own}"))
        if task.learns:
            self.method.begin_epoch(is_last=epoch == self.config.epochs - 1)
        progress.begin_epoch(task.index, epoch)
        if start is not None and start.position[1]:
            underway.restore_epoch(start)
        for batch, labels in self._training_batches(images, task.index, epoch, progress.step):
            size = min(self.config.batch_size, len(images) - progress.step * self.config.batch_size)
            try:
                step = self._step(batch, labels - task.first, size, optimizer, scaler)
            except StatisticsError as error:
                error.args = (f"epoch {epoch + 1}, step {progress.step + 1}: {error.text}",)
                raise
            progress.add(step.loss, step.correct, size)
            if not progress.pending:  # the device was read anyway
                underway.require_finite(epoch, progress.step)
            keeping.step_done(underway, epoch, progress.step)
        progress.read()
        underway.require_finite(epoch + 1, 0)
        if scaler.get_scale() < 1:  # 1 without a scaler; halved at every step that was left out
            raise TrainingError(
                f"float16 does not hold the gradients of task {task.index + 1}, epoch {epoch + 1}, however small "
                "the loss is scaled; --amp bf16 or --amp off will help"
            )
        lr, head_lr = (group["lr"] for group in optimizer.param_groups)
        values = {"loss": progress.loss, "accuracy": progress.accuracy, "lr": lr, "head_lr": head_lr}
        progress.end_epoch()
        return {"task": task.index, "epoch": epoch, **values, "seconds": progress.seconds}

    def _step(
        self,
        images: Tensor,
        targets: Tensor,
        size: int,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> Step:
        """forward, backward, sum over the processes, unscale, rectify, clip, step; ``size`` images are in the batch.

        Gradients that float16 did not hold are rectified and clipped like others; then the scaler leaves the step out.
        """
        optimizer.zero_grad(set_to_none=True)
        step = self._forward_backward(images, targets, size, scaler)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        add_up_gradients(trained)
        scaler.unscale_(optimizer)
        if self.method.learns:
            self.method.after_backward()
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(trained, self.config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        if self.method.learns:
            self.method.after_step()
        return step

    def _forward_backward(self, images: Tensor, targets: Tensor, size: int, scaler: torch.amp.GradScaler) -> Step:
        """Adds up the gradients of this process's part in the mean loss of a batch of ``size`` images, piece after
        piece; all pieces but the last are one size.
        """
        piece_size = -(-self.config.batch_size // (self.config.accumulate * processes.count()))
        loss, correct = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.int64, device=self.device)
        for piece, labels in zip(images.split(piece_size), targets.split(piece_size), strict=True):
            if len(piece):  # the last batch may have fewer images than there are processes
                step = self.method.loss(piece, labels)
                share = step.loss * (len(piece) / size)
                scaler.scale(share).backward()
                loss, correct = loss + share.detach(), correct + step.correct
        return Step(loss, correct)

    def observe(self, images: Selection, labelled: bool = False) -> None:
        """Protects the inputs of images that are not learned, as they are; between two tasks.

        Labelled ones are of classes that were learned without images: heads get to know them, too.

        Raises:
            ArgumentError: the method remembers no inputs, and the images are not labelled.
            StatisticsError: a layer's inputs are zero or not finite; nothing is protected.
        """
        latest = max(0, len(self.sizes) - 1)
        task = self._task(images, 0)
        clean = replace(task, index=latest, augmented_batches=task.clean_batches)
        if self.method.remembers or not labelled:
            self.method.observe(clean)
        if labelled:
            self.method.meet(clean)

    @torch.no_grad()
    def scores(self, images: Selection) -> Batches:
        """Per batch (scores [b, C] over all classes so far, the largest wins; labels int64 [b]).

        StatisticsError where the largest of an image is no finite number.
        """
        self.model.eval()
        rows = images.rows.split(self.model.images_at_once)
        for places, (batch, labels) in zip(rows, self.clean_batches(images), strict=False):
            scores = self.method.scores(batch)
            if len(bad := places[untold(scores).cpu()]):
                name = images.split.samples[int(bad[0])]
                raise StatisticsError(f"the scores of {name} are no finite numbers: the network overflows")
            yield scores, labels

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Within it, whatever ends in an error or an interrupt leaves the learner as it was."""
        moving, method = ({name: tensor.clone() for name, tensor in part.items()} for part in self.moving())
        sizes, model = self.sizes, self.model.state_dict() | moving
        try:
            yield
        except BaseException:
            processes.give_up()
            self.method.abandon_task()
            self.restore(sizes, model, method)
            raise

    @torch.no_grad()
    def count_hits(self, task: int, images: Selection, decisions: Mapping[str, Decision]) -> dict[str, list[int]]:
        """Of images of one task, by each of ``decisions``, from one pass of the backbone: how many are right, right
        with the task known, and recognised as of their task. Raises as `scores`.
        """
        span, share = (sum(self.sizes[:task]), self.sizes[task]), images.part(processes.part)
        self.model.eval()
        totals = {name: torch.zeros(3, dtype=torch.int64, device=self.device) for name in decisions}
        bad = torch.zeros((), dtype=torch.int64, device=self.device)
        with compiling(), repeatable():
            for batch, labels in self.clean_batches(share):
                features = self.model.features(batch)
                for name, decision in decisions.items():
                    scores = decision.scores(features)
                    totals[name] += hits(scores, labels, *span)
                    bad += untold(scores).sum()
        self.model.train()
        if int(processes.add_up(bad)):
            passes = (partial(self.model.features, batch) for batch, _ in self.clean_batches(share))
            origin = said_of_overflow(self.model, passes)
            raise StatisticsError(f"scores in task {task + 1} are no finite numbers: {origin}")
        return {name: processes.add_up(total).tolist() for name, total in totals.items()}

    def learns(self, task: int, classes: int) -> bool:
        """Whether the backbone learns in a task: from one class alone there is nothing to learn."""
        return classes != 1 and self.config.lets_learn(task)

    def epochs(self, task: int, classes: int) -> int:
        """How many epochs a task is trained for: none of one class, nor where nothing learns and the head is fitted."""
        trains = self.learns(task, classes) or (classes != 1 and self.config.head in TRAINED_HEADS)
        return self.config.epochs if trains else 0

    def clean_batches(self, images: Selection) -> Batches:
        """Images as they are, as many at once as a pass without gradients takes, on the model's device."""
        return self._to_device(images.batches(self.model.images_at_once))

    def step_count(self, task: int, classes: int, images: int) -> int:
        """Number of steps in a task with so many classes and training images."""
        return self.epochs(task, classes) * -(-images // self.config.batch_size)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors of the model, and those that the method keeps beside it, between two tasks."""
        return self.model.state_dict(), self.method.state_dict()

    def moving(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What of `state` a task moves; all else of the model is frozen."""
        moving = ("heads.", *(f"backbone.{name}." for name in self.method.layers))
        model, method = self.state()
        return {name: tensor for name, tensor in model.items() if name.startswith(moving)}, method

    def restore(self, sizes: list[int], model: dict[str, Tensor], method: dict[str, Tensor]) -> None:
        """Takes up behind tasks of ``sizes`` classes what `state` gave; an error of torch's where it does not fit."""
        del self.model.heads[len(sizes) :]
        for size in sizes[len(self.sizes) :]:
            self.model.add_task(size)
        self.model.load_state_dict(model)
        self.method.load_state_dict(method)

    def _task(self, images: Selection, classes: int) -> Task:
        index, own = len(self.sizes), images.part(processes.part)
        probed = images.spread(PROBE).part(processes.part)
        return Task(
            index=index,
            total=self.planned,
            first=sum(self.sizes),
            classes=classes,
            seed=self.seed,
            head_seed=derive_seed(self.seed, -1, -1, "heads"),
            learns=self.learns(index, classes),
            observes=classes == 1 and self.config.learn == "all",
            epochs=self.epochs(index, classes),
            clean_batches=lambda: self.clean_batches(own),
            probe_batches=lambda: self.clean_batches(probed),
            augmented_batches=lambda: self._training_batches(images, index, self.config.epochs),
        )

    def _training_batches(self, images: Selection, task: int, epoch: int, skip: int = 0) -> Batches:
        """The task's images in random order, augmented, of each batch the share of this process; epochs beyond the last
        one serve the method's statistics.
        """
        seed = derive_seed(self.seed, task, epoch, "data")
        return self._to_device(images.shuffled(self.config.batch_size, seed, skip, processes.part))

    def _to_device(self, batches: Batches) -> Batches:
        for images, labels in batches:
            yield self._sent(images), self._sent(labels)

    def _sent(self, tensor: Tensor) -> Tensor:
        """On the model's device; to a GPU from pinned memory, which it reads by itself while the host goes on."""
        if self.device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


@contextmanager
def naming_task(index: int, model: nn.Module) -> Iterator[None]:
    """Says in which task a layer's statistics went bad, and of those and of a loss which weights are bad by then."""
    try:
        yield
    except (StatisticsError, TrainingError) as error:
        message = f"task {index + 1}: {error}" if isinstance(error, StatisticsError) else str(error)
        first_frozen = sorted(model.named_parameters(), key=lambda named: named[1].requires_grad)  # they infect others
        broken = [name for name, parameter in first_frozen if not bool(parameter.isfinite().all())]
        by_then = f"; not finite by then: {first_of(broken)}" if broken and broken[0] not in message else ""
        raise TrainingError(f"{message}{by_then}") from error


@contextmanager
def compiling() -> Iterator[None]:
    """Turns the pages in which torch.compile fails, at the first batch or later, into one line."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrainingError(f"--compile fails here, leave it out or see to this: {reason}") from error


@contextmanager
def repeatable() -> Iterator[None]:
    """Says which operator has no repeatable kernel, where PyTorch is to use no other."""
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if not found:
            raise
        raise TrainingError(
            f"PyTorch's {found[1]} has no repeatable kernel on this device, and the model needs it: another --backbone "
            "or --device cpu will help"
        ) from error


def derive_seed(seed: int, task: int, epoch: int, purpose: str) -> int:
    """A 63-bit seed for one purpose in one epoch of one task."""
    digest = hashlib.sha256(f"{seed}/{task}/{epoch}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
