"""A head that is somebody else's function: what it gives is checked, and becomes a `Decision`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from janus_ext.arguments import naming
from janus_ext.errors import ArgumentError
from janus_ext.heads.base import Decision
from janus_ext.heads.knowledge import Knowledge

OwnHead = Callable[[Knowledge], tuple[Tensor, Tensor]]
"""Weight [C, d] and bias [C] of what is known of C classes: scores of features f [b, d] are f W^T + bias. Pure."""


@torch.no_grad()
def fit(name: str, function: OwnHead, known: Knowledge) -> Decision:
    """What ``function`` decides by; classes without images never win, whatever it gives for them.

    Raises:
        ArgumentError: there are no statistics of all classes; it gives something else. Errors of ours begin with
            ``name``, others are passed on.
    """
    known.require(name)
    seen = known.statistics.seen
    with naming(f"--head {name}"):
        given = function(known)
        if not isinstance(given, tuple) or len(given) != 2:
            raise ArgumentError(f"wanted are a weight and a bias, got {_shown(given)}")
        weight = _checked("weight", given[0], seen, known.statistics.dim)
        bias = _checked("bias", given[1], seen)
    return Decision.of(torch.where(seen[:, None], weight, 0), bias, seen)


def _checked(part: str, found: Any, seen: Tensor, *width: int) -> Tensor:
    """Detached; finite for classes that were ``seen``."""
    wanted = [len(seen), *width]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise ArgumentError(f"{part} must be a tensor of floating-point numbers, got {_shown(found)}")
    if list(found.shape) != wanted or found.device != seen.device:
        got = f"{list(found.shape)} on {found.device}"
        raise ArgumentError(f"{part} must be {wanted} on {seen.device}, got {got}")
    found = found.detach().float()  # as it decides
    if not bool(found[seen].isfinite().all()):
        raise ArgumentError(f"{part} must be finite in float32 for all classes that were seen, got NaN or infinity")
    return found


def _shown(found: Any) -> str:
    return f"{found.dtype}" if isinstance(found, Tensor) else f"an object of type {type(found).__name__}"
