"""InfLoRA: interference-free low-rank adaptation (Liang & Li, CVPR 2024).

For every task:
    a pass over its images gives H = sum x x^T of each layer's inputs, H~ = the part of it in the free space (DualGPM)
    A <- the r leading left singular vectors of H~, transposed, times 1/sqrt(3); frozen, shared by what shares its input
    train B from 0, and the head
    a second pass gives H once more; W <- W + s B A;  DualGPM (or plain GPM) takes H up
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from janus_ext.errors import warn
from janus_ext.methods.base import Task, TaskReport
from janus_ext.methods.dual_gpm import DualGPM
from janus_ext.methods.lora import SequentialLoRA
from janus_ext.methods.protected import energy
from janus_ext.named_tensors import load_states, states

if TYPE_CHECKING:
    from janus_ext.classifier import ContinualClassifier
    from janus_ext.config import TrainConfig


class InfLoRA(SequentialLoRA):
    """InfLoRA; energy_start and energy_end are the thresholds of DualGPM."""

    like = "inflora"

    def __init__(self, model: ContinualClassifier, config: TrainConfig) -> None:
        super().__init__(model, config)
        dual = config.gpm == "dual"
        self.memories = {
            name: DualGPM(layer.in_features, layer.A.device, dual)
            for name, layer in self.layers.items()
            if name in self.layers.inputs.values()
        }
        for layer in self.layers.values():
            layer.A.requires_grad_(False)

    def trainable(self) -> list[nn.Parameter]:
        return [layer.B for layer in self.layers.values()]

    def open_task(self, task: Task) -> None:
        directions = {}
        for name, H in self.second_moments(task).items():
            self._warn_of_little_room(name)
            directions[name] = torch.linalg.svd(self.memories[name].free(H)).U
        for name, source in self.layers.inputs.items():
            layer = self.layers[name]
            layer.A.copy_(directions[source][:, : layer.rank].mT / math.sqrt(3))

    def close_task(self, task: Task) -> TaskReport:
        moments = self.second_moments(task)
        report = super().close_task(task)
        for name, H in moments.items():
            self.memories[name].update(H, energy(self.config, task))
        report.basis_rank = {name: self.memories[source].rank for name, source in self.layers.inputs.items()}
        return report

    @property
    def remembers(self) -> bool:
        return True

    def observe(self, task: Task) -> None:
        for name, H in self.second_moments(task).items():
            self.memories[name].update(H, energy(self.config, task))

    def guarded(self, name: str) -> Tensor:
        return self.memories[self.layers.inputs[name]].protected()

    def _warn_of_little_room(self, name: str) -> None:
        """What A has more rows than the free space has dimensions is arbitrary, as in the authors' code."""
        layer = self.layers[name]
        free = layer.in_features - self.memories[name].rank
        if free < layer.rank:
            warn(
                f"{name}: the old inputs leave {free} dimensions free, fewer than the rank {layer.rank}: InfLoRA "
                "interferes from now on; lower --energy-end"
            )

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | states("memories", self.memories)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        load_states("memories", self.memories, state)
