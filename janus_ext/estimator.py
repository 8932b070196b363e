"""Online Estimation: the subspace that a layer's inputs span, tracked from the inputs that training computes anyway.

No sample is kept and the data are not passed again. The statistics are additive: over batches in any order, and over
devices by one all-reduce.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from janus_ext.errors import ArgumentError, StatisticsError
from janus_ext.statistics import SKETCH_RANK, Gram, Sketch, Statistics

ESTIMATORS = ("gram", "isvd")


class OnlineEstimator:
    """Observes inputs x [..., dim] of one layer during a task; at its end, extends the basis of the protected subspace.

    Args:
        dim: input width n of the layer.
        estimator: "gram", the exact n x n matrix sum x x^T; or "isvd", an incremental SVD in n x l numbers, exact while
            the inputs have rank l or less.
        rank: l of "isvd", at most dim; None: 256, or dim where that is less. "gram" has none.
        decay: in (0, 1]; the statistics are multiplied by it before each observed batch.
        name: of the layer, for messages.
        energy_power: 1 or 2, see `janus_ext.ops.extend_basis`; "isvd" knows 1 only.
        dtype: float32 or float64, of statistics and basis.
        device: of both.

    Attributes:
        basis: V [dim, k], what is protected.
        statistics: what was seen since the last commit.

    Raises:
        ArgumentError: a value outside these.
    """

    def __init__(
        self,
        dim: int,
        estimator: str = "gram",
        rank: int | None = None,
        decay: float = 1.0,
        *,
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
        if dtype not in (torch.float32, torch.float64):
            raise ArgumentError(f"OnlineEstimator: dtype must be torch.float32 or torch.float64, got {dtype}")
        self.dim, self.decay, self.name = dim, decay, name
        self.statistics: Statistics
        if estimator == "gram":
            if rank is not None:
                raise ArgumentError(f"OnlineEstimator: rank belongs to estimator='isvd', got {rank} with 'gram'")
            self.statistics = Gram(dim, energy_power, dtype, device)
        else:
            rank = min(dim, SKETCH_RANK) if rank is None else rank
            if not 1 <= rank <= dim:
                raise ArgumentError(f"OnlineEstimator: rank must be from 1 to dim = {dim}, got {rank}")
            if energy_power != 1:
                raise ArgumentError("OnlineEstimator: energy_power must be 1 with estimator='isvd', got 2")
            self.statistics = Sketch(dim, rank, dtype, device)
        self.basis = torch.zeros(dim, 0, dtype=dtype, device=device)
        self._rows = torch.zeros((), dtype=torch.int64, device=device)  # a tensor: torch.compile would fix a number
        self._warned = False

    @property
    def rows(self) -> int:
        """How many inputs were observed since the last commit."""
        return int(self._rows)

    def observe(self, x: Tensor) -> None:
        """Add the inputs x [..., dim] of one batch, any floating dtype.

        Raises StatisticsError where "isvd" meets NaN or inf (ValueError, and no name, within a compiled graph); "gram"
        carries them on to the commit, which raises.
        """
        try:
            self.statistics.observe(x.detach(), self.decay)
        except ValueError as error:
            raise StatisticsError(f"{self.name}: {error}; nothing was added") from error
        self._rows += x.numel() // self.dim

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
            basis = self.statistics.extended(self.basis, energy, cap)
        except ValueError as error:
            raise StatisticsError(f"{self.name}: {error}; the previous basis stays in force") from error
        if not self._warned:
            self._warn_of_what_is_missing(basis, energy, cap)
        return basis

    def commit(self, energy: float, max_rank: int | None = None) -> Tensor:
        """End the task: put the basis that `extended` gives in force, and start new statistics.

        Arguments and errors as there; when it raises, nothing has changed.
        """
        return self.adopt(self.extended(energy, max_rank))

    def adopt(self, basis: Tensor) -> Tensor:
        """Put a basis that `extended` gave in force, and start new statistics; for many layers, all or none."""
        self.statistics.clear()
        self._rows = torch.zeros_like(self._rows)
        self.basis = basis
        return basis

    def _warn_of_what_is_missing(self, basis: Tensor, energy: float, cap: int) -> None:
        """One warning a layer, where the cap or the sketch's rank keeps the basis from the energy."""
        message = None
        if basis.shape[1] == cap < self.dim:
            wanted = self.statistics.extended(self.basis, energy, self.dim).shape[1]
            if wanted > cap:
                message = f"an energy of {energy:g} wants {wanted} protected directions, the cap is {cap}"
        elif isinstance(self.statistics, Sketch):
            held = self.statistics.energy_in(basis)
            if held < energy - torch.finfo(basis.dtype).eps * self.dim:
                sketch = f"the sketch of rank {len(self.statistics.S)} holds {held:.4g}: raise the estimator's rank"
                message = f"an energy of {energy:g} was asked, {sketch}"
        if message is not None:
            self._warned = True
            warnings.warn(f"{self.name}: {message}", stacklevel=4)

    def merge(self, other: "OnlineEstimator") -> None:
        """Add what another estimator of the same layer and task observed; `other` is not changed."""
        if other.dim != self.dim:
            raise ArgumentError(f"{self.name}: other must have dim {self.dim}, got {other.dim}")
        if type(other.statistics) is not type(self.statistics):
            kinds = [type(e.statistics).__name__ for e in (self, other)]
            raise ArgumentError(f"{self.name}: other must hold a {kinds[0]}, got a {kinds[1]}")
        try:
            self.statistics.merge(other.statistics)
        except ValueError as error:
            raise StatisticsError(f"{self.name}: {error}; nothing was added") from error
        self._rows += other.rows

    def all_reduce(self, group: Any = None) -> None:
        """Sum the statistics over the processes of a `torch.distributed` group (None: all): the same on every one."""
        self.statistics.all_reduce(group)
        torch.distributed.all_reduce(self._rows, group=group)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the statistics (gram [dim, dim], or U [dim, l], S [l] and total), basis [dim, k], rows."""
        tensors = {**self.statistics.tensors(), "basis": self.basis, "rows": self._rows}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`; raises ArgumentError when it is of another width, kind or rank."""
        shapes = {name: list(tensor.shape) for name, tensor in self.statistics.tensors().items()}
        found = {name: list(state[name].shape) if name in state else None for name in shapes}
        missing = {"basis", "rows"} - set(state)
        if found != shapes or missing or state["basis"].shape[0] != self.dim:
            basis = list(state["basis"].shape) if "basis" in state else None
            raise ArgumentError(
                f"{self.name}: state must have {_listed(shapes)}, basis [{self.dim}, k] and rows, "
                f"got {_listed(found)}, basis {basis}"
            )
        self.statistics.load(state)
        self.basis = state["basis"].to(self.basis, copy=True)
        self._rows = state["rows"].to(self._rows, copy=True)


def _listed(shapes: dict[str, list[int] | None]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


@contextmanager
def observing(modules: Mapping[str, nn.Module], estimators: Mapping[str, OnlineEstimator]) -> Iterator[None]:
    """Within it, every estimator observes the first argument of each forward pass of the module of the same name.

    So in compiled models too, where a hook would not do: to a graph that was compiled without it torch.compile never
    adds it, and says nothing.

    Raises ArgumentError where an estimator has no module.
    """
    without = sorted(set(estimators) - set(modules))
    if without:
        raise ArgumentError(f"observing: modules must hold every estimator's name, {without[0]} is missing")
    with ExitStack() as stack:
        for name, estimator in estimators.items():
            stack.enter_context(_observed(modules[name], estimator))
        yield


@contextmanager
def _observed(module: nn.Module, estimator: OnlineEstimator) -> Iterator[None]:
    """The instance's `forward` is wrapped, which torch.compile checks before it runs a graph."""
    patched = vars(module).get("forward")  # by an outer `observing`, or somebody else

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not module:  # a deep copy made meanwhile runs its own weights, unobserved
            return type(self).forward(self, *args, **kwargs)
        estimator.observe(args[0] if args else next(iter(kwargs.values())))
        return type(self).forward(self, *args, **kwargs) if patched is None else patched(*args, **kwargs)

    module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        if patched is None:
            del module.forward
        else:
            module.forward = patched
