"""Decoupled Margin Loss: keeps the features of new classes away from the prototypes of old ones.

The loss acts on features alone, decoupled from the classifier, and needs no label. The paper gives its purpose and
effect; the smooth hinge on the cosine is this project's form (see `janus_ext.ops.margin_loss`).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_ext import ops
from janus_ext.arguments import (
    WIDEST,
    are_floats,
    are_integers,
    check_device,
    check_floats,
    check_integer,
    check_number,
    check_state,
    check_tensor,
    shown,
)
from janus_ext.errors import ArgumentError, StatisticsError


class ClassPrototypes:
    """Unit mean features of old classes, one row a class, computed once after its task and moved by `transform` alone.

    Attributes:
        matrix: [C, dim] of PyTorch's default dtype, unit rows, in the order in which classes were added.
        classes: the C class labels.

    Raises:
        ArgumentError: dim is not a positive integer.
    """

    @torch.inference_mode(False)  # losses of tasks to come take the matrix, wherever its classes were added
    def __init__(self, dim: int, device: torch.device | str | None = None) -> None:
        check_integer("ClassPrototypes: dim", dim, lambda n: 1 <= n <= WIDEST, f"from 1 to {WIDEST}")
        check_device("ClassPrototypes: device", device)
        self.matrix = torch.zeros(0, dim, device=device)
        self.classes: list[int] = []

    def __len__(self) -> int:
        return len(self.classes)

    @torch.inference_mode(False)
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add every class among `labels` [N] with the normalised mean of its `features` [N, dim].

        Only the means are kept, not the features or what autograd knows of them.

        Raises ArgumentError when a class is already there (old prototypes are never updated), StatisticsError when the
        features are none or not finite.
        """
        self._check(features)
        features = features.detach()
        wanted = f"[{len(features)}] of integers, one a feature"
        check_tensor(
            "ClassPrototypes: labels", labels, wanted, lambda y: y.shape == features.shape[:1] and are_integers(y)
        )
        if bool((labels < 0).any()):
            raise ArgumentError(f"ClassPrototypes: labels must not be negative, got {int(labels.min())}")
        if not len(features) or not bool(torch.isfinite(features).all()):
            raise StatisticsError(
                f"ClassPrototypes: features must be finite and one at least, got {list(features.shape)}, NaN or none"
            )
        new = labels.unique().tolist()
        known = sorted(set(new) & set(self.classes))
        if known:
            raise ArgumentError(
                f"ClassPrototypes: labels must name new classes, got classes {known} that have prototypes already"
            )
        means = torch.stack([features[labels == c].double().mean(0) for c in new])
        self.matrix = torch.cat([self.matrix, unit(means).to(self.matrix)])
        self.classes += new

    @torch.inference_mode(False)
    @torch.no_grad()
    def transform(self, matrix: Tensor) -> None:
        """Move every prototype p to p R, R [dim, dim], and bring it back to length 1: what drifted is followed."""
        check_floats("ClassPrototypes: matrix", matrix, [self.matrix.shape[1]] * 2)
        if not bool(torch.isfinite(matrix).all()):
            raise StatisticsError("ClassPrototypes: matrix must be finite, got NaN or infinity")
        moved = self.matrix.double() @ matrix.to(self.matrix.device, torch.float64)
        self.matrix = unit(moved).to(self.matrix)

    def nearest(self, features: Tensor) -> Tensor:
        """Cosine [N] of each feature [N, dim] to its nearest prototype ("danger" is its mean over new features)."""
        return self.cosines(features).amax(1)

    def cosines(self, features: Tensor) -> Tensor:
        """Cosines [N, C] of features [N, dim] to all prototypes: the largest is that of the nearest class mean."""
        self._check(features)
        if not self.classes:
            raise ArgumentError("ClassPrototypes: cosines need at least one prototype, got none")
        return (unit(features.to(self.matrix.device, torch.float64)) @ self.matrix.T.double()).to(self.matrix)

    def state_dict(self) -> dict[str, Tensor]:
        """matrix [C, dim] and classes [C]."""
        return {"matrix": self.matrix.clone(), "classes": torch.tensor(self.classes, dtype=torch.int64)}

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`; raises ArgumentError when it belongs to another width."""
        check_state("ClassPrototypes: state", state, ("matrix", "classes"))
        matrix, classes = state["matrix"], state["classes"]
        fits = matrix.dim() == 2 and matrix.shape[1:] == self.matrix.shape[1:] and classes.shape == matrix.shape[:1]
        if not fits or not are_floats(matrix) or not are_integers(classes):
            raise ArgumentError(
                f"ClassPrototypes: state must have a floating matrix [C, {self.matrix.shape[1]}] and C classes, "
                f"got {list(matrix.shape)} of {matrix.dtype} and {list(classes.shape)} of {classes.dtype}"
            )
        if not bool(torch.isfinite(matrix).all()):
            raise ArgumentError("ClassPrototypes: state must have a finite matrix, got NaN or infinity")
        if bool((classes < 0).any()):
            raise ArgumentError(f"ClassPrototypes: state must have no negative class, got {int(classes.min())}")
        if len(classes.unique()) < len(classes):
            raise ArgumentError("ClassPrototypes: state must have every class once, got one more often")
        self.matrix = matrix.detach().to(self.matrix, copy=True)
        self.classes = classes.tolist()

    def _check(self, features: Tensor) -> None:
        check_floats("ClassPrototypes: features", features, ["N", self.matrix.shape[1]])


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, whatever their length was but 0; without their largest entry their squares could overflow."""
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return F.normalize(rows / largest, dim=1)


class DecoupledMarginLoss(nn.Module):
    """weight * mean_i (1/tau) log(1 + sum_c exp(tau (f^_i . p_c - margin))): add it to the classification loss.

    Args:
        margin: cosine in [-1, 1] beyond which a new feature is too close to an old prototype.
        temperature: tau > 0, sharpness of the hinge.
        weight: factor of the loss, >= 0.

    Raises:
        ArgumentError: a value outside these.
    """

    def __init__(self, margin: float, temperature: float, weight: float = 1.0) -> None:
        super().__init__()
        for name, value, fits, wanted in (
            ("margin", margin, lambda m: -1 <= m <= 1, "in [-1, 1]"),
            ("temperature", temperature, lambda t: 0 < t < math.inf, "positive and finite"),
            ("weight", weight, lambda w: 0 <= w < math.inf, "finite and not negative"),
        ):
            check_number(f"DecoupledMarginLoss: {name}", value, fits, wanted)
        self.margin, self.temperature, self.weight = float(margin), float(temperature), float(weight)

    def forward(self, features: Tensor, prototypes: Tensor | ClassPrototypes) -> Tensor:
        """features [N, d], prototypes [C, d] with unit rows -> scalar; exactly zero without prototypes."""
        matrix = prototypes.matrix if isinstance(prototypes, ClassPrototypes) else prototypes
        check_tensor("DecoupledMarginLoss: features", features, "[N, d]")
        if not isinstance(matrix, Tensor):
            raise ArgumentError(
                f"DecoupledMarginLoss: prototypes must be ClassPrototypes or a tensor [C, d], got {shown(matrix)}"
            )
        return self.weight * ops.margin_loss(features, matrix, self.margin, self.temperature)

    def extra_repr(self) -> str:
        return f"margin={self.margin:g}, temperature={self.temperature:g}, weight={self.weight:g}"
