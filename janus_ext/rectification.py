"""How gradients of LoRA factors are rectified: the options that ops, layers, `inject` and the rectifier share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from janus_ext.arguments import check_flag, check_number, shown
from janus_ext.errors import ArgumentError

RECTIFY = ("none", "project", "tangent", "exact")
DAMPING = 0.1  # chosen on the embedded benchmark, as SHARE (REPRODUCIBILITY.md)
SHARE = 0.5
_OPTIONS = ("damping", "share", "balance")


@dataclass(frozen=True)
class Rectification:
    """How gradients of LoRA factors are rectified (Gradient Rectification). Checked when it is made.

    With G the gradient of the adapted weight, V the protected basis and P = I - V V^T:

    Attributes:
        rectify: "none" (plain gradients), "project" (g_A P; LoRA-GPM), "tangent" (the paper's closest reachable update
            to G P) or "exact" (this project's: the same with A V = 0 built into the forward pass).
        damping: of B^T B and A A^T, relative to their mean eigenvalue; below 4 r eps it counts as 4 r eps.
        share: in [0, 1], of the part that both factors could carry, B carries this much:
            Z = -(share / s) B^+ G_safe A^+, so 0 leaves it to A, 1 to B, and 0.5 splits it evenly.
        balance: multiply dA by s^2 tr(B^T B) / r and dB by s^2 tr(A A^T) / r, the scale of the plain gradients.

    Raises:
        ArgumentError: a value outside these.
    """

    rectify: str = "exact"
    damping: float = DAMPING
    share: float = SHARE
    balance: bool = True

    def __post_init__(self) -> None:
        _check("Rectification", self.rectify, self.damping, self.share, self.balance)

    @property
    def values(self) -> tuple[str, float, float, bool]:
        """The four in the order in which the raw ops take them."""
        return self.rectify, float(self.damping), float(self.share), self.balance


def rectification_of(
    who: str, rectify: str | Rectification, options: Mapping[str, Any], balance: bool = True
) -> Rectification:
    """What the caller of `who` asks for: a whole Rectification, or the name of one with `options` of it.

    `balance` holds where they do not say. Raises ArgumentError, which begins with `who`, or TypeError for an option
    that there is not.
    """
    if isinstance(rectify, Rectification):
        if options:
            raise ArgumentError(f"{who}: {', '.join(options)} must be given in the Rectification, got both")
        return rectify
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise TypeError(f"{who}: options must be of {', '.join(_OPTIONS)}, got {', '.join(unknown)}")
    options = {"damping": DAMPING, "share": SHARE, "balance": balance, **options}
    _check(who, rectify, *(options[name] for name in _OPTIONS))
    return Rectification(rectify, **options)


def _check(who: str, rectify: Any, damping: Any, share: Any, balance: Any) -> None:
    """ArgumentError, which begins with `who`, unless a Rectification can be made of these."""
    if not isinstance(rectify, str) or rectify not in RECTIFY:
        raise ArgumentError(f"{who}: rectify must be one of {', '.join(RECTIFY)}, got {shown(rectify)}")
    check_number(f"{who}: damping", damping, lambda d: 0 < d < math.inf, "positive and finite")
    check_number(f"{who}: share", share, lambda s: 0 <= s <= 1, "in [0, 1]")
    check_flag(f"{who}: balance", balance)
