"""What processes that train one learner exchange beside statistics and features: gradients, and what they agree on.

Replicas of torch's DistributedDataParallel would do, too, but wrap one forward pass of one module; here heads come and
go, methods call parts of the model, and all gradients of a step are a few megabytes: one transfer behind the backward.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from janus_ext import processes

if TYPE_CHECKING:
    from janus_ext.training.loop import Learner

LOG = logging.getLogger("janus_ext")


@torch.no_grad()
def add_up_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Makes every gradient the sum of all processes' own; none counts as zeros, where one had no image to compute."""
    if processes.count() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    summed = processes.add_up(torch.cat([g.flatten() for g in gradients]))
    for p, gradient in zip(parameters, summed.split([g.numel() for g in gradients]), strict=True):
        p.grad = gradient.view_as(p)


def align(learner: Learner) -> None:
    """Lets all processes go on with what the first one has, where theirs is not the same to the bit.

    It is, on processors of one kind. On others products and eigenvectors differ in their last places, and in signs.
    """
    if processes.count() == 1:
        return
    model, method = learner.moving()
    if len(set(processes.gathered((_digest(model), _digest(method))))) == 1:
        return
    LOG.warning("the processes computed other bits from the same numbers: all go on with those of the first")
    model, method = processes.first_says((_on_cpu(model), _on_cpu(method)))
    learner.restore(learner.sizes, learner.model.state_dict() | model, method)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
