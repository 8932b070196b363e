"""How far a task has moved features, and the map that moves the statistics of old classes along."""

from __future__ import annotations

import torch
from torch import Tensor

from janus_ext.heads.ridge import ridge


def movement(before: Tensor, after: Tensor, S: Tensor) -> float:
    """Root mean square of what the same images' features [n, d] have moved, in standard deviations within classes.

    sqrt(mean of (f1 - f0)^T S^-1 (f1 - f0) / d), S [d, d] float64 a covariance within classes: it does not depend on
    the scale of features, nor on an offset that they share, and says by how much a Gaussian rule is out of date.
    """
    D = after.double() - before.double()
    return float((D * torch.linalg.solve(S, D.mT).mT).mean().sqrt())


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
