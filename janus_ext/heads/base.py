"""What a head is: it decides from features, and is fitted to what is known of all classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ext.errors import ArgumentError
from janus_ext.heads.expansion import Expansion
from janus_ext.margin import unit

if TYPE_CHECKING:
    from janus_ext.heads.knowledge import Knowledge

NEVER = -float("inf")  # the bias of a class without images
LOWEST = torch.finfo(torch.float32).min  # the same where it has to be a number: no score is below it


@dataclass(frozen=True)
class Decision:
    """Scores of features f [b, d]: x W^T + bias, with x = f, x = f / |f| (``unit``), or x = `Expansion` of f.

    Their softmax are probabilities, the largest wins.

    Attributes:
        weight: W [C, d], or [C, d + M] behind an expansion.
        bias: [C]; `NEVER` for classes of which nothing is known.
        unit: whether features are brought to length 1.
        expansion: by M random features, or None.
    """

    weight: Tensor
    bias: Tensor
    unit: bool = False
    expansion: Expansion | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, seen: Tensor, **options: Any) -> Decision:
        """In float32; classes that are not ``seen`` (bool [C]) never win."""
        bias = torch.where(seen, bias.double(), NEVER)
        return cls(weight.float(), bias.float(), **options)

    @property
    def is_linear(self) -> bool:
        """Whether scores are an affine map of the features as they are."""
        return not self.unit and self.expansion is None

    def rows(self) -> tuple[Tensor, Tensor]:
        """(weight [C, d], bias [C]) of an affine map of the features as they are, by which the same class wins.

        Biases are finite. Of unit features the rows are brought to length 1: scores are cosines times the feature's
        length.

        Raises:
            ArgumentError: there is an expansion, so that there is no such map.
        """
        if self.expansion is not None:
            raise ArgumentError(
                "--head-width makes random features between backbone and classifier, so that there is no linear "
                "classifier of its features: ONNX and pt2 hold them, or name a --head, which then works without them"
            )
        return (F.normalize(self.weight, dim=1) if self.unit else self.weight), self.bias.clamp_min(LOWEST)

    def scores(self, features: Tensor) -> Tensor:
        """[b, d] -> [b, C]."""
        x = unit(features) if self.unit else features
        if self.expansion is not None:
            x = self.expansion(x)
        return F.linear(x, self.weight, self.bias)


Head = Callable[["Knowledge"], Decision]
"""A head: from what is known of the classes to what decides between them. Pure; it may raise StatisticsError."""
