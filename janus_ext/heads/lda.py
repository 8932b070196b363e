"""``lda``: linear discriminant analysis, the best linear rule for Gaussian classes that share a covariance.

The covariance is shrunk towards a multiple of I by OAS (Chen, Wiesel, Eldar & Hero, IEEE Trans. Signal Processing 58,
2010, equation 23), which needs no parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from janus_ext.heads.base import Decision
from janus_ext.heads.knowledge import Knowledge

NOTHING = 1e-12  # of the features' energy: a scatter within classes below it is rounding


def fit(known: Knowledge) -> Decision:
    """Score of class c: mu_c^T S^-1 f - mu_c^T S^-1 mu_c / 2, the log posterior for equal priors, S the shrunk one."""
    known.require_statistics("lda")
    statistics = known.statistics
    means = statistics.means()
    S = shrunk(statistics.covariance(), statistics.rows, NOTHING * float(statistics.gram.trace()))
    weight = torch.cholesky_solve(means.mT, torch.linalg.cholesky(S)).mT
    return Decision.of(weight, -(weight * means).sum(1) / 2, statistics.seen)


def shrunk(S: Tensor, rows: int, least: float = 0.0) -> Tensor:
    """(1 - rho) S + rho m I, m the mean of the diagonal; I where the trace is at most ``least``.

    Args:
        S: [d, d] float64, a sample covariance.
        rows: of how many samples.
    """
    d = len(S)
    m, a = float(S.trace()) / d, float(S.square().mean())
    identity = torch.eye(d, dtype=S.dtype, device=S.device)
    if m * d <= least:  # one image a class, or the same ones: no direction is worth more than another
        return identity
    spread = (rows + 1) * (a - m * m / d)
    rho = min(1.0, (a + m * m) / spread) if spread > 0 else 1.0
    return (1 - rho) * S + rho * m * identity
