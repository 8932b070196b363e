"""How far a task has moved features, and the map that moves the statistics of old classes along."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from janus_ext.heads.ridge import ridge


def movement(before: Tensor, after: Tensor, S: Tensor) -> float:
    """Root mean square of what the same images' features [n, d] have moved, in standard deviations within classes.

    sqrt(mean of (f1 - f0)^T S^-1 (f1 - f0) / d), S [d, d] float64 a covariance within classes: it does not depend on
    the scale of features, nor on an offset that they share, and says by how much a Gaussian rule is out of date.
    Infinite where rounding has left no covariance: then no movement is known to be small.
    """
    L, info = torch.linalg.cholesky_ex(S)
    if int(info):
        return math.inf
    D = after.double() - before.double()
    return float(torch.linalg.solve_triangular(L, D.mT, upper=False).square().mean().sqrt())


LEAST = 1e-9  # of an update that is tried: smaller factors would lose their digits, and not come back when it grows
FURTHEST = 1 / 256  # of the share before: where movement hardly falls with it, no line says how far to go
STUBBORN = 3  # measurements in a row on one side of the budget: along a curve that flattens, lines fall short for ever


class ShareSearch:
    """The share of an update that moves features by ``budget``, from a few measurements (share, movement).

    Movement is nearly a power of the share (of a small update: the first), so that a straight line through the last two
    points in logarithms finds it at once; where that leads out of what is known, or stays on one side of the budget,
    the middle does.

    Attributes:
        below: the largest share so far that keeps within the budget, and its movement; (0, 0) at first.
        above: the smallest that does not.
    """

    def __init__(self, budget: float, moved: float) -> None:
        self.budget = budget
        self.below = (0.0, 0.0)
        self.above = (1.0, moved)
        self.power = 1.0
        self._sides: list[bool] = []

    def next_share(self) -> float:
        """What to try next: between the two."""
        (low, _), (high, moved) = self.below, self.above
        if not self.budget:
            return 0.0
        guess = max(high * (self.budget / moved) ** (1 / self.power), FURTHEST * high)
        middle = math.sqrt(low * high) if low else high / 2
        stubborn = len(self._sides) >= STUBBORN and len(set(self._sides[-STUBBORN:])) == 1
        share = guess if low < guess < high and not stubborn else middle
        return share if share >= LEAST else 0.0

    def add(self, share: float, moved: float) -> None:
        """Takes up what a share has moved."""
        b, high = self.above
        if 0 < moved != high < math.inf and share != b:
            self.power = min(8.0, max(0.125, math.log(high / moved) / math.log(b / share)))
        self._sides.append(moved <= self.budget)
        if self._sides[-1]:
            self.below = (share, moved)
        else:
            self.above = (share, moved)


def drift_map(before: Tensor, after: Tensor) -> Tensor:
    """R = argmin |F0 R - F1|^2 + lambda |R - I|^2, [d, d] float64, from the same images' features [n, d].

    R = I + E, and E is the ridge regression of F1 - F0 on F0; lambda is chosen by cross-validation, and E = 0 where
    that predicts better than any.
    """
    F0, D = before.double(), after.double() - before.double()
    total, rows = float(D.square().sum()), len(F0)
    found = ridge(F0.mT @ F0, F0.mT @ D, total, rows)
    identity = torch.eye(F0.shape[1], dtype=F0.dtype, device=F0.device)
    return identity + found.W if found.score < total / rows**2 else identity
