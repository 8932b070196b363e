"""What the trainer asks of a continual-learning method, and what every method measures in the same way.

A method is called in this order, once per task:

    begin_task                                 adds the task's head, and calls open_task
    trainable                                  the optimizer is made of it, fresh for every task
    per epoch    begin_epoch
    per step     loss, which calls penalty; after_backward; after_step
    end_epochs
    end_task                                   shrink_update where less than all is merged, close_task; then it measures

A method writes ``trainable``, ``shrink_update`` and ``close_task`` at least, and of ``open_task``, ``begin_epoch``,
``penalty``, ``after_backward``, ``after_step``, ``end_epochs`` what it needs. In a task that leaves the backbone as it
is, only the head is trained: ``begin_task``, ``loss`` and ``end_task`` alone are called, and ``observe`` of one class.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ext import processes
from janus_ext.config.foreign import Declared, loaded_head
from janus_ext.errors import ArgumentError, StatisticsError
from janus_ext.heads import HEADS, elsewhere
from janus_ext.heads.base import Decision
from janus_ext.heads.drift import ShareSearch, drift_map, movement
from janus_ext.heads.knowledge import Knowledge
from janus_ext.heads.separability import is_worse, told_apart
from janus_ext.overflow import said_of_overflow

if TYPE_CHECKING:  # names for the reader; a method gets these objects handed in
    from janus_ext.classifier import ContinualClassifier
    from janus_ext.config import TrainConfig
    from janus_ext.margin import ClassPrototypes

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]
FITTED = ["ncm", "lda", "ridge"]  # in a moment, from statistics alone
LOG = logging.getLogger("janus_ext")
CLOSE_ENOUGH = 0.9  # of the budget of a movement: a share of the update is found by repeated measuring
FIRST = 10  # times the budget of a movement is the first task's
MOST_TRIALS = 10


@dataclass(frozen=True)
class Task:
    """One task as a method sees it; labels count the model's outputs, and it owns ``classes`` from ``first`` on."""

    index: int
    total: int
    first: int
    classes: int
    seed: int
    """Of the learner: for random choices that hold for all tasks; torch's own generator is seeded for each."""
    head_seed: int
    """For what a head draws, for all tasks: derived from the same."""
    learns: bool
    """Whether the backbone learns in it; else the head alone does."""
    observes: bool
    """Whether it does not, and does later: then a method that remembers inputs is to `observe` those of this task."""
    epochs: int
    """Passes over its images; 0 where a fitted head needs none."""
    clean_batches: Batches
    """Makes a fresh pass over the training images, unaugmented, on the model's device: (uint8 images, labels).

    Of several processes that train together, each gets its share of the images, in this pass and in those below.
    """
    probe_batches: Batches
    """The same of a few hundred images, spread over all of them: how far features move is measured on these."""
    augmented_batches: Batches
    """The same, augmented and in random order as in training: what rival methods take their statistics from."""


class Probe(NamedTuple):
    """A few images of a task, as they were before it."""

    features: Tensor
    """[n, d]."""
    labels: Tensor
    """[n]."""
    spread: Tensor
    """Covariance [d, d] within the classes known and these."""


class Step(NamedTuple):
    """Result of ``loss``: a scalar to minimise, and how many images of the batch were classified rightly."""

    loss: Tensor
    correct: Tensor


@dataclass
class TaskReport:
    """What a method measured on the task that just ended; empty where it does not apply."""

    violation: dict[str, float] = field(default_factory=dict)
    """Per layer |dW V|_F / |dW|_F."""
    violation_rounding: dict[str, float] = field(default_factory=dict)
    """Per layer how much of it the rounding of W can be."""
    basis_rank: dict[str, int] = field(default_factory=dict)
    """Per layer the number of directions protected from the next task on (by LoRA-DRS: in this task)."""
    movement: float | None = None
    """By how many standard deviations within classes the task has moved its own features; None where nothing learns, or
    where they scatter too little to say."""
    merged: float | None = None
    """Which share of the update was merged, 1 unless ``merge_scale`` or ``drift_budget`` say less; None likewise."""
    danger: float | None = None
    """Mean cosine of the task's features to the nearest old prototype; None for the first task."""
    similarity_own: list[float] = field(default_factory=list)
    """Per class of the task the mean cosine of its features to their own centre."""
    similarity_old: list[float] | None = None
    """Per class of the task the mean cosine of its features to the nearest old prototype."""
    spoiled: bool = False
    """Whether the first task's whole update told its own images apart worse than before; then little is merged."""
    factors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """The task's update before it was merged, for the checkpoint."""


class Method(Declared, ABC):
    """Base of all methods: one head per task, cross entropy over the current task's classes, and what heads know.

    Attributes:
        model: the backbone and the heads; ``model.features(images)`` gives what the heads see.
        config: the resolved settings.
        own: the settings that only this method has, an object of its ``Own``; None where it has none.
        layers: by their names in the backbone, the modules whose tensors the method moves. An error or an interrupt in
            a task restores these, and the heads; everything else in the backbone must stay as it is.
        known: what the heads know of the classes so far; kept by this class.
    """

    def __init__(self, model: ContinualClassifier, config: TrainConfig) -> None:
        self.model = model
        self.config = config
        self.own = None if self.Own is None else self.Own(**(config.own or {}))
        self.layers: Mapping[str, nn.Module] = {}
        self.known = Knowledge(model.heads, model.feature_dim, model.mean.device, config.head_width, config.head)
        self.learns = True
        self._own_head = loaded_head(config.head)  # looked up once: a learner keeps what it was made with
        self._decisions: dict[str, Decision] = {}
        self._before: Tensor | None = None  # features of the task's images, of all where old statistics will move
        self._probe: Probe | None = None
        self._moved: Tensor | None = None  # the features of the probe as they were measured last

    @property
    def prototypes(self) -> ClassPrototypes:
        """Unit mean features of all classes of old tasks."""
        return self.known.prototypes

    def begin_task(self, task: Task) -> None:
        """Adds the head of ``task``, and looks at its features as they are."""
        self._decisions.clear()
        self.model.add_task(task.classes, self.config.head_init)
        self.learns = task.learns
        if self.learns:
            features, labels = self._probed(task)
            if self.config.drift == "ridge" and task.index:
                self._before = self._features(task.clean_batches)[0]
            self.open_task(task)
            self._probe = Probe(features, labels, self.known.spread(features, labels))

    def open_task(self, task: Task) -> None:  # noqa: B027 - a hook, most methods need none
        """What a method does before the first step of a task, its head in place.

        Random numbers come from torch's generator, which is seeded for the task.
        """

    @abstractmethod
    def trainable(self) -> list[nn.Parameter]:
        """What the optimizer of the current task moves at --lr, beside the newest head; asked for behind open_task."""

    def begin_epoch(self, is_last: bool) -> None:  # noqa: B027 - likewise
        """Called before each epoch; ``is_last`` in the last one of the task."""

    def loss(self, images: Tensor, targets: Tensor) -> Step:
        """Loss of uint8 images [b, 3, H, W] with targets [b] counted within the current task."""
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            features = self.model.features(images)
        logits = self.model.heads[-1](features)
        loss = F.cross_entropy(logits, targets)
        if self.learns:
            loss = loss + self.penalty(features, targets)
        return Step(loss, (logits.detach().argmax(-1) == targets).sum())

    def penalty(self, features: Tensor, targets: Tensor) -> Tensor | float:
        """What a method adds to the cross entropy: a scalar with gradient, from features [b, d] and targets [b]."""
        return 0.0

    def end_epochs(self) -> None:  # noqa: B027 - likewise
        """Called after the last epoch, before anything is measured or merged."""

    def after_backward(self) -> None:  # noqa: B027 - likewise
        """Called with the gradients in place, before clipping and the optimizer's step."""

    def after_step(self) -> None:  # noqa: B027 - likewise
        """Called after each step of the optimizer."""

    def decision(self, head: str | None = None) -> Decision:
        """``head`` (by default the configuration's) fitted to what is known; fitted once until more is known.

        Raises:
            ArgumentError: it needs statistics of classes that were learned without. A function of somebody's own may
                raise more.
        """
        name = head or self.config.head
        if name == "linear":  # trained, not fitted
            return HEADS[name](self.known)
        if name not in self._decisions:
            own = None if name in HEADS else self._own_head
            self._decisions[name] = elsewhere.fit(name, own, self.known) if own else HEADS[name](self.known)
        return self._decisions[name]

    def decisions(self) -> dict[str, Decision]:
        """The configuration's head, and beside it all heads that are fitted at no cost to what is known."""
        found = {self.config.head: self.decision()}
        others = ([] if self.known.untrained else ["linear"]) + (FITTED if self.known.has_statistics else [])
        for name in others:
            try:
                found[name] = self.decision(name)
            except StatisticsError as error:
                LOG.warning("head %s is not measured beside %s: %s", name, self.config.head, error)
        return found

    def scores(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, H, W] -> [b, classes seen so far], the largest wins: what the configuration's head says."""
        return self.decision().scores(self.model.features(images))

    def abandon_task(self) -> None:
        """Called where a task ends in an error: lets go of what was begun; tensors are restored by the caller."""
        self._before = self._probe = self._moved = None

    @property
    def remembers(self) -> bool:
        """Whether it protects old inputs, so that `observe` is of use."""
        return False

    def observe(self, task: Task) -> None:
        """Protects the inputs of ``task``'s images, which are not learned.

        Raises:
            ArgumentError: the method remembers no inputs.
        """
        raise ArgumentError(f"method {self.config.method} remembers no inputs: there is nothing that it could protect")

    @abstractmethod
    def shrink_update(self, share: float) -> None:
        """Multiplies the current task's update of the backbone by ``share``; without gradient, before close_task."""

    @abstractmethod
    def close_task(self, task: Task) -> TaskReport:
        """Consolidates the task: afterwards the model is what will be evaluated, and what the next task starts from.

        It fills in of the report what it knows itself: violation, basis_rank, factors. The rest is measured for it.
        """

    def end_task(self, task: Task) -> TaskReport:
        """Closes the task, measures its features against the old prototypes, adds what they say, fits the head."""
        report = self._consolidate(task) if self.learns else TaskReport()
        if task.observes and self.remembers:
            self.observe(task)
        features, labels = self._features(task.clean_batches)
        if self._before is not None:
            self.known.move(drift_map(self._before, features))
        self._measure(features, labels, report)
        self._before = self._probe = self._moved = None
        self._take_up(features, labels, task, trained=task.epochs > 0)
        return report

    def meet(self, task: Task) -> None:
        """Lets heads know the classes of ``task``'s images, which were learned without any."""
        self._take_up(*self._features(task.clean_batches), task)

    def _take_up(self, features: Tensor, labels: Tensor, task: Task, trained: bool = True) -> None:
        self.known.add(features, labels, task.head_seed, trained)
        self._decisions.clear()
        self.decision()

    @torch.no_grad()
    def _consolidate(self, task: Task) -> TaskReport:
        """Merges as much of the update as ``merge_scale`` and the guard allow."""
        if self.config.merge_scale < 1:
            self.shrink_update(self.config.merge_scale)
        share, moved, budget = 1.0, self._movement(task), self.config.guard
        spoiled = moved > budget and not task.first and self._spoils()
        limit = self._limit(task, spoiled)
        if moved > limit:
            share, moved = self._within(limit, task, moved)
        report = self.close_task(task)
        report.merged, report.spoiled = self.config.merge_scale * share, spoiled
        report.movement = moved if math.isfinite(moved) else None
        return report

    def _limit(self, task: Task, spoiled: bool) -> float:
        """By how many deviations the task may move features: every one behind the first by ``drift_budget``.

        The first one by more, behind which no statistics are out of date, but not by any amount: classes to come need
        what its own images may not ask for. Where it has spoiled even these, it is held as the others are.
        """
        if task.first or spoiled:
            return self.config.guard
        return FIRST * self.config.guard if task.total > 1 else math.inf

    def _within(self, budget: float, task: Task, moved: float) -> tuple[float, float]:
        """Shrinks the update until it moves features by ``budget`` or a little less: (its share, the movement)."""
        share, search = 1.0, ShareSearch(budget, moved)
        for _ in range(MOST_TRIALS):
            tried = search.next_share()
            self.shrink_update(tried / share)
            if tried == 0:
                return 0.0, 0.0
            share, moved = tried, self._movement(task)
            if CLOSE_ENOUGH * budget <= moved <= budget:
                return share, moved
            search.add(share, moved)
        self.shrink_update(search.below[0] / share)
        return search.below

    def _spoils(self) -> bool:
        """Whether behind the update the task's images are told apart worse than before it."""
        before, labels, _ = self._probe
        return processes.from_first(lambda: is_worse(told_apart(before, labels), told_apart(self._moved, labels)))

    def _probed(self, task: Task) -> tuple[Tensor, Tensor]:
        """`_features` of the probe in float32: the rounding of bfloat16 would look like movement."""
        with self.model.in_float32():
            return self._features(task.probe_batches)

    def _movement(self, task: Task) -> float:
        self._moved = self._probed(task)[0]
        moved = movement(self._probe.features, self._moved, self._probe.spread)
        return processes.first_says(moved)  # what depends on it has to be the same, whatever a processor rounds

    def state_within_task(self) -> dict[str, Tensor]:
        """Named tensors that its steps change beside `trainable`, such as statistics that it adds up meanwhile.

        What `begin_task` sets is not among them: where a run goes on within a task, that is called again. Of several
        processes all are asked, and what the first one says is kept for all.
        """
        return {}

    def added_up(self) -> dict[str, Tensor]:
        """What of `state_within_task` this process has added up by itself; looked at now and then, whether it is
        finite.
        """
        return {}

    def load_state_within_task(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - likewise
        """Restores what ``state_within_task`` gave."""

    def state_dict(self) -> dict[str, Tensor]:
        """Named tensors that the method keeps from task to task, beside the model: with them, and the model's own, a
        run goes on in another process with the same bits. A subclass adds its own to ``super().state_dict()``.
        """
        return self.known.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what ``state_dict`` gave, between two tasks; the tensors are on the CPU where a file gave them."""
        self._decisions.clear()
        self.known.load_state_dict(state)

    @torch.no_grad()
    def _features(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """Features [N, d] and labels [N] of a pass over images, in evaluation mode; of all processes' images.

        Raises:
            StatisticsError: one is not finite.
        """
        training, device = self.model.training, self.model.mean.device
        self.model.eval()
        passes = [(self.model.features(images), labels) for images, labels in batches()]
        self.model.train(training)
        none = torch.zeros(0, self.model.feature_dim, device=device), torch.zeros(0, dtype=torch.int64, device=device)
        features, labels = (torch.cat(parts) for parts in zip(none, *passes, strict=True))
        features, labels = processes.rows_of_all(features), processes.rows_of_all(labels)
        if spoiled := len(features) - int(features.isfinite().all(-1).sum()):
            origin = said_of_overflow(self.model, (partial(self.model.features, images) for images, _ in batches()))
            raise StatisticsError(f"the features of {spoiled} of {len(features)} images are not finite: {origin}")
        return features, labels

    def _measure(self, features: Tensor, labels: Tensor, report: TaskReport) -> None:
        """Fills in danger and the similarities per class."""
        directions = F.normalize(features, dim=-1)
        classes = labels.unique().tolist()
        members = [directions[labels == c] for c in classes]
        report.similarity_own = [float((m @ F.normalize(m.mean(0), dim=0)).mean()) for m in members]
        if len(self.prototypes):
            nearest = self.prototypes.nearest(features)
            report.similarity_old = [float(nearest[labels == c].mean()) for c in classes]
            report.danger = float(nearest.mean())
