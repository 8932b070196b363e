"""What an export is made of, whoever has it: a finished run, or a learner in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from janus_ext.classifier import ContinualClassifier
from janus_ext.data.images import View
from janus_ext.errors import ArgumentError
from janus_ext.heads.base import Decision


@dataclass(frozen=True)
class Update:
    """What one task has learned: ``tensors`` "<layer>.A" and "<layer>.B" (and others), whose s B A was merged.

    There are none of a task in which the backbone did not learn.
    """

    tensors: Mapping[str, Tensor]
    scale: float
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """A model, its classifier and what is known of both.

    Attributes:
        model: the backbone with its adapters, as a method has left it behind a task; exports copy it.
        decision: the head, which makes scores of features.
        class_names: C of them, in the order of the rows.
        settings: of the run, as its config.json has them ("backbone", "weights", "image_size", "method", ...).
        updates: one a task, oldest first.
        results: of the run, as its results.json has them; None where nothing was measured.
        view: how images were shown to the model.
    """

    model: ContinualClassifier
    decision: Decision
    class_names: tuple[str, ...]
    settings: Mapping[str, Any]
    updates: tuple[Update, ...] = ()
    results: Mapping[str, Any] | None = None
    view: View = View()

    @property
    def adapters(self) -> dict[str, Update]:
        """The updates of the backbone by "task-<index>"."""
        return {f"task-{index}": update for index, update in enumerate(self.updates) if update.tensors}

    def __post_init__(self) -> None:
        if self.view.size != self.model.input_size:
            raise ArgumentError(f"view must be of {self.model.input_size} pixels, got {self.view.size}")
        if len(self.decision.bias) != len(self.class_names):
            raise ArgumentError(f"decision must be of {len(self.class_names)} classes, got {len(self.decision.bias)}")
