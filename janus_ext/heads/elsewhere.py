"""A head that is somebody else's function: what it gives is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from janus_ext.arguments import naming
from janus_ext.errors import ArgumentError
from janus_ext.heads.base import NEVER, Decision
from janus_ext.heads.knowledge import Knowledge


def fit(name: str, function: Callable[[Knowledge], Any], known: Knowledge) -> Decision:
    """What ``function`` decides by; there are statistics of all classes when it is asked.

    Raises:
        ArgumentError: it gives no `Decision`, or one of other shapes. Errors of ours begin with ``name``.
    """
    known.require(name)
    with naming(f"--head {name}"):
        decision = function(known)
        if not isinstance(decision, Decision):
            raise ArgumentError(f"wanted is a Decision, got an object of type {type(decision).__name__}")
        inputs = known.statistics.dim if decision.expansion is None else sum(decision.expansion.projection.shape)
        for part, wanted in (("weight", (known.classes, inputs)), ("bias", (known.classes,))):
            _check(part, getattr(decision, part), wanted, known.statistics.gram.device)
    return decision


def _check(part: str, found: Any, wanted: tuple[int, ...], device: Any) -> None:
    if not isinstance(found, Tensor):
        raise ArgumentError(f"{part} must be a tensor, got an object of type {type(found).__name__}")
    got = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)} on {found.device}"
    if got != f"float32 {list(wanted)} on {device}":
        raise ArgumentError(f"{part} must be float32 {list(wanted)} on {device}, got {got}; Decision.of gives float32")
    never = found == NEVER if part == "bias" else False  # of a class without images
    if not bool((found.isfinite() | never).all()):
        raise ArgumentError(f"{part} must be finite, got NaN or infinity")
