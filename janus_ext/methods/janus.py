"""Janus-LoRA: online estimation (OE), gradient rectification (GR), decoupled margin loss (DML).

For every task t = 0 .. T-1:
    train the factors A, B of each layer on CE(current task) + DML(features, old prototypes)
        GR    before each step, the factor gradients are rectified against the layer's protected basis V
        OE    in the last epoch, each layer's estimator observes the inputs that training computes anyway
    OE    V' <- commit(energy_start + (energy_end - energy_start) t / T)
          W <- W + s B A;  fresh factors;  V <- V' protects the next task
    DML   the mean feature of each new class becomes a prototype
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from torch import Tensor

from janus_ext.estimator import OnlineEstimator, observing
from janus_ext.margin import DecoupledMarginLoss
from janus_ext.methods.base import Task, TaskReport, below
from janus_ext.methods.lora import SequentialLoRA
from janus_ext.rectifier import GradientRectifier

if TYPE_CHECKING:
    from janus_ext.backbone import ContinualClassifier
    from janus_ext.config import TrainConfig


class Janus(SequentialLoRA):
    """Janus-LoRA; each of its three parts can be switched off (rectify, estimator, margin_weight)."""

    def __init__(self, model: ContinualClassifier, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.estimators = {} if config.estimator == "none" else self._make_estimators()
        self.observing = ExitStack()
        self.rectifier = None if self.rectified_in_backward else GradientRectifier(self.layers)
        self.margin_loss = DecoupledMarginLoss(config.margin, config.temperature, config.margin_weight)

    # OE: online estimation -------------------------------------------------------------------------------------------
    def begin_epoch(self, is_last: bool) -> None:
        if is_last:
            self.observing.enter_context(observing(self.layers, self.estimators))

    def close_task(self, task: Task) -> TaskReport:
        self.observing.close()
        energy = self.config.energy_start
        energy += (self.config.energy_end - self.config.energy_start) * task.index / task.total
        bases = self._commit(energy)
        report = super().close_task(task)
        for name, basis in bases.items():
            self.layers[name].protect(basis)
            report.basis_rank[name] = basis.shape[1]
        return report

    def _commit(self, energy: float) -> dict[str, Tensor]:
        """The bases of the next task; where a layer's statistics are bad, none is changed and nothing is merged."""
        rooms = {name: self.layers[name].in_features - self.layers[name].rank for name in self.estimators}
        bases = {name: estimator.extended(energy, rooms[name]) for name, estimator in self.estimators.items()}
        return {name: self.estimators[name].adopt(basis) for name, basis in bases.items()}

    # GR: gradient rectification --------------------------------------------------------------------------------------
    def after_backward(self) -> None:
        if self.rectifier is not None:
            self.rectifier.rectify()

    # DML: decoupled margin loss --------------------------------------------------------------------------------------
    def penalty(self, features: Tensor) -> Tensor | float:
        if self.config.margin_weight == 0 or not len(self.prototypes):
            return 0.0
        return self.margin_loss(features, self.prototypes.matrix)

    # -----------------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Tensor]:
        parts = {f"estimators.{name}": estimator for name, estimator in self.estimators.items()}
        tensors = {f"{part}.{key}": value for part, e in parts.items() for key, value in e.state_dict().items()}
        return super().state_dict() | tensors

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        for name, estimator in self.estimators.items():
            estimator.load_state_dict(below(f"estimators.{name}.", state))

    def _make_estimators(self) -> dict[str, OnlineEstimator]:
        """One estimator per block: K and V share their input."""
        config = self.config
        return {
            name: OnlineEstimator(
                layer.in_features,
                estimator=config.estimator,
                rank=config.estimator_rank,
                name=name,
                energy_power=config.energy_power,
                device=layer.A.device,
            )
            for name, layer in self.layers.items()
        }
