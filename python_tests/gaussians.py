"""Features of Gaussian classes that share a covariance, and what is known of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from janus_ext.heads.expansion import Expansion
from janus_ext.heads.knowledge import Knowledge

SEED = 7  # of what a head draws


def gaussians(counts: list[int], dim: int, distance: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float32 features [sum n_c, dim] in random order, and labels; another seed draws others of the same classes."""
    world = torch.Generator().manual_seed(99)
    means = distance * torch.randn(len(counts), dim, generator=world, dtype=torch.float64)
    root = torch.randn(dim, dim, generator=world, dtype=torch.float64) / dim**0.5
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    generator = torch.Generator().manual_seed(seed)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    noise = torch.randn(len(labels), dim, generator=generator, dtype=torch.float64)
    return (0.5 + means[labels] + noise @ (root + 0.3 * torch.eye(dim))).float(), labels


def known_of(
    features: Tensor, labels: Tensor, sizes: list[int], width: int | None = None, head: str = "ridge"
) -> Knowledge:
    """What is known after tasks of so many classes each: linear heads as torch makes them, and the features.

    With a width ``head`` works on random features.
    """
    dim, ends = features.shape[1], torch.tensor(sizes).cumsum(0)
    known = Knowledge(nn.ModuleList(), dim, features.device, width, head)
    tasks = torch.bucketize(labels, ends.to(labels), right=True)
    for task, size in enumerate(sizes):
        known.heads.append(nn.Linear(dim, size, device=features.device))
        known.add(features[tasks == task], labels[tasks == task], SEED)
    return known


def expanded(expansion: Expansion | None, features: Tensor) -> Tensor:
    """What lda and ridge see of features [n, d]: themselves, or 10 g and relu(g P), g = (f - mean) R; float64."""
    f = features.double()
    if expansion is None:
        return f
    mean, root, P = (tensor.double() for tensor in expansion)
    g = (f - mean) @ root
    return torch.cat([10 * g, (g @ P).clamp_min(0)], 1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """float64 [n, classes]."""
    return nn.functional.one_hot(labels, classes).double()
