"""How well features tell the classes of their own images apart: what says whether a task has spoiled them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from janus_ext.errors import StatisticsError
from janus_ext.heads.lda import rule
from janus_ext.heads.statistics import FeatureStatistics

FOLDS = 5
DEVIATIONS = 2.0  # of chance, which does as much once in 40


def told_apart(features: Tensor, labels: Tensor) -> Tensor:
    """Which images `lda` gives their class where it is fitted without them, bool [n]: cross-validation, five folds.

    The k-th image of every class is in fold k modulo 5. Where a fold leaves no image to fit a rule to, or rounding
    hides the covariance, none of it is told apart.

    Args:
        features: [n, d], of any floating dtype.
        labels: [n], classes counted from 0.
    """
    right, folds = torch.zeros_like(labels, dtype=torch.bool), torch.zeros_like(labels)
    for c in labels.unique().tolist():
        members = (labels == c).nonzero().flatten()
        folds[members] = torch.arange(len(members), device=labels.device) % FOLDS
    for fold in folds.unique().tolist():
        left_out = folds == fold
        right[left_out] = _recognised(features, labels, left_out)
    return right


def _recognised(features: Tensor, labels: Tensor, left_out: Tensor) -> Tensor:
    """Of the images that are ``left_out`` those whose class the others tell."""
    statistics = FeatureStatistics(features.shape[1], features.device)
    statistics.observe(features[~left_out], labels[~left_out])
    wanted = labels[left_out]
    if not statistics.rows:
        return torch.zeros_like(wanted, dtype=torch.bool)
    try:
        weight, bias = rule(statistics)
    except StatisticsError:  # what the docstring says: no rule, hence none is told apart
        return torch.zeros_like(wanted, dtype=torch.bool)
    scores = features[left_out].double() @ weight.mT + bias
    return scores.masked_fill(~statistics.seen, -math.inf).argmax(1) == wanted


def is_worse(before: Tensor, after: Tensor) -> bool:
    """Whether fewer of the same images are right than before, by more than chance: McNemar's test, two deviations.

    Of b images that were right and no longer are, and c the other way round, b - c has the deviation sqrt(b + c) where
    nothing has changed.

    Args:
        before, after: bool [n], which are right.
    """
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    return lost - won > DEVIATIONS * math.sqrt(lost + won)
