"""The one statistic behind all closed-form heads: counts, sums and second moments of features, additive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from janus_ext import ops, processes
from janus_ext.arguments import (
    WIDEST,
    are_integers,
    check_device,
    check_floats,
    check_integer,
    check_state,
    check_tensor,
    shown,
)
from janus_ext.errors import ArgumentError, StatisticsError

NAMES = ("counts", "sums", "gram")
IN_PLACE = torch.inference_mode(False)  # what is kept is written into later, within the caller's mode or outside of it
NOTHING = 1e-12  # of the features' energy: a scatter within classes below it is rounding


class FeatureStatistics:
    """n_c, the sum of f over the images of every class c, and G = sum f f^T over all images.

    All three are additive over batches, tasks and processes, so that heads fitted to them need no old image.

    Attributes:
        counts: n_c, int64 [C]; 0 for a class without images.
        sums: [C, dim] float64.
        gram: G [dim, dim] float64.

    Args:
        dim: width of the features.
        device: where they are kept.

    Raises:
        ArgumentError: dim is not a positive integer.
    """

    @IN_PLACE
    def __init__(self, dim: int, device: torch.device | str | None = None) -> None:
        check_integer("FeatureStatistics: dim", dim, lambda n: 1 <= n <= WIDEST, f"from 1 to {WIDEST}")
        check_device("FeatureStatistics: device", device)
        self.counts = torch.zeros(0, dtype=torch.int64, device=device)
        self.sums = torch.zeros(0, dim, dtype=torch.float64, device=device)
        self.gram = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def __repr__(self) -> str:
        return f"FeatureStatistics(dim={self.dim}): {self.rows} features of {len(self.counts)} classes"

    @property
    def dim(self) -> int:
        """Width of the features."""
        return len(self.gram)

    @property
    def rows(self) -> int:
        """N, how many features were seen."""
        return int(self.counts.sum())

    @property
    def seen(self) -> Tensor:
        """bool [C]: which classes have images."""
        return self.counts > 0

    @IN_PLACE
    @torch.no_grad()
    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Adds features [n, dim] of any floating dtype; labels [n] are classes, counted from 0.

        Raises:
            ArgumentError: the shapes or dtypes are others.
            StatisticsError: a feature is not finite; nothing is added.
        """
        self._check(features, labels)
        if not bool(torch.isfinite(features.double().square().sum())):
            raise StatisticsError(
                f"FeatureStatistics: features must have finite squares, got others among {list(features.shape)}"
            )
        if len(labels):
            self.reserve(int(labels.max()) + 1)
        features, labels = features.to(self.gram.device), labels.to(self.counts)
        for c in labels.unique().tolist():  # bincount and index_add_ have no repeatable kernel on a GPU
            members = features[labels == c]
            self.counts[c] += len(members)
            self.sums[c] += members.double().sum(0)
        ops.gram_update_(self.gram, features)

    @IN_PLACE
    def reserve(self, classes: int) -> None:
        """Makes room for classes 0 .. ``classes`` - 1; those without images have a count of 0."""
        check_integer("FeatureStatistics: classes", classes, lambda c: 0 <= c <= WIDEST, f"from 0 to {WIDEST}")
        missing = classes - len(self.counts)
        if missing > 0:
            self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
            self.sums = torch.cat([self.sums, self.sums.new_zeros(missing, self.dim)])

    @IN_PLACE
    @torch.no_grad()
    def merge(self, other: FeatureStatistics) -> None:
        """Adds what other statistics of the same width have seen, class by class."""
        if not isinstance(other, FeatureStatistics) or other.dim != self.dim:
            found = f"a width of {other.dim}" if isinstance(other, FeatureStatistics) else shown(other)
            raise ArgumentError(f"FeatureStatistics: other must be FeatureStatistics of width {self.dim}, got {found}")
        self.reserve(len(other.counts))
        for name in NAMES:
            own, added = getattr(self, name), getattr(other, name)
            own[: len(added)] += added.to(own)

    def all_reduce(self, group: Any = None) -> None:
        """Adds up the statistics of all processes of a ``torch.distributed`` group; all have the same afterwards.

        ArgumentError for what is no group.
        """
        processes.check_group("FeatureStatistics: group", group)
        if processes.count(group) == 1:
            return
        [classes] = processes.largest([len(self.counts)], group, self.counts.device)
        self.reserve(classes)
        for name in NAMES:
            processes.add_up(getattr(self, name), group)

    @IN_PLACE
    @torch.no_grad()
    def transform(self, matrix: Tensor) -> None:
        """Replaces every feature f seen so far by f R: means become mean R, covariances R^T S R.

        Args:
            matrix: R [dim, dim].
        """
        check_floats("FeatureStatistics: matrix", matrix, [self.dim, self.dim])
        if not bool(torch.isfinite(matrix).all()):
            raise StatisticsError("FeatureStatistics: matrix must be finite, got NaN or infinity")
        R = matrix.to(self.gram)
        self.sums = self.sums @ R
        moved = R.mT @ self.gram @ R
        self.gram = (moved + moved.mT) / 2

    def means(self) -> Tensor:
        """mu_c, [C, dim] float64; 0 for classes without images."""
        return self.sums / self.counts.clamp_min(1)[:, None]

    def covariance(self) -> Tensor:
        """S = (G - sum_c n_c mu_c mu_c^T) / (N - C), the pooled covariance within the C classes that have images.

        [dim, dim] float64; the divisor is at least 1: with one image a class S is 0, up to rounding.
        """
        scaled = self.sums / self.counts.clamp_min(1).double().sqrt()[:, None]
        within = self.gram - scaled.mT @ scaled
        return within / max(1, self.rows - int(self.seen.sum()))

    def spread(self) -> Tensor:
        """The covariance within the classes, `shrunk`.

        Where they scatter by no more than rounding, as with one image a class, no direction is worth more than another:
        then it is I times the mean variance of all features, or I itself where all are the same.
        """
        S, energy = self.covariance(), float(self.gram.trace())
        if float(S.trace()) > NOTHING * energy / max(1, self.rows - int(self.seen.sum())):
            return shrunk(S, self.rows)
        rows = max(1, self.rows)
        variance = (energy - float(self.sums.sum(0).square().sum()) / rows) / rows
        scale = variance / self.dim if variance > NOTHING * energy / rows else 1.0
        return scale * torch.eye(self.dim, dtype=S.dtype, device=S.device)

    def state_dict(self) -> dict[str, Tensor]:
        """counts, sums and gram: copies."""
        return {name: getattr(self, name).clone() for name in NAMES}

    @IN_PLACE
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state_dict()`; ArgumentError where it is none, or of another width."""
        check_state("FeatureStatistics: state", state, NAMES)
        C, d = state["counts"].numel(), self.dim
        for name, shape in (("counts", [C]), ("sums", [C, d]), ("gram", [d, d])):
            if list(state[name].shape) != shape:
                raise ArgumentError(f"FeatureStatistics: state must have {name} {shape}, got {list(state[name].shape)}")
        counts, numbers = state["counts"], (state["sums"], state["gram"])
        if (
            counts.dtype != torch.int64
            or bool((counts < 0).any())
            or not all(bool(x.isfinite().all()) for x in numbers)
        ):
            raise ArgumentError(
                "FeatureStatistics: state must have int64 counts from 0 on, and finite sums and gram, got others"
            )
        for name in NAMES:
            setattr(self, name, state[name].detach().to(getattr(self, name), copy=True))

    def _check(self, features: Tensor, labels: Tensor) -> None:
        check_floats("FeatureStatistics: features", features, ["n", self.dim])
        n = len(features)
        check_tensor(
            "FeatureStatistics: labels",
            labels,
            f"[{n}] integers, one a feature",
            lambda y: list(y.shape) == [n] and are_integers(y),
        )
        classes = labels.long()  # WIDEST is beyond what uint8 holds
        strange = classes[(classes < 0) | (classes >= WIDEST)]
        if len(strange):
            found = int(strange[0])
            raise ArgumentError(f"FeatureStatistics: labels must be from 0 to {WIDEST - 1}, got {found}")


def factor_of(S: Tensor) -> Tensor:
    """L [d, d] with L L^T = S, a covariance within classes; StatisticsError where rounding has left none."""
    L, info = torch.linalg.cholesky_ex(S)
    if int(info):
        raise StatisticsError(
            "features scatter too little within their classes, against their length: rounding hides their covariance"
        )
    return L


def shrunk(S: Tensor, rows: int) -> Tensor:
    """(1 - rho) S + rho m I, m the mean of the diagonal.

    By OAS (Chen, Wiesel, Eldar & Hero, IEEE Trans. Signal Processing 58, 2010, equation 23) without its terms in 2 / d,
    as scikit-learn has it.

    Args:
        S: [d, d] float64, a sample covariance.
        rows: of how many samples.
    """
    d = len(S)
    m, a = float(S.trace()) / d, float(S.square().mean())
    identity = torch.eye(d, dtype=S.dtype, device=S.device)
    spread = (rows + 1) * (a - m * m / d)
    rho = min(1.0, (a + m * m) / spread) if spread > 0 else 1.0
    return (1 - rho) * S + rho * m * identity
