"""Online Estimation: the subspace that a layer's inputs span, tracked from the inputs that training computes anyway.

No sample is kept and the data are not passed again. The statistics are additive: over batches in any order, and over
the processes of a data-parallel training, which are summed at the end of a task.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from janus_ext import ops, processes
from janus_ext.arguments import (
    WIDEST,
    are_floats,
    check_device,
    check_flag,
    check_integer,
    check_number,
    check_state,
    check_tensor,
    check_text,
    naming,
    shown,
)
from janus_ext.errors import ArgumentError, StatisticsError, TaskBoundaryError, warn
from janus_ext.protection import checked_defect
from janus_ext.statistics import SKETCH_RANK, Gram, Sketch, Statistics

ESTIMATORS = ("gram", "isvd")
Observer = Callable[[Tensor, Tensor], None]  # of a layer's input: as it was given, and as it enters the product


class NothingObserved(StatisticsError):
    """A layer got no input since the last commit, in any process."""


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
        distributed: where torch.distributed runs several processes, `extended` and `commit` take what all of them saw,
            so that all get the same basis: every process must call them, also one that observed nothing. False: each
            process for itself, or summed by `all_reduce`.

    Attributes:
        basis: V [dim, k], what is protected.
        statistics: what this process saw since the last commit.

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
        distributed: bool = True,
    ) -> None:
        if not isinstance(estimator, str) or estimator not in ESTIMATORS:
            kinds = ", ".join(ESTIMATORS)
            raise ArgumentError(f"OnlineEstimator: estimator must be one of {kinds}, got {shown(estimator)}")
        check_integer("OnlineEstimator: dim", dim, lambda n: 1 <= n <= WIDEST, f"from 1 to {WIDEST}")
        check_number("OnlineEstimator: decay", decay, lambda d: 0 < d <= 1, "in (0, 1]")
        check_integer("OnlineEstimator: energy_power", energy_power, lambda p: p in (1, 2), "1 or 2")
        if not any(dtype is known for known in (torch.float32, torch.float64)):
            found = dtype if isinstance(dtype, torch.dtype) else shown(dtype)
            raise ArgumentError(f"OnlineEstimator: dtype must be torch.float32 or torch.float64, got {found}")
        check_device("OnlineEstimator: device", device)
        check_flag("OnlineEstimator: distributed", distributed)
        check_text("OnlineEstimator: name", name, "text")
        self.dim, self.decay, self.name, self.distributed = dim, decay, name, distributed
        self.statistics = _statistics(estimator, dim, rank, energy_power, dtype, device)
        self.basis = torch.zeros(dim, 0, dtype=dtype, device=device)
        self._warned = False
        self._reduced = False  # the statistics are those of all processes

    @property
    def rows(self) -> int:
        """How many inputs this process observed since the last commit; all of them after `all_reduce`."""
        return int(self.statistics.rows)

    def observe(self, x: Tensor) -> None:
        """Add the inputs x [..., dim] of one batch, any floating dtype.

        Calls while a backward pass runs add nothing: there activation checkpointing computes its inputs a second time.

        Raises:
            ArgumentError: x is not such a tensor.
            StatisticsError: "isvd" meets NaN or inf (ValueError, and no name, within a compiled graph); "gram" carries
                them on to the commit, which raises.
            TaskBoundaryError: after `all_reduce`: before the next commit nothing can be added.
        """
        check_tensor(f"{self.name}: x", x, f"[..., {self.dim}]")
        if x.dim() == 0 or x.shape[-1] != self.dim or not are_floats(x):
            found = f"{list(x.shape)} of {x.dtype}"
            raise ArgumentError(f"{self.name}: x must be [..., {self.dim}] of a floating dtype, got {found}")
        if self._reduced:
            raise TaskBoundaryError(
                f"{self.name}: observe() after all_reduce() would count what was summed once for each process: "
                "sum once, after the task's last input"
            )
        try:
            self.statistics.observe(x.detach(), self.decay)
        except ValueError as error:
            raise StatisticsError(f"{self.name}: {error}; nothing was added") from error

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
        check_number(f"{self.name}: energy", energy, lambda e: 0 <= e <= 1, "in [0, 1]")
        energy = float(energy)  # a Fraction is a number, too
        check_integer(f"{self.name}: max_rank", cap, lambda c: k <= c <= self.dim, f"from k = {k} to dim = {self.dim}")
        statistics = self.statistics_of_all()
        if not int(statistics.rows):
            raise NothingObserved(f"{self.name}: commit needs observed inputs, got none since the last commit")
        try:
            basis = statistics.extended(self.basis, energy, cap)
        except ValueError as error:
            raise StatisticsError(f"{self.name}: {error}; the previous basis stays in force") from error
        if not self._warned:
            self._warn_of_what_is_missing(statistics, basis, energy, cap)
        return basis

    def commit(self, energy: float, max_rank: int | None = None) -> Tensor:
        """End the task: put the basis that `extended` gives in force, and start new statistics.

        Arguments and errors as there; when it raises, nothing has changed.
        """
        return self.adopt(self.extended(energy, max_rank))

    def adopt(self, basis: Tensor) -> Tensor:
        """Put a basis that `extended` gave in force, and start new statistics; for many layers, all or none."""
        self._check_basis(self.name, basis)
        self.statistics.clear()
        self.basis, self._reduced = basis.detach(), False
        return self.basis

    def statistics_of_all(self) -> Statistics:
        """What all processes saw since the last commit: their sum, a copy, where there are several."""
        if not self.distributed or self._reduced or processes.count() == 1:
            return self.statistics
        everyones = copy.deepcopy(self.statistics)
        everyones.all_reduce(None)
        return everyones

    def _warn_of_what_is_missing(self, statistics: Statistics, basis: Tensor, energy: float, cap: int) -> None:
        """One warning a layer, where the cap or the sketch's rank keeps the basis from the energy."""
        message = None
        if basis.shape[1] == cap < self.dim:
            wanted = statistics.extended(self.basis, energy, self.dim).shape[1]
            if wanted > cap:
                message = f"an energy of {energy:g} wants {wanted} protected directions, the cap is {cap} of {self.dim}"
        elif isinstance(statistics, Sketch):
            held = statistics.energy_in(basis)
            if held < energy - torch.finfo(basis.dtype).eps * self.dim:
                sketch = f"the sketch of rank {len(statistics.S)} holds {held:.4g}: raise the estimator's rank"
                message = f"an energy of {energy:g} was asked, {sketch}"
        if message is not None:
            self._warned = True
            warn(f"{self.name}: {message}")

    def merge(self, other: "OnlineEstimator") -> None:
        """Add what another estimator of the same layer and task observed; `other` is not changed."""
        if not isinstance(other, OnlineEstimator):
            raise ArgumentError(f"{self.name}: other must be an OnlineEstimator, got {shown(other)}")
        if other.dim != self.dim:
            raise ArgumentError(f"{self.name}: other must have dim {self.dim}, got {other.dim}")
        if type(other.statistics) is not type(self.statistics):
            kinds = [type(e.statistics).__name__ for e in (self, other)]
            raise ArgumentError(f"{self.name}: other must hold a {kinds[0]}, got a {kinds[1]}")
        if other._reduced != self._reduced:
            raise TaskBoundaryError(f"{self.name}: all_reduce() must come before the merge for both, or for none")
        try:
            self.statistics.merge(other.statistics)
        except ValueError as error:
            raise StatisticsError(f"{self.name}: {error}; nothing was added") from error

    def all_reduce(self, group: Any = None) -> None:
        """Sum the statistics over the processes of a `torch.distributed` group (None: all), on every one, by hand.

        For groups other than all processes, or with distributed=False: `extended` and `commit` do not sum them again.
        Once a task, after its last input; raises TaskBoundaryError at the second time.
        """
        processes.check_group(f"{self.name}: group", group)
        if self._reduced:
            raise TaskBoundaryError(f"{self.name}: all_reduce() comes once a task, got a second one before the commit")
        self.statistics.all_reduce(group)
        self._reduced = True

    def collect(self) -> None:
        """Lets the first process have what all saw, and the others nothing: all there is then to keep of it.

        For a checkpoint within a task; every process calls it. With distributed=False nothing is done.
        """
        if self.distributed and not self._reduced:
            self.statistics.collect(None)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the statistics (gram [dim, dim], or U [dim, l], S [l] and total), basis [dim, k], rows.

        Within a task each process of several has its own. TaskBoundaryError in one of several between `all_reduce` and
        the next commit, but with distributed=False: what is loaded is taken for one process's.
        """
        if self._reduced and self.distributed and processes.count() > 1:
            raise TaskBoundaryError(f"{self.name}: state_dict() comes before all_reduce() or behind the commit")
        return {name: tensor.clone() for name, tensor in {**self.statistics.tensors(), "basis": self.basis}.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`; raises ArgumentError when it is of another width, kind or rank."""
        self.check_state(state)
        self.statistics.load(state)
        self.basis, self._reduced = state["basis"].detach().to(self.basis, copy=True), False

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """What `load_state_dict` raises, and nothing else."""
        check_state(f"{self.name}: state", state, (*self.statistics.names, "rows", "basis"))
        shapes = {name: list(tensor.shape) for name, tensor in self.statistics.tensors().items()}
        found = {name: list(state[name].shape) for name in shapes}
        if found != shapes:
            raise ArgumentError(f"{self.name}: state must have {_listed(shapes)}, got {_listed(found)}")
        self._check_basis(f"{self.name}: state", state["basis"])

    def _check_basis(self, who: str, basis: Tensor) -> None:
        """ArgumentError unless it is [dim, k], k <= dim, and orthonormal."""
        check_tensor(
            f"{who}: basis",
            basis,
            f"floating [{self.dim}, k] with k <= {self.dim}",
            lambda V: are_floats(V) and V.dim() == 2 and V.shape[1] <= len(V) == self.dim,
        )
        with naming(who):
            checked_defect(basis)


def _statistics(
    kind: str, dim: int, rank: int | None, energy_power: int, dtype: torch.dtype, device: torch.device | str | None
) -> Statistics:
    """Empty ones of the kind; the arguments are those of `OnlineEstimator`."""
    if kind == "gram":
        if rank is not None:
            raise ArgumentError(f"OnlineEstimator: rank belongs to estimator='isvd', got {shown(rank)} with 'gram'")
        return Gram(dim, energy_power, dtype, device)
    rank = min(dim, SKETCH_RANK) if rank is None else rank
    check_integer("OnlineEstimator: rank", rank, lambda r: 1 <= r <= dim, f"from 1 to dim = {dim}")
    if energy_power != 1:
        raise ArgumentError("OnlineEstimator: energy_power must be 1 with estimator='isvd', got 2")
    return Sketch(dim, rank, dtype, device)


def _listed(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


@contextmanager
def observing(modules: Mapping[str, nn.Module], estimators: Mapping[str, OnlineEstimator]) -> Iterator[None]:
    """Within it, every estimator observes the first argument of each forward pass of the module of the same name.

    So in compiled models too, where a hook would not do: to a graph that was compiled without it torch.compile never
    adds it, and says nothing. With activation checkpointing each input counts once, although the backward pass computes
    it again. Under autocast the input counts as it is multiplied, in the dtype of autocast.

    Raises ArgumentError where an estimator has no module, or something else in its place.
    """
    for name, value in (("modules", modules), ("estimators", estimators)):
        if not isinstance(value, Mapping):
            raise ArgumentError(f"observing: {name} must be a mapping from names, got {shown(value)}")
    without = sorted(set(estimators) - set(modules))
    if without:
        raise ArgumentError(f"observing: modules must hold every estimator's name, {without[0]} is missing")
    for name in estimators:
        if not isinstance(modules[name], nn.Module):
            raise ArgumentError(f"observing: modules must hold modules, got {shown(modules[name])} for {name}")
        if not isinstance(estimators[name], OnlineEstimator):
            found = f"{shown(estimators[name])} for {name}"
            raise ArgumentError(f"observing: estimators must hold OnlineEstimators, got {found}")
    with ExitStack() as stack:
        for name, estimator in estimators.items():
            stack.enter_context(intercepted(modules[name], _alone(estimator)))
        yield


def _input_of(kwargs: Mapping[str, Any]) -> tuple[str, Any]:
    """Which of a layer's keyword arguments is its input: the first tensor."""
    return next((name, value) for name, value in kwargs.items() if isinstance(value, Tensor))


def _alone(estimator: OnlineEstimator) -> Observer:
    return lambda given, entering: estimator.observe(entering)


@contextmanager
def intercepted(module: nn.Module, observe: Observer) -> Iterator[None]:
    """Within it, `observe(given, entering)` comes before each forward pass of `module`.

    `given` is its first argument, `entering` the same as it enters the product: under autocast in its dtype. The
    instance's `forward` is wrapped, which torch.compile checks before it runs a graph.
    """
    patched = vars(module).get("forward")  # by an outer `observing`, or somebody else

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not module:  # a deep copy made meanwhile runs its own weights, unobserved
            return type(self).forward(self, *args, **kwargs)
        name, given = ("", args[0]) if args else _input_of(kwargs)
        x = ops.autocast(given)
        if getattr(type(self), "_enters_autocast", False):  # a layer of ours: cast once, here, as it would do itself
            args, kwargs = ((x, *args[1:]), kwargs) if args else ((), {**kwargs, name: x})
        observe(given, x)
        return type(self).forward(self, *args, **kwargs) if patched is None else patched(*args, **kwargs)

    module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        if patched is None:
            del module.forward
        else:
            module.forward = patched
