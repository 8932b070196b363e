"""What an estimator keeps of the inputs it has seen: their Gram matrix, or the leading part of its eigendecomposition.

Both are additive over batches and processes. Neither knows tasks, layers or names; `OnlineEstimator` does.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from janus_ext import ops

SKETCH_RANK = 256  # l of an incremental SVD unless told otherwise, where the width allows it


class Statistics(ABC):
    """Tensors that add up the inputs x [..., n] of one task; `names` are the attributes that hold them."""

    names: tuple[str, ...]

    @abstractmethod
    def observe(self, x: Tensor, decay: float) -> None:
        """Multiply what was seen by `decay`, then add x."""

    @abstractmethod
    def extended(self, basis: Tensor, energy: float, cap: int) -> Tensor:
        """`basis` [n, k] grown to `energy`, at most `cap` columns; ValueError where nothing finite was seen."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Add what statistics of the same kind and width saw."""

    @abstractmethod
    def all_reduce(self, group: Any) -> None:
        """Sum over the processes of a `torch.distributed` group, the same on every one."""

    def clear(self) -> None:
        """Forget everything."""
        for name, tensor in self.tensors().items():
            setattr(self, name, torch.zeros_like(tensor))  # not in place: it may have been made in inference mode

    def tensors(self) -> dict[str, Tensor]:
        """The statistics by name, not copied."""
        return {name: getattr(self, name) for name in self.names}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over copies of `tensors`."""
        for name, own in self.tensors().items():
            setattr(self, name, tensors[name].to(own, copy=True))


class Gram(Statistics):
    """C = sum x x^T, [n, n]: exact."""

    names = ("gram",)

    def __init__(self, dim: int, energy_power: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        self.gram = torch.zeros(dim, dim, dtype=dtype, device=device)
        self.energy_power = energy_power

    def observe(self, x: Tensor, decay: float) -> None:
        ops.gram_update_(self.gram, x, decay)

    def extended(self, basis: Tensor, energy: float, cap: int) -> Tensor:
        return ops.extend_basis(basis, self.gram, energy, cap, self.energy_power)

    def merge(self, other: "Gram") -> None:
        self.gram += other.gram.to(self.gram)

    def all_reduce(self, group: Any) -> None:
        torch.distributed.all_reduce(self.gram, group=group)


class Sketch(Statistics):
    """U [n, l], S [l] of an incremental SVD, C ~ U diag(S^2) U^T, and total = sum |x|^2, before truncation."""

    names = ("U", "S", "total")

    def __init__(self, dim: int, rank: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        self.U = torch.zeros(dim, rank, dtype=dtype, device=device)
        self.S = torch.zeros(rank, dtype=dtype, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def observe(self, x: Tensor, decay: float) -> None:
        U, S = ops.isvd_update(self.U, self.S, x, decay)
        blocks = x.reshape(-1, x.shape[-1]).split(len(S))  # in float64, and never all of x at once
        self.total = sum(
            (torch.linalg.vector_norm(block, dtype=torch.float64).square() for block in blocks), decay * self.total
        )
        self.U, self.S = U, S

    def extended(self, basis: Tensor, energy: float, cap: int) -> Tensor:
        return ops.extend_basis_factor(basis, self.U, self.S, self.total, energy, cap)

    def energy_in(self, basis: Tensor) -> float:
        """Share of the energy seen that the sketch can show to lie in span(basis)."""
        return float((basis.double().mT @ (self.U.double() * self.S.double())).square().sum() / self.total)

    def merge(self, other: "Sketch") -> None:
        self.U, self.S = ops.isvd_update(self.U, self.S, (other.U * other.S).mT.to(self.U))
        self.total = self.total + other.total.to(self.total)

    def all_reduce(self, group: Any) -> None:
        everyone = {name: _gathered(tensor, group) for name, tensor in self.tensors().items()}
        self.load({name: states[0] for name, states in everyone.items()})
        for U, S in list(zip(everyone["U"], everyone["S"], strict=True))[1:]:  # in rank order, the same on every rank
            self.U, self.S = ops.isvd_update(self.U, self.S, (U * S).mT)
        self.total = torch.stack(everyone["total"]).sum()


def _gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    """`tensor` of every process, by rank."""
    copies = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(copies, tensor.contiguous(), group=group)
    return copies
