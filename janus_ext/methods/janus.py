"""Janus-LoRA: online estimation (OE), gradient rectification (GR), decoupled margin loss (DML).

For every task t = 0 .. T-1:
    train the factors A, B of each layer on CE(current task) + DML(features, old prototypes)
        GR    before each step, the factor gradients are rectified against the layer's protected basis V
        OE    in the last epoch, each layer's estimator observes the inputs that training computes anyway
              (where less than the whole update is merged: the inputs of another pass, after it was shrunk)
    OE    V' <- commit(energy_start + (energy_end - energy_start) t / T)
          W <- W + s B A;  fresh factors;  V <- V' protects the next task
    DML   the mean feature of each new class becomes a prototype
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from torch import Tensor

from janus_ext import processes
from janus_ext.estimator import observing
from janus_ext.margin import DecoupledMarginLoss
from janus_ext.methods.base import Task, TaskReport
from janus_ext.methods.protected import ProtectedLoRA
from janus_ext.named_tensors import load_states, states

if TYPE_CHECKING:
    from janus_ext.classifier import ContinualClassifier
    from janus_ext.config import TrainConfig


class Janus(ProtectedLoRA):
    """Janus-LoRA; each of its three parts can be switched off (rectify, estimator, margin_weight)."""

    like = "janus"

    def __init__(self, model: ContinualClassifier, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.observing = ExitStack()
        self.shrunk = False
        self.margin_loss = DecoupledMarginLoss(config.margin, config.temperature, config.margin_weight)

    def begin_epoch(self, is_last: bool) -> None:
        if is_last:
            self.observing.enter_context(observing(self.layers, self.estimators))

    def end_epochs(self) -> None:
        self.observing.close()

    def shrink_update(self, share: float) -> None:
        super().shrink_update(share)
        self.shrunk = True

    def close_task(self, task: Task) -> TaskReport:
        if self.shrunk and self.estimators:
            # what was observed are the inputs that the whole update makes, and it is not merged whole
            for estimator in self.estimators.values():
                estimator.statistics.clear()
            self.watch(task, self.estimators)
        self.shrunk = False
        return super().close_task(task)

    def abandon_task(self) -> None:
        super().abandon_task()
        self.shrunk = False
        self.observing.close()

    def state_within_task(self) -> dict[str, Tensor]:
        for estimator in self.estimators.values():
            estimator.collect()  # what is kept is the first process's state
        return states("estimators", self.estimators)

    def added_up(self) -> dict[str, Tensor]:
        statistics = {name: estimator.statistics.tensors() for name, estimator in self.estimators.items()}
        return {f"estimators.{name}.{key}": found[key] for name, found in statistics.items() for key in found}

    def load_state_within_task(self, state: dict[str, Tensor]) -> None:
        load_states("estimators", self.estimators, state)
        if not processes.is_first():
            for estimator in self.estimators.values():
                estimator.statistics.clear()

    def penalty(self, features: Tensor, targets: Tensor) -> Tensor | float:
        if self.config.margin_weight == 0 or not len(self.prototypes):
            return 0.0
        return self.margin_loss(features, self.prototypes.matrix)
