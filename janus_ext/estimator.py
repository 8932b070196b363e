"""Online Estimation: the subspace that a layer's inputs span, tracked from the inputs that training computes anyway.

No sample is kept and the data are not passed again. The statistics are additive: over batches in any order, and over
devices by one all-reduce.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from janus_ext import ops
from janus_ext.errors import ArgumentError, StatisticsError

ESTIMATORS = ("gram",)


class OnlineEstimator:
    """Observes inputs x [..., dim] of one layer during a task; at its end, extends the basis of the protected subspace.

    Args:
        dim: input width n of the layer.
        estimator: "gram", the exact n x n matrix sum x x^T.
        decay: in (0, 1]; the statistics are multiplied by it before each observed batch.
        name: of the layer, for messages.
        energy_power: 1 or 2, see `janus_ext.ops.extend_basis`.
        dtype: float32 or float64, of statistics and basis.
        device: of both.

    Raises:
        ArgumentError: a value outside these.
    """

    def __init__(
        self,
        dim: int,
        estimator: str = "gram",
        *,
        decay: float = 1.0,
        name: str = "layer",
        energy_power: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise ArgumentError(f"OnlineEstimator: estimator must be one of {', '.join(ESTIMATORS)}, got '{estimator}'")
        if dim < 1:
            raise ArgumentError(f"OnlineEstimator: dim must be positive, got {dim}")
        if not 0 < decay <= 1:
            raise ArgumentError(f"OnlineEstimator: decay must be in (0, 1], got {decay:g}")
        if energy_power not in (1, 2):
            raise ArgumentError(f"OnlineEstimator: energy_power must be 1 or 2, got {energy_power}")
        self.dim, self.decay, self.name, self.energy_power = dim, decay, name, energy_power
        self.gram = torch.zeros(dim, dim, dtype=dtype, device=device)
        self.basis = torch.zeros(dim, 0, dtype=dtype, device=device)
        self.rows = 0
        self._warned = False

    def observe(self, x: Tensor) -> None:
        """Add the inputs x [..., dim] of one batch, any floating dtype."""
        ops.gram_update_(self.gram, x.detach(), self.decay)
        self.rows += x.numel() // self.dim

    def extended(self, energy: float, max_rank: int | None = None) -> Tensor:
        """The basis that `commit` would put in force, [dim, k]; nothing changes.

        Args:
            energy: share of what was observed that the basis is to capture, in [0, 1].
            max_rank: the basis never exceeds it (n - r leaves the factors room); None: dim. One warning when it bites.

        Raises:
            ArgumentError: energy or max_rank out of range.
            StatisticsError: nothing was observed, or the statistics are zero, NaN or infinite.
        """
        cap, k = self.dim if max_rank is None else max_rank, self.basis.shape[1]
        if not 0 <= energy <= 1:
            raise ArgumentError(f"{self.name}: energy must be in [0, 1], got {energy:g}")
        if not k <= cap <= self.dim:
            raise ArgumentError(f"{self.name}: max_rank must be from k = {k} to dim = {self.dim}, got {cap}")
        if self.rows == 0:
            raise StatisticsError(f"{self.name}: commit needs observed inputs, got none since the last commit")
        try:
            basis = ops.extend_basis(self.basis, self.gram, energy, cap, self.energy_power)
        except ValueError as error:
            raise StatisticsError(f"{self.name}: {error}; the previous basis stays in force") from error
        if basis.shape[1] == cap < self.dim and not self._warned:
            self._warn_of_cap(energy, cap)
        return basis

    def commit(self, energy: float, max_rank: int | None = None) -> Tensor:
        """End the task: put the basis that `extended` gives in force, and start new statistics.

        Arguments and errors as there; when it raises, nothing has changed.
        """
        self.basis = self.extended(energy, max_rank)
        self.gram.zero_()
        self.rows = 0
        return self.basis

    def _warn_of_cap(self, energy: float, cap: int) -> None:
        wanted = ops.extend_basis(self.basis, self.gram, energy, self.dim, self.energy_power).shape[1]
        if wanted > cap:
            self._warned = True
            warnings.warn(
                f"{self.name}: an energy of {energy:g} wants {wanted} protected directions, the cap is {cap}",
                stacklevel=3,
            )

    def merge(self, other: "OnlineEstimator") -> None:
        """Add what another estimator of the same layer and task observed; `other` is not changed."""
        if other.dim != self.dim:
            raise ArgumentError(f"{self.name}: other must have dim {self.dim}, got {other.dim}")
        self.gram += other.gram.to(self.gram)
        self.rows += other.rows

    def all_reduce(self, group: Any = None) -> None:
        """Sum the statistics over the processes of a `torch.distributed` group (None: all): the same on every one."""
        rows = torch.tensor(self.rows, device=self.gram.device)
        torch.distributed.all_reduce(self.gram, group=group)
        torch.distributed.all_reduce(rows, group=group)
        self.rows = int(rows)

    def state_dict(self) -> dict[str, Tensor]:
        """gram [dim, dim], basis [dim, k] and the number of observed rows."""
        return {"gram": self.gram.clone(), "basis": self.basis.clone(), "rows": torch.tensor(self.rows)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`; raises ArgumentError when it belongs to another width."""
        if tuple(state["gram"].shape) != (self.dim, self.dim) or state["basis"].shape[0] != self.dim:
            raise ArgumentError(
                f"{self.name}: state must have gram [{self.dim}, {self.dim}], got {list(state['gram'].shape)} "
                f"with basis {list(state['basis'].shape)}"
            )
        self.gram = state["gram"].to(self.gram, copy=True)
        self.basis = state["basis"].to(self.gram, copy=True)
        self.rows = int(state["rows"])
