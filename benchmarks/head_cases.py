"""What heads cost: their fit at the size of DomainNet on a ViT-B, and their scores beside those of linear heads."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_ext.heads import HEADS
from janus_ext.heads.knowledge import Knowledge
from janus_ext.heads.ridge import STRENGTHS, ridge

DIM, CLASSES, TASKS, IMAGES = 768, 345, 5, 20
BATCH = 200  # images of a pass in evaluation
Sides = tuple[Callable[[], Any], Callable[[], Any]]


def known(device: str, dim: int = DIM, width: int | None = None) -> Knowledge:
    """What is known of so many classes of features drawn at random, `width` random ones made of them."""
    heads = nn.ModuleList(nn.Linear(dim, CLASSES // TASKS, device=device) for _ in range(TASKS))
    found = Knowledge(heads, dim, torch.device(device), width)
    labels = torch.arange(CLASSES, device=device).repeat_interleave(IMAGES)
    features = torch.randn(CLASSES, dim, device=device)[labels] + 3 * torch.randn(len(labels), dim, device=device)
    found.add(features, labels, 0)
    return found


def lda_fit(device: str, dim: int = DIM) -> Sides:
    """Against the formula as one writes it down, in NumPy: statistics to rows by the inverse of a covariance."""
    have = known(device, dim)
    statistics = have.statistics
    counts, sums, gram = (part.cpu().double().numpy() for part in (statistics.counts, statistics.sums, statistics.gram))

    def theirs() -> Tensor:
        means = sums / counts[:, None]
        S = (gram - (means * counts[:, None]).T @ means) / (counts.sum() - CLASSES)
        m, a = np.trace(S) / dim, (S**2).mean()
        rho = min(1.0, (a + m**2) / ((counts.sum() + 1) * (a - m**2 / dim)))
        inverse = np.linalg.inv((1 - rho) * S + rho * m * np.eye(dim))
        return torch.from_numpy((means - sums.sum(0) / counts.sum()) @ inverse)

    return lambda: HEADS["lda"](have).weight.double().cpu(), theirs


def ridge_fit(device: str, dim: int = DIM) -> Sides:
    """Against a solve in NumPy for each of the strengths that are compared; they agree on the one that is chosen."""
    X = torch.randn(CLASSES * IMAGES, dim, device=device, dtype=torch.float64)
    Y = F.one_hot(torch.arange(CLASSES, device=device).repeat_interleave(IMAGES)).double()
    G, Q, total, rows = X.mT @ X, X.mT @ Y, float(Y.square().sum()), len(X)
    g, q, scale = G.cpu().numpy(), Q.cpu().numpy(), float(G.trace()) / dim
    penalties = [strength * scale for strength in STRENGTHS]
    chosen = int(np.argmin([abs(penalty - ridge(G, Q, total, rows).penalty) for penalty in penalties]))

    def theirs() -> Tensor:
        return torch.from_numpy([np.linalg.solve(g + penalty * np.eye(dim), q) for penalty in penalties][chosen])

    return lambda: ridge(G, Q, total, rows).W.cpu(), theirs


def scores(device: str, width: int | None = None) -> Sides:
    """A batch's scores by lda against those of the tasks' linear heads; only their time is compared."""
    have, features = known(device, width=width), torch.randn(BATCH, DIM, device=device)
    decision = HEADS["lda"](have)

    def ours() -> None:
        decision.scores(features)

    @torch.no_grad()
    def theirs() -> None:
        torch.cat([head(features) for head in have.heads], dim=-1)

    return ours, theirs
