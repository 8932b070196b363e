"""What an estimator keeps of the inputs it has seen: their Gram matrix, or the leading part of its eigendecomposition.

Both are additive over batches and processes. Neither knows tasks, layers or names; `OnlineEstimator` does. Their
tensors stay the same ones, written in place: by one op a batch, `observe_gram_` or `observe_sketch_`, which
torch.compile leaves whole. While autograd runs a backward pass the ops do nothing: there activation checkpointing
computes anew what they have seen.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from janus_ext import ops, processes

SKETCH_RANK = 256  # l of an incremental SVD unless told otherwise, where the width allows it


class Statistics(ABC):
    """Tensors that add up the inputs x [..., n] of one task; `names` are the attributes that hold them.

    Attributes:
        rows: how many inputs were seen, int64.
    """

    names: tuple[str, ...]

    def __init__(self, device: torch.device | str | None) -> None:
        self.rows = _zeros(dtype=torch.int64, device=device)

    @abstractmethod
    def observe(self, x: Tensor, decay: float) -> None:
        """Multiply what was seen by `decay`, then add x; nothing while a backward pass runs."""

    @abstractmethod
    def extended(self, basis: Tensor, energy: float, cap: int) -> Tensor:
        """`basis` [n, k] grown to `energy`, at most `cap` columns; ValueError where nothing finite was seen."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Add what statistics of the same kind and width saw."""

    @abstractmethod
    def all_reduce(self, group: Any) -> None:
        """Sum over the processes of a `torch.distributed` group, the same on every one."""

    def collect(self, group: Any) -> None:
        """The same sum, which the first process has afterwards; the others have seen nothing any more."""
        self._add_up_at_first(group)
        if processes.rank(group):
            self.clear()

    @abstractmethod
    def _add_up_at_first(self, group: Any) -> None: ...

    def clear(self) -> None:
        """Forget everything."""
        for tensor in self.tensors().values():
            tensor.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """The statistics by name, not copied."""
        return {name: getattr(self, name) for name in (*self.names, "rows")}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over copies of `tensors`."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name].detach())


class Gram(Statistics):
    """C = sum x x^T, [n, n]: exact."""

    names = ("gram",)

    def __init__(self, dim: int, energy_power: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__(device)
        self.gram = _zeros(dim, dim, dtype=dtype, device=device)
        self.energy_power = energy_power

    def observe(self, x: Tensor, decay: float) -> None:
        torch.ops.janus_ext.observe_gram_(self.gram, self.rows, x, decay)

    def extended(self, basis: Tensor, energy: float, cap: int) -> Tensor:
        return ops.extend_basis(basis, self.gram, energy, cap, self.energy_power)

    def merge(self, other: "Gram") -> None:
        self.gram += other.gram.to(self.gram)
        self.rows += other.rows.to(self.rows)

    def all_reduce(self, group: Any) -> None:
        for tensor in (self.gram, self.rows):
            processes.add_up(tensor, group)

    def _add_up_at_first(self, group: Any) -> None:
        for tensor in (self.gram, self.rows):
            processes.add_up_at_first(tensor, group)


class Sketch(Statistics):
    """U [n, l], S [l] of an incremental SVD, C ~ U diag(S^2) U^T, and total = sum |x|^2, before truncation."""

    names = ("U", "S", "total")

    def __init__(self, dim: int, rank: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__(device)
        self.U = _zeros(dim, rank, dtype=dtype, device=device)
        self.S = _zeros(rank, dtype=dtype, device=device)
        self.total = _zeros(dtype=torch.float64, device=device)

    def observe(self, x: Tensor, decay: float) -> None:
        torch.ops.janus_ext.observe_sketch_(self.U, self.S, self.total, self.rows, x, decay)

    def extended(self, basis: Tensor, energy: float, cap: int) -> Tensor:
        return ops.extend_basis_factor(basis, self.U, self.S, self.total, energy, cap)

    def energy_in(self, basis: Tensor) -> float:
        """Share of the energy seen that the sketch can show to lie in span(basis)."""
        return float((basis.double().mT @ (self.U.double() * self.S.double())).square().sum() / self.total)

    def merge(self, other: "Sketch") -> None:
        self._add_factor(other.U, other.S)
        self.total += other.total.to(self.total)
        self.rows += other.rows.to(self.rows)

    def all_reduce(self, group: Any) -> None:
        self._add_up_at_first(group)
        for tensor in self.tensors().values():
            processes.copy_from_first(tensor, group)

    def _add_up_at_first(self, group: Any) -> None:
        processes.fold((self.U, self.S), self._add_factor, group)
        for tensor in (self.total, self.rows):
            processes.add_up_at_first(tensor, group)

    def _add_factor(self, U: Tensor, S: Tensor) -> None:
        new = ops.isvd_update(self.U, self.S, (U * S).mT.to(self.U))
        for own, tensor in zip((self.U, self.S), new, strict=True):
            own.copy_(tensor)


def _zeros(*shape: int, **options: Any) -> Tensor:
    """Zeros that are written in place outside of inference mode too, wherever they were made."""
    with torch.inference_mode(False):
        return torch.zeros(shape, **options)


# one batch, as one op -------------------------------------------------------------------------------------------------


def _observe_gram(gram: Tensor, rows: Tensor, x: Tensor, decay: float) -> None:
    if _in_backward():
        return
    ops.gram_update_(gram, x, decay)
    rows += x.numel() // x.shape[-1]


def _observe_sketch(U: Tensor, S: Tensor, total: Tensor, rows: Tensor, x: Tensor, decay: float) -> None:
    if _in_backward():
        return
    new_U, new_S = ops.isvd_update(U, S, x, decay)  # raises before anything is written
    total *= decay
    for block in x.reshape(-1, x.shape[-1]).split(len(S)):  # in float64, and never all of x at once
        total += torch.linalg.vector_norm(block, dtype=torch.float64).square()
    U.copy_(new_U)
    S.copy_(new_S)
    rows += x.numel() // x.shape[-1]


def _in_backward() -> bool:
    """Whether autograd is at work in this thread, as torch.utils.checkpoint itself asks."""
    return torch._C._current_graph_task_id() != -1


_library = torch.library.Library("janus_ext", "FRAGMENT")
for _name, _written, _kernel in (
    ("observe_gram_", "Tensor(a!) gram, Tensor(b!) rows", _observe_gram),
    ("observe_sketch_", "Tensor(a!) U, Tensor(b!) S, Tensor(c!) total, Tensor(d!) rows", _observe_sketch),
):
    _library.define(f"{_name}({_written}, Tensor x, float decay) -> ()", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"janus_ext::{_name}", lambda *_: None, lib=_library)
