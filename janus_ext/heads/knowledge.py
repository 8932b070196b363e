"""What is known of the classes learned so far, and kept in place of their images."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ext.heads.statistics import FeatureStatistics
from janus_ext.margin import ClassPrototypes
from janus_ext.named_tensors import below, prefixed


class Knowledge:
    """Linear heads, prototypes and statistics of all classes: what heads are fitted to.

    Attributes:
        heads: the model's linear heads, one a task.
        prototypes: unit mean features.
        statistics: of the features.
        expanded: of ``width`` random ReLU features relu(f / |f| P), None without a width.
        projection: P [d, width], drawn once from the seed; None without a width.
        seed: of what a head draws.
    """

    def __init__(self, heads: nn.ModuleList, dim: int, device: torch.device, width: int | None = None) -> None:
        self.heads = heads
        self.prototypes = ClassPrototypes(dim, device)
        self.statistics = FeatureStatistics(dim, device)
        self.expanded = FeatureStatistics(width, device) if width else None
        self.projection: Tensor | None = None
        self.seed = 0

    @property
    def sizes(self) -> list[int]:
        """Number of classes of each task."""
        return [head.out_features for head in self.heads]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return sum(self.sizes)

    @property
    def is_complete(self) -> bool:
        """Whether the statistics have seen all that there is: every class with a prototype, and some of each task."""
        seen = self.statistics.seen.nonzero().flatten().tolist()
        ends = list(itertools.accumulate(self.sizes))
        of_tasks = {bisect.bisect_right(ends, c) for c in seen}
        return bool(seen) and seen == sorted(self.prototypes.classes) and len(of_tasks) == len(ends)

    def ages(self) -> Tensor:
        """0.9 + 0.1 (t + 1) / T, float64 [C]: by how much classifier alignment scales the means of task t of T."""
        shares = [0.9 + 0.1 * (t + 1) / len(self.sizes) for t in range(len(self.sizes))]
        return torch.tensor(shares, dtype=torch.float64).repeat_interleave(torch.tensor(self.sizes))

    def add(self, features: Tensor, labels: Tensor, seed: int) -> None:
        """Takes up the features [n, d] of new classes."""
        self.seed = seed
        self.prototypes.add(features, labels)
        self.statistics.observe(features, labels)
        if self.expanded is not None:
            if self.projection is None:
                generator = torch.Generator().manual_seed(seed)
                self.projection = torch.randn(features.shape[1], self.expanded.dim, generator=generator).to(features)
            self.expanded.observe(F.relu(F.normalize(features, dim=-1) @ self.projection), labels)

    def move(self, matrix: Tensor) -> None:
        """Replaces every feature f of old classes by f R, R [d, d]."""
        self.prototypes.transform(matrix)
        self.statistics.transform(matrix)

    def state_dict(self) -> dict[str, Tensor]:
        """Named tensors of all but the linear heads, which are the model's."""
        state = prefixed("prototypes", self.prototypes.state_dict())
        state |= prefixed("statistics", self.statistics.state_dict())
        if self.expanded is not None and self.projection is not None:
            state |= prefixed("expanded", self.expanded.state_dict()) | {"projection": self.projection}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` gave; of runs before there were statistics, what they have."""
        self.prototypes.load_state_dict(below("prototypes", state))
        for name, statistics in (("statistics", self.statistics), ("expanded", self.expanded)):
            stored = below(name, state)
            if statistics is not None and stored:
                statistics.load_state_dict(stored)
        if self.expanded is not None and "projection" in state:
            self.projection = state["projection"].to(self.prototypes.matrix)
