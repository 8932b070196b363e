"""How sure a classifier is: the one temperature that makes its scores honest (Guo et al., ICML 2017)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ext.arguments import check_number
from janus_ext.errors import ArgumentError

COLDEST, HOTTEST = 1e-3, 1e3
GOLDEN = (math.sqrt(5) - 1) / 2


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """T > 0 for which softmax(logits / T) fits held-out ``labels`` best.

    Targets are smoothed by 1 / (N + 2) as Platt (1999) does: so the T of images that are all right is a number, too.
    The cross entropy is convex in 1 / T, so it falls to one minimum along log T, which golden sections find within
    [0.001, 1000].

    Args:
        logits: [N, C], any float dtype; -inf for classes that cannot be.
        labels: int64 [N], columns of it.

    Raises:
        ArgumentError: there is no image, or one of a class that cannot be.
    """
    if not len(labels):
        raise ArgumentError("labels must be of one image at least, got none")
    logits = logits.double()
    possible = torch.isfinite(logits)
    if not bool(possible.gather(1, labels[:, None]).all()):
        raise ArgumentError("images must be of classes with finite scores, got one without: leave it out")
    smoothing = 1 / (len(labels) + 2)
    uniform = possible / possible.sum(1, keepdim=True)
    targets = smoothing * uniform + (1 - smoothing) * F.one_hot(labels, logits.shape[1])

    def loss(log_temperature: float) -> float:
        likelihoods = torch.log_softmax(logits / math.exp(log_temperature), 1).where(possible, 0.0)
        return -float((targets * likelihoods).sum(1).mean())

    low, high = math.log(COLDEST), math.log(HOTTEST)
    inner = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    values = [loss(x) for x in inner]
    while high - low > 1e-6:
        if values[0] <= values[1]:
            high, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = high - GOLDEN * (high - low)
            values[0] = loss(inner[0])
        else:
            low, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = low + GOLDEN * (high - low)
            values[1] = loss(inner[1])
    return math.exp((low + high) / 2)


def checked_temperature(temperature: float) -> float:
    """``temperature`` if it is one, as a float: torch divides by no larger integer than int64."""
    check_number("temperature", temperature, lambda T: 0 < T < math.inf, "positive and finite")
    return float(temperature)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / T) over the last dimension, float64: no order is lost to rounding where it can be told."""
    return torch.softmax(logits.double() / temperature, dim=-1)
