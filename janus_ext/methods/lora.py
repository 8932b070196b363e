"""Sequential LoRA fine-tuning: every task trains fresh factors on K and V, and merges them. Nothing guards the old."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from janus_ext.lora import inject, violation
from janus_ext.methods.base import Method, Step, Task, TaskReport

if TYPE_CHECKING:
    from janus_ext.backbone import ContinualClassifier
    from janus_ext.config import TrainConfig


class SequentialLoRA(Method):
    """Fine-tuning baseline, and the frame in which Janus-LoRA works."""

    def __init__(self, model: ContinualClassifier, config: TrainConfig) -> None:
        super().__init__(model, config)
        # Factor gradients come plain from the backward and are rectified in one batched call before the step, except
        # for the one combination that needs the full-weight gradient, which only the backward sees.
        self.rectified_in_backward = config.rectify == "tangent" and config.estimator != "none"
        self.layers = inject(
            model.backbone,
            config.rank,
            scale=config.scale,
            rectify=config.rectify,
            rectify_in="backward" if self.rectified_in_backward else "step",
            damping=config.damping,
            share=config.share,
            balance=config.balance,
        )

    def trainable(self) -> list[nn.Parameter]:
        return [factor for layer in self.layers.values() for factor in (layer.A, layer.B)]

    def loss(self, images: Tensor, targets: Tensor) -> Step:
        features = self.model.features(images)
        logits = self.model.heads[-1](features)
        loss = F.cross_entropy(logits, targets) + self.penalty(features)
        return Step(loss, (logits.detach().argmax(-1) == targets).sum())

    def penalty(self, features: Tensor) -> Tensor | float:
        """What a method adds to the cross entropy, from the features [b, d]."""
        return 0.0

    def close_task(self, task: Task) -> TaskReport:
        report = TaskReport(factors=self._factors())
        for name, layer in self.layers.items():
            change = layer.merge()
            if layer.basis.shape[1]:
                report.violation[name] = violation(change, layer.basis)
        return report

    def _factors(self) -> dict[str, Tensor]:
        """Copies of the effective A [g, r, n], B [g, m, r] and the basis [n, k] in force, of every layer."""
        factors = {}
        for name, layer in self.layers.items():
            tensors = {"A": layer.effective_A(), "B": layer.B, "basis": layer.basis}
            factors |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in tensors.items()}
        return factors
