"""What a GradientRectifier holds of each layer: an own one, or a pair of factors with the basis that is kept for it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from janus_ext import ops
from janus_ext.arguments import check_text, shown
from janus_ext.errors import ArgumentError, TaskBoundaryError
from janus_ext.lora import LoRALayer
from janus_ext.pairs import checked_pair
from janus_ext.peft_layers import is_lost, is_merged, lora_factors
from janus_ext.protection import project_rows_
from janus_ext.rectification import Rectification

SAFE = 1e-5  # |A V| / |A| that is rounding


@dataclass
class Rectified:
    """One rectified layer: an own layer, or a pair with the basis that the rectifier keeps for it."""

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    module: nn.Module | None
    rectification: Rectification
    layer: LoRALayer | None = None
    pair_basis: Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None
    projected: int | None = None
    """The version of A that is known to have A V = 0; None from a rectified gradient on, since a step may follow.

    Versions alone do not tell: fused optimizers write without counting one.
    """

    def basis(self) -> Tensor | None:
        return self.pair_basis if self.layer is None else self.layer.basis

    def protects(self) -> bool:
        """Whether there is something that updates are to leave alone."""
        return not ops.is_empty(self.basis())

    def effective_A(self) -> Tensor:
        if self.layer is not None:
            return self.layer.forward_A()
        return ops.project(self.A.detach(), self.pair_basis) if self._moved() else self.A.detach()

    @torch.no_grad()
    def project(self) -> None:
        """A <- A P, for a pair under "exact"."""
        if self._plain_exact():
            self.A.copy_(ops.project(self.A, self.pair_basis))
            self.projected = self.A._version

    def settle(self) -> None:
        """Have A V = 0 where that changes no output: of a pair whose A may have been written since it last was.

        Raises ArgumentError where it would change outputs: B is not zero, and A V more than rounding.
        """
        if not self._moved():
            return
        if bool(self.B.any()):
            if not self.is_safe_on(self.pair_basis):
                raise ArgumentError(
                    f"{self.name}: A V must be 0 while B is not: call project() after each optimizer.step() of a loop "
                    "that calls rectify() itself, or attach() its optimizer"
                )
            self.project()
        else:
            project_rows_(self.A, self.pair_basis)
            self.projected = self.A._version

    @property
    def kind(self) -> str:
        """What the layer of the next task has to be, too."""
        return f"{self.A.shape[-1]} wide, {str(self.A.dtype).removeprefix('torch.')} on {self.A.device}"

    def check_consolidated(self, is_new: bool = False) -> None:
        """Raises TaskBoundaryError unless the update is in the weight, and the factors are ready for the next task."""
        merged = is_merged(self.A, self.module)
        if bool(self.B.any()) and is_new:
            raise TaskBoundaryError(
                f"{self.name}: a new adapter must start from B = 0: make it with init_lora_weights=True, 'gaussian' or "
                "'eva', and none that starts from another B, as 'pissa' and 'olora' do"
            )
        if bool(self.B.any()):
            cure = (
                "PEFT's merge_adapter() keeps the factors: zero every B in place, call unmerge_adapter(), which so "
                "takes nothing back, and then commit(); or start a new adapter, see commit(layers=...)"
                if merged
                else "merge the factors first (W += s * B @ A), then zero B in place"
            )
            raise TaskBoundaryError(f"{self.name}: commit() came while B is not zero: {cure}")
        if merged:
            raise TaskBoundaryError(
                f"{self.name}: commit() came while PEFT's adapter is merged: call unmerge_adapter() first"
            )

    def check_succession(self, old: "Rectified") -> None:
        """Raises TaskBoundaryError where the update of the task that ends is no more in what the layer computes."""
        if self.A is not old.A and is_lost(old.A, old.module, self.module) and bool(old.B.any()):
            raise TaskBoundaryError(
                f"{self.name}: the adapter of the task that ends must be merged, or active beside the new one: it is "
                "neither, so that its task is forgotten"
            )

    def is_unsafe(self) -> bool:
        """Whether the present update is known not to leave alone what is protected."""
        return self._plain_exact() and bool(self.B.any()) and not self.is_safe_on(self.pair_basis)

    def check_basis(self, basis: Tensor) -> None:
        """Raises what stands against `resume(basis)`: no room for the factors, or an update that it would change."""
        (r, n), k = self.A.shape[-2:], basis.shape[1]
        if k > n - r:
            raise ArgumentError(f"{self.name}: basis must leave room for rank {r}, k <= n - r = {n - r}, got k = {k}")
        if bool(self.B.any()) and not self.is_safe_on(basis):
            raise TaskBoundaryError(
                f"{self.name}: load_state_dict() came while B is not zero, with a basis that its update does not leave "
                "alone: load between two tasks, or together with the factors of the same moment"
            )

    def protect(self, basis: Tensor) -> None:
        """Protect span(basis) from now on; B is zero."""
        if self.layer is not None:
            self.layer.protect(basis)
            return
        self.pair_basis, self.projected = basis, None
        self.settle()

    def resume(self, basis: Tensor) -> None:
        """Protect a basis of an earlier time; factors that leave it alone already stay as they are, bit for bit."""
        if not self.is_safe_on(basis):
            self.protect(basis)
        elif self.layer is None:
            self.pair_basis, self.projected = basis, self.A._version

    @torch.no_grad()
    def is_safe_on(self, basis: Tensor) -> bool:
        """Whether the present update leaves span(basis) alone: an own layer's by the basis it has, a pair's by A."""
        if self.layer is None:
            off = (self.A.double() @ basis.double()).norm() <= SAFE * self.A.double().norm()
            return self.rectification.rectify != "exact" or bool(off)
        V, held = basis.double(), self.layer.basis.double()
        return V.shape == held.shape and bool((V - held @ (held.mT @ V)).norm() <= SAFE * max(1.0, V.norm()))

    def _plain_exact(self) -> bool:
        return self.layer is None and self.rectification.rectify == "exact" and not ops.is_empty(self.pair_basis)

    def _moved(self) -> bool:
        """Whether A V = 0 is asked of A, and A may have been written since it was last made so."""
        return self._plain_exact() and self.A._version != self.projected


def rectified_layers(layers: Any, rectification: Rectification, adapter: str | None = None) -> list[Rectified]:
    """Those that `GradientRectifier` was given, no factor in two of them; `rectification` is that of pairs."""
    entries = [_rectified(name, item, rectification) for name, item in _named(layers, adapter)]
    if not entries:
        raise ArgumentError(
            "GradientRectifier: layers must hold at least one LoRA layer, of this package or of PEFT, or (A, B) pair, "
            "got none"
        )
    owners: dict[int, str] = {}
    for entry in entries:
        for factor, tensor in (("A", entry.A), ("B", entry.B)):
            if id(tensor) in owners:
                owner = owners[id(tensor)]
                raise ArgumentError(f"{entry.name}: {factor} must belong to one layer, got that of {owner}")
            owners[id(tensor)] = entry.name
    return entries


def _named(layers: Any, adapter: str | None) -> list[tuple[str, Any]]:
    if adapter is not None:
        check_text("GradientRectifier: adapter", adapter, "the name of one, or None")
    if isinstance(layers, nn.Module):
        own = {name: module for name, module in layers.named_modules() if isinstance(module, LoRALayer)}
        factors = lora_factors(layers, adapter)
        if adapter is not None and not factors:
            raise ArgumentError(f"GradientRectifier: adapter {adapter!r} needs PEFT's layers, and the model has none")
        return list((own | factors).items())
    if adapter is not None:
        raise ArgumentError(f"GradientRectifier: adapter belongs to a PEFT model, got {adapter!r} with {shown(layers)}")
    if isinstance(layers, Mapping):
        return list(layers.items())
    if isinstance(layers, (str, Tensor)) or not isinstance(layers, Iterable):
        wanted = "a model, or a mapping or sequence of layers or pairs"
        raise ArgumentError(f"GradientRectifier: layers must be {wanted}, got {shown(layers)}")
    return [(f"layer {i}", item) for i, item in enumerate(layers)]


def _rectified(name: str, item: Any, rectification: Rectification) -> Rectified:
    if isinstance(item, LoRALayer):
        if item.rectify_in != "step":
            raise ArgumentError(f"{name}: the layer rectifies in its backward; make it with rectify_in='step'")
        return Rectified(name, item.A, item.B, item.scale, item, item.rectification, layer=item)
    pair = checked_pair(name, item)
    return Rectified(name, pair.A, pair.B, pair.scale, pair.module, rectification)


def rectify_all(entries: Iterable[Rectified]) -> None:
    """Rectifies the gradients of those that have some; ArgumentError where one factor of a layer has none."""
    groups: dict[Rectification, list[Rectified]] = {}
    for entry in entries:
        if (entry.A.grad is None) != (entry.B.grad is None):
            without = "A" if entry.A.grad is None else "B"
            raise ArgumentError(f"{entry.name}: rectification needs both gradients, {without}.grad is None")
        if entry.A.grad is not None:
            groups.setdefault(entry.rectification, []).append(entry)
    for group in groups.values():
        _rectify_group(group)


def _rectify_group(group: list[Rectified]) -> None:
    """One call for layers that are rectified alike; a layer that the op complains of gets its name."""
    lists = zip(*((e.effective_A(), e.B, e.A.grad, e.B.grad, e.basis(), e.scale) for e in group), strict=True)
    try:
        ops.rectify_(*map(list, lists), group[0].rectification)
    except ValueError as error:
        message = str(error)
        if "earlier call" not in message:  # whose layers may have been others: of another group, rectifier or model
            message = re.sub(r"layer (\d+)", lambda found: group[int(found[1])].name, message)
        raise ArgumentError(message) from error
    for entry in group:
        entry.projected = None
        if entry.layer is not None:
            entry.layer.forget_forward()
