"""The optimizer of a task, and its learning rates from epoch to epoch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from janus_ext.config import TrainConfig

SLOTS = {  # what an optimizer keeps of a parameter that it has moved: tensors like it, but for the scalar "step"
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.SGD: {"momentum_buffer"},
}
NOT_NEGATIVE = {"step", "exp_avg_sq"}  # of these


def schedule(config: TrainConfig, epoch: int) -> float:
    """Share of the peak learning rates in ``epoch``: half a cosine or a quarter, a tenth per milestone, or 1.

    The quarter is that of CODA-Prompt's class CosineSchedule, which InfLoRA uses, as it runs: K epochs would go to 99 %
    of the quarter, but its counter starts one behind, so the first two stand at the peak and the last stops short.
    """
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    if config.schedule == "quarter":
        return math.cos(99 * math.pi * max(0, epoch - 1) / (200 * max(1, config.epochs - 1)))
    return 0.1 ** sum(epoch >= milestone for milestone in config.milestones or ())


def make_optimizer(config: TrainConfig, factors: list[nn.Parameter], head: list[nn.Parameter]) -> torch.optim.Optimizer:
    """A fresh optimizer over the method's parameters and the newest head; each group's "peak" is its learning rate."""
    groups = [
        {"params": factors, "lr": config.lr, "peak": config.lr},
        {"params": head, "lr": config.head_lr, "peak": config.head_lr},
    ]
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adam": lambda: torch.optim.Adam(groups, fused=True),
        "adamw": lambda: torch.optim.AdamW(groups, fused=True),
        # fused, and its first step left out by the gradient scaler, it would start from momenta that nobody has set
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9, fused=config.amp != "fp16"),
    }
    return makers[config.optimizer]()
