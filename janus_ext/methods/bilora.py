"""BiLoRA: almost orthogonal updates in the frequency domain (CVPR 2025).

Every task trains f real coefficients c at positions of the m x n frequency grid that no earlier task had, from 0:
    dW = s Re(IFFT2(F)), F = c at the positions and 0 elsewhere, for K and V of every block;  W <- W + dW at the end
No statistics, no memory. The published code draws each task's positions by itself, so that two tasks share f / (m n) of
them in expectation (0.5 % in ViT-B); here they share none until the grid is used up, and one set serves all matrices of
a task. A position and its mirror image still give the same real pattern, as there.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ext.adapter import Adapter
from janus_ext.backbone.freezing import freeze
from janus_ext.backbone.places import folded_qkv, places, replace
from janus_ext.errors import ArgumentError
from janus_ext.methods.base import Method, Task, TaskReport

if TYPE_CHECKING:
    from janus_ext.classifier import ContinualClassifier
    from janus_ext.config import TrainConfig


class BiLoRA(Method):
    """BiLoRA; ``frequencies`` is f, ``scale`` is s (300 as published)."""

    like = "bilora"

    def __init__(self, model: ContinualClassifier, config: TrainConfig) -> None:
        super().__init__(model, config)
        found = places(model.backbone, ("k", "v"))
        separate = [name for name, place in found.items() if not place.is_fused]
        if separate:
            raise ArgumentError(f"--method bilora must have K and V in one fused qkv, got {separate[0]} apart")
        freeze(model)
        self.layers: dict[str, SpectralQKV] = {}
        for name, place in found.items():
            self.layers[name] = SpectralQKV(folded_qkv(place.owner), config.frequencies, config.scale)
            replace(place, self.layers[name])

    def open_task(self, task: Task) -> None:
        for layer in self.layers.values():
            layer.place(positions(task.index, layer.grid, self.config.frequencies, task.seed))

    def trainable(self) -> list[nn.Parameter]:
        return [layer.coefficients for layer in self.layers.values()]

    def shrink_update(self, share: float) -> None:
        for layer in self.layers.values():
            layer.coefficients.mul_(share)

    def close_task(self, task: Task) -> TaskReport:
        report = TaskReport()
        for name, layer in self.layers.items():
            report.factors |= {f"{name}.{key}": tensor for key, tensor in layer.update().items()}
            layer.merge()
        return report


class SpectralQKV(Adapter):
    """A frozen fused qkv projection [3 m, n] with trained frequencies on its K and V slices."""

    def __init__(self, linear: nn.Linear, frequencies: int, scale: float) -> None:
        super().__init__()
        self.linear = linear
        self.scale = scale
        self.grid = (linear.out_features // 3, linear.in_features)
        if frequencies > self.grid[0] * self.grid[1]:
            raise ArgumentError(f"--frequencies must be at most m n = {self.grid[0] * self.grid[1]}, got {frequencies}")
        self.coefficients = nn.Parameter(torch.zeros(2, frequencies, device=linear.weight.device))
        self.register_buffer("positions", torch.arange(frequencies, device=linear.weight.device))

    def place(self, positions: Tensor) -> None:
        """Moves the coefficients to other positions (int64 [f], row by row of the grid), from 0."""
        self.positions.copy_(positions)
        self.coefficients.data.zero_()

    def delta(self) -> Tensor:
        """s Re(IFFT2(F)) for K and V, [2, m, n]."""
        m, n = self.grid
        spectrum = self.coefficients.new_zeros(2, m * n).index_copy(1, self.positions, self.coefficients)
        return self.scale * torch.fft.ifft2(spectrum.view(2, m, n)).real

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> [..., 3 m]."""
        m, n = self.grid
        weight = self.linear.weight + F.pad(self.delta().view(2 * m, n), (0, 0, m, 0))
        return F.linear(x, weight, self.linear.bias)

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + dW, added in float64 and rounded once; the coefficients are 0 again."""
        target = self.linear.weight[self.grid[0] :]
        target.copy_(target.double() + self.delta().double().view_as(target))
        self.coefficients.zero_()

    def update(self) -> dict[str, Tensor]:
        """Copies of the coefficients [2, f] and positions [f]."""
        return {"coefficients": self.coefficients.detach().clone(), "positions": self.positions.clone()}


def positions(task: int, grid: tuple[int, int], frequencies: int, seed: int) -> Tensor:
    """int64 [frequencies]: the positions of ``task`` on the grid, row by row; disjoint until the grid is used up."""
    size = grid[0] * grid[1]
    tasks_a_round = size // frequencies
    drawn = random.Random(f"{seed}/{task // tasks_a_round}").getrandbits(63)  # seeds may be any integers, torch's not
    generator = torch.Generator().manual_seed(drawn)
    order = torch.randperm(size, generator=generator)
    start = task % tasks_a_round * frequencies
    return order[start : start + frequencies]
