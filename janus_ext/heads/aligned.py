"""``aligned``: the linear heads trained once more, on Gaussian samples of all classes (classifier alignment).

After SLCA (Zhang et al., ICCV 2023), as InfLoRA's repository takes it over, but with one covariance for all classes
(their own would need d^2 numbers a class), without a normalisation of the logits, and after every task from the heads
as the tasks have left them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ext.heads import linear
from janus_ext.heads.base import Decision
from janus_ext.heads.knowledge import Knowledge
from janus_ext.heads.statistics import factor_of

SAMPLES = 256  # of each class and epoch, and of a batch
EPOCHS = 5
RATE, MOMENTUM = 0.01, 0.9
RIDGE = 1e-4  # added to the covariance's diagonal


def fit(known: Knowledge) -> Decision:
    """SGD with a cosine on cross entropy over all classes, from the linear heads on.

    Means are scaled by 0.9 + 0.1 (t + 1) / T in task t of T so far: the older, the nearer to 0.
    """
    known.require("aligned")
    statistics = known.statistics
    parameters = [part.cpu().requires_grad_() for part in linear.rows(known)]
    optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    means = (known.ages()[:, None] * statistics.means().cpu()).float()
    S = statistics.covariance().cpu()
    root = factor_of(S + RIDGE * torch.eye(len(S), dtype=S.dtype)).float()
    seen = statistics.seen.nonzero().flatten().cpu()
    generator = torch.Generator().manual_seed(known.seed)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            for labels in _batches(seen, generator):
                samples = means[labels] + torch.randn(len(labels), len(root), generator=generator) @ root.mT
                optimizer.zero_grad()
                F.cross_entropy(F.linear(samples, *parameters), labels).backward()
                optimizer.step()
            schedule.step()
    weight, bias = (part.detach().to(statistics.gram.device) for part in parameters)
    return Decision.of(weight, bias, statistics.seen)


def _batches(classes: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """int64 batches of labels in random order: every class as often as the others."""
    labels = classes.repeat(SAMPLES)
    return labels[torch.randperm(len(labels), generator=generator)].split(SAMPLES)
