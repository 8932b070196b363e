"""``lda``: linear discriminant analysis, the best linear rule for Gaussian classes that share a covariance.

The covariance is shrunk towards a multiple of I (see `shrunk`), which needs no parameter. It works on the features, or
with a width on their `Expansion`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from janus_ext.heads.base import Decision
from janus_ext.heads.knowledge import Knowledge
from janus_ext.heads.statistics import FeatureStatistics, factor_of


def fit(known: Knowledge) -> Decision:
    """Score of class c: m_c^T S^-1 f - m_c^T S^-1 (mu_c + mu) / 2, m_c = mu_c - mu, S the shrunk covariance.

    That is the log posterior for equal priors, but for what all classes share: without mu, the mean of all features,
    float32 would lose the differences between classes in an offset of all features.
    """
    known.require("lda")
    statistics, expansion = known.seen_by("lda")
    return Decision.of(*rule(statistics), statistics.seen, expansion=expansion)


def rule(statistics: FeatureStatistics) -> tuple[Tensor, Tensor]:
    """Weight [C, d] and bias [C] of these scores, float64; what stands for a class without images means nothing."""
    means, mean = statistics.means(), statistics.sums.sum(0) / statistics.rows
    weight = torch.cholesky_solve((means - mean).mT, factor_of(statistics.spread())).mT
    return weight, -(weight * (means + mean)).sum(1) / 2
