"""Sequential LoRA fine-tuning: every task trains fresh factors, by default on K and V, and merges them, unguarded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from janus_ext.errors import StatisticsError
from janus_ext.estimator import OnlineEstimator, observing
from janus_ext.injection import inject
from janus_ext.methods.base import Method, Task, TaskReport
from janus_ext.protection import violation, violation_rounding
from janus_ext.rectification import Rectification
from janus_ext.rectified import rectified_layers, rectify_all

if TYPE_CHECKING:
    from janus_ext.classifier import ContinualClassifier
    from janus_ext.config import TrainConfig


class SequentialLoRA(Method):
    """Fine-tuning baseline, and the frame in which the other LoRA methods work.

    Gradient rectification is part of the frame, so that it can be plugged into every method that gives its layers a
    basis: factor gradients come plain from the backward and are rectified in one batched call before the step, except
    for the one combination that needs the full-weight gradient, which only the backward sees.
    """

    def __init__(self, model: ContinualClassifier, config: TrainConfig) -> None:
        super().__init__(model, config)
        in_backward = config.rectify == "tangent" and config.estimator != "none"
        rectification = Rectification(config.rectify, config.damping, config.share, config.balance)
        self.layers = inject(
            model.backbone,
            config.rank,
            config.targets,
            config.scale,
            rectify=rectification,
            rectify_in="backward" if in_backward else "step",
        )
        behind_backward = config.rectify != "none" and not in_backward
        self.rectified = rectified_layers(self.layers, rectification) if behind_backward else []

    def trainable(self) -> list[nn.Parameter]:
        return [factor for layer in self.layers.values() for factor in (layer.A, layer.B)]

    def after_backward(self) -> None:
        rectify_all(self.rectified)

    def shrink_update(self, share: float) -> None:
        for layer in self.layers.values():
            layer.B.mul_(share)

    def close_task(self, task: Task) -> TaskReport:
        report = TaskReport(factors=self._factors())
        for name, layer in self.layers.items():
            guarded = self.guarded(name)
            change = layer.merge()
            if guarded.shape[1]:
                report.violation[name] = violation(change, guarded)
                report.violation_rounding[name] = violation_rounding(change, layer.target_weights())
        return report

    def guarded(self, name: str) -> Tensor:
        """Basis [n, k] of the inputs for which layer ``name`` is to stay as it is: what violation is measured on."""
        return self.layers[name].basis

    # statistics of the layers' inputs, for the methods that take them -------------------------------------------------
    def make_estimators(self) -> dict[str, OnlineEstimator]:
        """One for every input, by the name of the layer that stands for it: the slices of a fused qkv share theirs."""
        config, inputs = self.config, set(self.layers.inputs.values())
        return {
            name: OnlineEstimator(
                layer.in_features,
                estimator=config.estimator,
                rank=self._estimator_rank(layer.in_features),
                name=name,
                energy_power=config.energy_power,
                device=layer.A.device,
            )
            for name, layer in self.layers.items()
            if name in inputs
        }

    def _estimator_rank(self, width: int) -> int | None:
        """The configuration's, which is no more than the width of the widest layer; a narrower one takes its own."""
        rank, widest = self.config.estimator_rank, max(layer.in_features for layer in self.layers.values())
        return rank if rank is None or rank > widest else min(rank, width)

    @torch.no_grad()
    def watch(self, task: Task, estimators: dict[str, OnlineEstimator]) -> None:
        """Lets ``estimators`` observe one pass over the task's augmented images, without training."""
        self.model.eval()
        with observing(self.layers, estimators):
            for images, _ in task.augmented_batches():
                self.model.features(images)
        self.model.train()

    def second_moments(self, task: Task) -> dict[str, Tensor]:
        """H = sum x x^T [n, n], float64, of the inputs that `make_estimators` names, over such a pass.

        StatisticsError names a bad one.
        """
        estimators = self.make_estimators()
        self.watch(task, estimators)
        seen = {name: estimator.statistics_of_all() for name, estimator in estimators.items()}
        moments = {name: statistics.tensors()["gram"].double() for name, statistics in seen.items()}
        for name, H in moments.items():
            if not bool(torch.isfinite(H).all()) or not bool(H.any()):
                raise StatisticsError(f"{name}: the inputs of the task are all zero, or not finite")
        return moments

    def _factors(self) -> dict[str, Tensor]:
        """Copies of the effective A and B and the basis [n, k] in force, of every layer.

        A is [r, n] and B [m, r], of a fused qkv [g, r, n] and [g, m, r]. A is float64: the merge takes it so, and with
        it W can be computed again to the same bits.
        """
        factors = {}
        for name, layer in self.layers.items():
            tensors = {"A": layer.effective_A64(), "B": layer.B, "basis": self.guarded(name)}
            factors |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in tensors.items()}
        return factors
