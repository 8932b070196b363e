"""What processes that train one learner exchange beside statistics and features: gradients, and what they agree on.

Replicas of torch's DistributedDataParallel would do, too, but wrap one forward pass of one module; here heads come and
go, methods call parts of the model, and all gradients of a step are a few megabytes: one transfer behind the backward.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from janus_ext import processes

if TYPE_CHECKING:
    from janus_ext.training.loop import Learner

LOG = logging.getLogger("janus_ext")


@torch.no_grad()
def add_up_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Makes every gradient the sum of all processes' own; none of a process counts as zeros, none in all as none."""
    if processes.count() == 1:
        return
    given = [p.grad is not None for p in parameters]
    gradients = [p.grad if there else torch.zeros_like(p) for p, there in zip(parameters, given, strict=True)]
    marks = gradients[0].new_ones(len(given)) if all(given) else gradients[0].new_tensor(given)
    *summed, marks = processes.add_up(torch.cat([g.flatten() for g in (*gradients, marks)])).split(
        [*(g.numel() for g in gradients), len(given)]
    )
    of_others = given if all(given) else (marks > 0).tolist()  # reads the device only where something is missing
    for p, gradient, there in zip(parameters, summed, of_others, strict=True):
        p.grad = gradient.view_as(p) if there else None


def require_alike(learner: Learner, **values: Any) -> None:
    """ArgumentError, in all processes, unless their learners are the same and are about to do the same."""
    if processes.count() == 1:
        return
    own = {"seed": learner.seed, "planned_tasks": learner.planned, "classes a task": learner.sizes}
    own["the network's weights"] = _digest(learner.model.state_dict())
    processes.require_same(own | values | learner.config.to_json(), but="device")


def align(learner: Learner, with_method: bool) -> None:
    """Lets all processes go on with what the first one has, where theirs is not the same to the bit.

    It is, on processors of one kind. On others products and eigenvectors differ in their last places, and in signs.
    ``with_method``: also what the method keeps from task to task; within one it may hold sums that are a process's own.
    """
    if processes.count() == 1:
        return
    model, method = learner.moving()
    method = method if with_method else {}
    if len(set(processes.gathered((_digest(model), _digest(method))))) == 1:
        return
    LOG.warning("the processes computed other bits from the same numbers: all go on with those of the first")
    model, method = processes.first_says((_on_cpu(model), _on_cpu(method)))
    learner.model.load_state_dict(learner.model.state_dict() | model)
    if with_method:
        learner.method.load_state_dict(method)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
