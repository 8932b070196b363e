"""LoRA-DRS, or LoRA minus: training in a drift-resistant space (CVPR 2025).

For every task after the first:
    a pass over its images through W0 - sum of the old updates, which are subtracted instead of added, gives H
    U <- leading eigenvectors of H that hold a share of its trace (0.99): the drift-resistant space, P = U U^T
train A, B and the head on CE(current task) + weight * triplet loss;  A's update of every step <- itself times P
W <- W + s B A;  classify by the nearest class mean

The published code also divides P by its norm and multiplies B's update by P from the left, which mixes the spaces of
inputs and outputs: both are left out. A starts Kaiming uniform, B sparse and random, as published.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ext.methods.base import Task, TaskReport
from janus_ext.methods.lora import SequentialLoRA
from janus_ext.methods.protected import energy
from janus_ext.named_tensors import below, prefixed

if TYPE_CHECKING:
    from janus_ext.classifier import ContinualClassifier
    from janus_ext.config import TrainConfig

SPARSITY = 0.9  # of B at the start of a task; its other entries have deviation 0.01


class LoRADRS(SequentialLoRA):
    """LoRA-DRS; a layer's basis is the complement of its drift-resistant space, so rectification can be plugged in.

    ``energy_start`` and ``energy_end`` are the share of the trace that the space holds.
    """

    like = "lora-drs"

    def __init__(self, model: ContinualClassifier, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.pretrained = {name: torch.stack(layer.target_weights()) for name, layer in self.layers.items()}
        self.start: dict[str, Tensor] = {}

    def open_task(self, task: Task) -> None:
        if task.index:
            for name, basis in self._outside_drift_resistant_space(task).items():
                self.layers[name].protect(basis)
        for layer in self.layers.values():
            for B in layer.B.data.view(-1, *layer.B.shape[-2:]):
                B.copy_(nn.init.sparse_(torch.empty(B.shape, dtype=B.dtype, device="cpu"), SPARSITY))  # as A is drawn
        # "exact" starts with A V = 0, up to a rounding that other processors do otherwise
        parts = {name: (layer.A.detach(), layer.rectification.rectify) for name, layer in self.layers.items()}
        self.start = {name: torch.zeros_like(A) if how == "exact" else A.clone() for name, (A, how) in parts.items()}

    def penalty(self, features: Tensor, targets: Tensor) -> Tensor | float:
        if self.config.margin_weight == 0:
            return 0.0
        return self.config.margin_weight * triplet_loss(features, targets, self.prototypes.matrix, self.config.margin)

    @torch.no_grad()
    def after_step(self) -> None:
        for name, layer in self.layers.items():
            if layer.basis.shape[1]:
                outside = ((layer.A - self.start[name]) @ layer.basis) @ layer.basis.mT
                layer.A.sub_(outside)

    def close_task(self, task: Task) -> TaskReport:
        report = super().close_task(task)  # the space is that of the task: the next one finds its own
        report.basis_rank = {name: layer.basis.shape[1] for name, layer in self.layers.items()}
        return report

    def _outside_drift_resistant_space(self, task: Task) -> dict[str, Tensor]:
        """Per layer a basis [n, n - k] of what updates have to leave alone."""
        with self._old_updates_subtracted():
            moments = self.second_moments(task)
        share = energy(self.config, task)
        bases = {name: trailing(H, share, self.layers[name].rank) for name, H in moments.items()}
        return {name: bases[source] for name, source in self.layers.inputs.items()}

    @contextmanager
    def _old_updates_subtracted(self) -> Iterator[None]:
        """Within it the layers compute with W0 - (W - W0) in place of W."""
        merged = {name: torch.stack(layer.target_weights()) for name, layer in self.layers.items()}
        self._set({name: 2 * self.pretrained[name] - weight for name, weight in merged.items()})
        try:
            yield
        finally:
            self._set(merged)

    def _set(self, weights: dict[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            for target, weight in zip(layer.target_weights(), weights[name], strict=True):
                target.copy_(weight)

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | prefixed("pretrained", self.pretrained)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        stored = below("pretrained", state)
        self.pretrained = {name: stored[name].to(weight, copy=True) for name, weight in self.pretrained.items()}


def trailing(H: Tensor, share: float, rank: int) -> Tensor:
    """Eigenvectors [n, n - k] of H [n, n] behind the k leading ones that hold ``share`` of its trace.

    k is at least ``rank``, that of the factors: they need room in the space that they are kept in.
    """
    values, vectors = torch.linalg.eigh(H)
    values, vectors = values.flip(0).clamp_min(0).cpu(), vectors.flip(1)  # a GPU's cumsum is not repeatable
    below_share = int((values.cumsum(0) < share * values.sum()).sum())
    return vectors[:, max(below_share + 1, rank) :]


def triplet_loss(features: Tensor, targets: Tensor, prototypes: Tensor, margin: float) -> Tensor:
    """mean max(0, d(f, p) - d(f, n) + margin) over unit features f [b, d], d the Euclidean distance.

    p is the farthest feature of the same class in the batch, n the nearest of another class or the nearest of the old
    prototypes [C, d]; a feature without any n adds nothing.
    """
    f = F.normalize(features, dim=1)
    same = targets[:, None] == targets[None]
    near = distances(f, f)
    positive = near.masked_fill(~same, 0).amax(1)
    others = torch.cat([near.masked_fill(same, float("inf")), distances(f, prototypes)], 1)
    return F.relu(positive - others.amin(1) + margin).mean()


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances [N, C] of the rows of a [N, d] and b [C, d], exactly 0 without gradient where they coincide.

    From differences: products, which are faster, would leave 4e-4 of float32's rounding between equal unit vectors.
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
