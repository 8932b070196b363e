"""``ridge``: ridge regression of one-hot targets, its strength by generalised cross-validation.

On the features, or with a width on their `Expansion`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from janus_ext.heads.base import Decision
from janus_ext.heads.knowledge import Knowledge

STRENGTHS = torch.logspace(-5, 2, 20, dtype=torch.float64).tolist()  # of lambda, relative to the mean eigenvalue


class Ridge(NamedTuple):
    """argmin_W |Y - X W|^2 + lambda |W|^2, as `ridge` finds it."""

    W: Tensor
    """[d, C] float64."""
    penalty: float
    """lambda."""
    variance: float
    """RSS / ((N - degrees of freedom) C), of what is left of one target."""
    score: float
    """RSS / (N - degrees of freedom)^2, what cross-validation compares."""


def fit(known: Knowledge) -> Decision:
    """Regression of centred targets on centred features.

    Targets that scatter around the regression with the same variance v in all directions have the class probabilities
    softmax(y / v): scores are y / v. There are C - 1 directions, since targets add up to 1.
    """
    known.require("ridge")
    statistics, expansion = known.seen_by("ridge")
    counts, rows = statistics.counts.double(), max(1, statistics.rows)
    mean, share = statistics.sums.sum(0) / rows, counts / rows
    G = statistics.gram - rows * torch.outer(mean, mean)
    Q = statistics.sums.mT - torch.outer(mean, counts)
    found = ridge(G, Q, float(rows - (counts * share).sum()), rows, spent=1)
    variance = found.variance * len(counts) / max(1, int(statistics.seen.sum()) - 1)
    sharpness = 1 / variance if variance > 0 else 1.0
    weight, bias = found.W.mT, share - mean @ found.W
    return Decision.of(sharpness * weight, sharpness * bias, statistics.seen, expansion=expansion)


def ridge(G: Tensor, Q: Tensor, total: float, rows: int, spent: int = 0) -> Ridge:
    """Ridge regression from second moments alone, for the lambda that generalised cross-validation likes best.

    GCV(lambda) = RSS / (N - sum_i s_i / (s_i + lambda))^2 (Golub, Heath & Wahba, 1979), s the eigenvalues of G. At most
    N of them are not 0, and lambda is tried relative to the mean of so many.

    Args:
        G: X^T X [d, d] float64.
        Q: X^T Y [d, C] float64.
        total: |Y|^2.
        rows: N, of X and Y.
        spent: degrees of freedom that went into their means.
    """
    s, U = torch.linalg.eigh(G)
    s = torch.where(s > torch.finfo(s.dtype).eps * len(s) * s[-1], s, 0.0)  # the rest is rounding
    Z = U.mT @ Q
    z = torch.where(s > 0, Z.square().sum(1) / s, 0.0)  # of |Y|^2 what each eigenvector explains
    unexplained = max(0.0, total - float(z.sum()))
    mean = float(s.sum()) / max(1, min(rows, len(s)))
    tried = []
    for strength in STRENGTHS:
        penalty = strength * mean or 1.0  # no feature varies: any
        rss = unexplained + float((z * (penalty / (s + penalty)).square()).sum())
        left = max(1e-9, rows - spent - float((s / (s + penalty)).sum()))
        tried.append((rss / left**2, penalty, rss / left))
    score, penalty, variance = min(tried)
    return Ridge(U @ (Z / (s + penalty)[:, None]), penalty, variance / Q.shape[1], score)
