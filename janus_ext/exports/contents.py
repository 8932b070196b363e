"""What an export is made of, whoever has it: a finished run, or a learner in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from janus_ext.classifier import ContinualClassifier
from janus_ext.errors import ArgumentError
from janus_ext.margin import ClassPrototypes

NEVER = torch.finfo(torch.float32).min  # the bias of a class that has no prototype: finite, and no score is below it
PUBLISHED_CROP = 224 / 256


@dataclass(frozen=True)
class Update:
    """What one task has learned: ``tensors`` "<layer>.A" and "<layer>.B" (and others), whose s B A was merged."""

    tensors: Mapping[str, Tensor]
    scale: float
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """A model, its classifier and what is known of both.

    Attributes:
        model: the backbone with its adapters, as a method has left it behind a task; exports copy it.
        weight, bias: [C, d] and [C], the scores of a feature f [d] are weight f + bias.
        class_names: C of them, in the order of the rows.
        settings: of the run, as its config.json has them ("backbone", "weights", "image_size", "method", ...).
        updates: one a task, oldest first.
        results: of the run, as its results.json has them; None where nothing was measured.
        of_means: whether the rows are unit means of the classes, and scores cosines to them.
        crop: side of the middle square that the model was shown, as a part of an image's shorter side.
    """

    model: ContinualClassifier
    weight: Tensor
    bias: Tensor
    class_names: tuple[str, ...]
    settings: Mapping[str, Any]
    updates: tuple[Update, ...] = ()
    results: Mapping[str, Any] | None = None
    of_means: bool = False
    crop: float = PUBLISHED_CROP

    def __post_init__(self) -> None:
        wanted = [len(self.class_names), self.model.feature_dim]
        if list(self.weight.shape) != wanted or list(self.bias.shape) != wanted[:1]:
            found = f"{list(self.weight.shape)} and {list(self.bias.shape)}"
            raise ArgumentError(f"weight and bias must be {wanted} and {wanted[:1]}, got {found}")


def linear_rows(heads: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """(weight [C, d], bias [C]) of all tasks' linear heads, one below the other."""
    return torch.cat([head.weight.detach() for head in heads]), torch.cat([head.bias.detach() for head in heads])


def prototype_rows(prototypes: ClassPrototypes, classes: int) -> tuple[Tensor, Tensor]:
    """(weight [C, d], bias [C]) of the nearest class mean: unit prototypes, and 0.

    A score is the cosine times the feature's length, which is the same for all classes: the winner is the one with the
    largest cosine. A class without a prototype never wins.
    """
    weight = prototypes.matrix.new_zeros(classes, prototypes.matrix.shape[1])
    bias = prototypes.matrix.new_full((classes,), NEVER)
    weight[prototypes.classes], bias[prototypes.classes] = prototypes.matrix, 0.0
    return weight, bias
