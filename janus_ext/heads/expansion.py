"""Random ReLU features beside the features themselves (``--head-width``): a linear rule of both has curved borders.

After RanPAC (McDonnell et al., NeurIPS 2023), whose features are relu(P^T f) alone. Two things are ours. Features
are whitened first, by the first task's covariance within classes: else all random directions see those few in which
features vary most. And they stand beside the random ones with ten times the weight, so that a penalty or a shrunk
covariance takes the curved part for the smaller one, which matters where images are few. A first task of one image a
class says nothing of a covariance: its mean is all that changes features then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ext.arguments import check_floats, check_state
from janus_ext.errors import ArgumentError
from janus_ext.heads.statistics import FeatureStatistics, factor_of

OWN_WEIGHT = 10.0  # of the features themselves


class Expansion(NamedTuple):
    """Features f [b, d] -> [b, d + M]: 10 g and relu(g P) side by side, with g = (f - mean) R."""

    mean: Tensor
    """[d], of the first task's features."""
    root: Tensor
    """R [d, d]: R R^T is the inverse of their covariance within classes, shrunk."""
    projection: Tensor
    """P [d, M], Gaussian of variance 1 / d."""

    @classmethod
    def of(cls, statistics: FeatureStatistics, width: int, seed: int) -> Expansion:
        """float32, from what is known of the first task; P is drawn from the seed alone."""
        d, gram = statistics.dim, statistics.gram
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(d, width, generator=generator) / d**0.5
        identity = torch.eye(d, dtype=gram.dtype, device=gram.device)
        root = torch.linalg.solve_triangular(factor_of(statistics.spread()), identity, upper=False).mT
        mean = statistics.sums.sum(0) / statistics.rows
        return cls(mean.float(), root.float().contiguous(), projection.to(gram.device))

    @classmethod
    def loaded(cls, state: Mapping[str, Tensor], statistics: FeatureStatistics, dim: int) -> Expansion:
        """From its tensors by name, to ``dim`` features; ArgumentError where they are others."""
        check_state("Expansion: state", state, cls._fields)
        d = statistics.dim
        for name, shape in (("mean", [d]), ("root", [d, d]), ("projection", [d, dim - d])):
            check_floats(f"Expansion: {name}", state[name], shape)
            if not bool(state[name].isfinite().all()):
                raise ArgumentError(f"Expansion: {name} must be finite, got NaN or infinity")
        return cls(*(state[name].to(statistics.gram.device, torch.float32, copy=True) for name in cls._fields))

    def __call__(self, features: Tensor) -> Tensor:
        g = (features - self.mean) @ self.root
        return torch.cat([OWN_WEIGHT * g, F.relu(g @ self.projection)], dim=-1)
