"""What the trainer asks of a continual-learning method, and what every method measures in the same way.

A method is called in this order, once per task: ``begin_task``; per epoch ``begin_epoch`` and, per step, ``loss``,
``after_backward`` and ``after_step``; ``end_task``. A baseline needs ``trainable`` and ``close_task``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ext.errors import ArgumentError
from janus_ext.margin import ClassPrototypes

if TYPE_CHECKING:  # names for the reader; a method gets both objects handed in
    from janus_ext.classifier import ContinualClassifier
    from janus_ext.config import TrainConfig

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Task:
    """One task as a method sees it; labels count the model's outputs, and it owns ``classes`` from ``first`` on."""

    index: int
    total: int
    first: int
    classes: int
    seed: int
    """Of the learner: for random choices that hold for all tasks; torch's own generator is seeded for each."""
    clean_batches: Batches
    """Makes a fresh pass over the training images, unaugmented, on the model's device: (uint8 images, labels)."""
    augmented_batches: Batches
    """The same, augmented and in random order as in training: what rival methods take their statistics from."""


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
    danger: float | None = None
    """Mean cosine of the task's features to the nearest old prototype; None for the first task."""
    similarity_own: list[float] = field(default_factory=list)
    """Per class of the task the mean cosine of its features to their own centre."""
    similarity_old: list[float] | None = None
    """Per class of the task the mean cosine of its features to the nearest old prototype."""
    factors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """The task's update before it was merged, for the checkpoint."""


class Method(ABC):
    """Base of all methods: one head per task, cross entropy over the current task's classes, prototypes."""

    def __init__(self, model: ContinualClassifier, config: TrainConfig) -> None:
        self.model = model
        self.config = config
        self.prototypes = ClassPrototypes(model.feature_dim, model.mean.device)

    def begin_task(self, task: Task) -> None:
        """Adds the head of ``task``."""
        self.model.add_task(task.classes, self.config.head_init)

    @abstractmethod
    def trainable(self) -> list[nn.Parameter]:
        """What the optimizer of the current task moves, beside the newest head."""

    def begin_epoch(self, is_last: bool) -> None:  # noqa: B027 - a hook, most methods need none
        """Called before each epoch; ``is_last`` in the last one of the task."""

    def loss(self, images: Tensor, targets: Tensor) -> Step:
        """Loss of uint8 images [b, 3, H, W] with targets [b] counted within the current task."""
        features = self.model.features(images)
        logits = self.model.heads[-1](features)
        loss = F.cross_entropy(logits, targets) + self.penalty(features, targets)
        return Step(loss, (logits.detach().argmax(-1) == targets).sum())

    def penalty(self, features: Tensor, targets: Tensor) -> Tensor | float:
        """What a method adds to the cross entropy, from the features [b, d] and targets [b]."""
        return 0.0

    def after_backward(self) -> None:  # noqa: B027 - likewise
        """Called with the gradients in place, before clipping and the optimizer's step."""

    def after_step(self) -> None:  # noqa: B027 - likewise
        """Called after each step of the optimizer."""

    def scores(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, H, W] -> [b, classes seen so far], the largest wins: logits, or cosines to prototypes."""
        features = self.model.features(images)
        logits = self.model.classify(features)
        if self.config.head != "ncm":
            return logits
        scores = torch.full_like(logits, -float("inf"))  # of a class that had no training images, hence no prototype
        scores[:, self.prototypes.classes] = self.prototypes.cosines(features)
        return scores

    def abandon_task(self) -> None:  # noqa: B027 - likewise
        """Called where a task ends in an error: lets go of what was begun; tensors are restored by the caller."""

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
    def close_task(self, task: Task) -> TaskReport:
        """Consolidates the task: afterwards the model is what will be evaluated, and what the next task starts from."""

    def end_task(self, task: Task) -> TaskReport:
        """Closes the task, measures its features against the old prototypes, then adds its own."""
        report = self.close_task(task)
        features, labels = self._clean_features(task)
        self._measure(features, labels, report)
        self.prototypes.add(features, labels)
        return report

    def state_dict(self) -> dict[str, Tensor]:
        """Named tensors that the method keeps from task to task, beside the model."""
        return {f"prototypes.{key}": value for key, value in self.prototypes.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what ``state_dict`` gave."""
        self.prototypes.load_state_dict(below("prototypes.", state))

    @torch.no_grad()
    def _clean_features(self, task: Task) -> tuple[Tensor, Tensor]:
        """Features [N, d] and labels [N] of the task's training images in evaluation mode."""
        self.model.eval()
        passes = [(self.model.features(images), labels) for images, labels in task.clean_batches()]
        self.model.train()
        return torch.cat([f for f, _ in passes]), torch.cat([y for _, y in passes])

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


def states(group: str, parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of all ``parts``' state dictionaries, as "<group>.<part>.<tensor>"."""
    named = {f"{group}.{name}": part.state_dict() for name, part in parts.items()}
    return {f"{name}.{key}": tensor for name, state in named.items() for key, tensor in state.items()}


def load_states(group: str, parts: Mapping[str, Any], state: dict[str, Tensor]) -> None:
    """Gives every part back what ``states`` took from it."""
    for name, part in parts.items():
        part.load_state_dict(below(f"{group}.{name}.", state))


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of ``state`` whose names begin with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
