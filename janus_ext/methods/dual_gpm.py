"""DualGPM, the memory of InfLoRA (Liang & Li, CVPR 2024): of the old inputs, or of what they leave free.

Follows the authors' code, which thresholds the squared singular values of H = sum x x^T, hence the fourth powers of
those of the inputs. One departure: where the very first task already takes half of the space or more, their code stores
its directions as the free space (and stops where they are more than half); here their complement is, as in the paper.
For DomainNet their code keeps to the old inputs (GPM), however many directions these take: ``dual`` False.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DualGPM:
    """``basis`` F [n, k], float64: of the old inputs (``kind`` "remove"), or of the free space ("retain")."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dual: bool = True) -> None:
        self.basis = torch.zeros(dim, 0, dtype=torch.float64, device=device)
        self.kind = "remove"
        self.dual = dual

    def free(self, H: Tensor) -> Tensor:
        """H~ [n, n]: the part of H that lies in the free space."""
        inside = self.basis @ (self.basis.mT @ H)
        return H - inside if self.kind == "remove" else inside

    @property
    def rank(self) -> int:
        """How many directions are protected."""
        n, k = self.basis.shape
        return k if self.kind == "remove" else n - k

    def protected(self) -> Tensor:
        """Basis [n, k] of what is protected, whatever is stored."""
        return self.basis if self.kind == "remove" else complement(self.basis)

    def update(self, H: Tensor, threshold: float) -> None:
        """Takes up a task's inputs until a share ``threshold`` of |H|_F^2 is protected; H [n, n] float64, not 0."""
        self._take_up(H, threshold)
        self.basis = self.basis.contiguous()  # as a file gives it back: products of another layout have other bits

    def _take_up(self, H: Tensor, threshold: float) -> None:
        if self.kind == "retain":
            self._shrink(H, threshold)
        else:
            first = not self.basis.shape[1]
            self._grow(H, threshold)
            n, k = self.basis.shape
            if self.dual and (k > n / 2 or (first and k == n / 2)):
                self.basis, self.kind = complement(self.basis), "retain"

    def _grow(self, H: Tensor, threshold: float) -> None:
        """Appends leading directions of the rest of H until the threshold is reached; in the first task just not."""
        U, S, _ = torch.linalg.svd(self.free(H))
        shares = (S.square() / H.square().sum()).cpu()  # a GPU's cumsum is not repeatable
        held = 1 - shares.sum()
        if self.basis.shape[1]:
            before = torch.cat([held[None], held + shares.cumsum(0)[:-1]])  # held when direction i is looked at
            taken = int((before < threshold).sum())
        else:
            taken = max(1, int((shares.cumsum(0) < threshold).sum()))
        self.basis = torch.cat([self.basis, U[:, :taken]], 1)[:, : len(H)]

    def _shrink(self, H: Tensor, threshold: float) -> None:
        """Gives up leading directions of H in the free space while they hold too much of it."""
        U, S, _ = torch.linalg.svd(self.free(H))
        shares = (S.square() / H.square().sum()).cpu()
        left = shares.sum() - torch.cat([shares.new_zeros(1), shares.cumsum(0)[:-1]])
        given = min(int((left >= 1 - threshold).sum()), self.basis.shape[1])
        rest = self.basis - U[:, :given] @ (U[:, :given].mT @ self.basis)
        self.basis = torch.linalg.svd(rest).U[:, : self.basis.shape[1] - given]

    def state_dict(self) -> dict[str, Tensor]:
        """basis [n, k] and whether it spans the free space."""
        return {"basis": self.basis.clone(), "retain": torch.tensor(self.kind == "retain")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from ``state_dict()``."""
        self.basis = state["basis"].to(self.basis, copy=True)
        self.kind = "retain" if bool(state["retain"]) else "remove"


def complement(basis: Tensor) -> Tensor:
    """Orthonormal [n, n - k] orthogonal to the orthonormal ``basis`` [n, k]."""
    return torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]
