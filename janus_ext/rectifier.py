"""Gradient Rectification as a plug-in: for the layers of `janus_ext.lora` and for LoRA factors that somebody else owns.

rectifier = GradientRectifier(pairs, energy=0.95)
rectifier.attach(optimizer)                 # rectifies before each step, keeps A V = 0 after it
with rectifier.observe():                   # the last epoch of the task
    train_one_epoch()
merge_your_factors(); rectifier.commit()    # the task's inputs are protected from now on
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from janus_ext import ops
from janus_ext.errors import ArgumentError, TaskBoundaryError
from janus_ext.estimator import OnlineEstimator, observing
from janus_ext.lora import LoRALayer, check_rectification, project_rows_


class LoRAPair(NamedTuple):
    """LoRA factors that somebody else owns: the layer computes W x + s B (A x).

    Attributes:
        A: [r, n] parameter, float32 or float64.
        B: [m, r] parameter.
        scale: s.
        module: the module whose input is x (observed by `GradientRectifier.observe`), or None.
    """

    A: nn.Parameter
    B: nn.Parameter
    scale: float = 1.0
    module: nn.Module | None = None


@dataclass
class _Entry:
    """One rectified layer: an own layer, or a pair with the basis that the rectifier keeps for it."""

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    module: nn.Module | None
    options: dict[str, Any]
    layer: LoRALayer | None = None
    pair_basis: Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None

    def basis(self) -> Tensor | None:
        return self.pair_basis if self.layer is None else self.layer.basis

    def effective_A(self) -> Tensor:
        return self.A.detach() if self.layer is None else self.layer.forward_A()


class GradientRectifier:
    """Rectifies the gradients of many layers in one call before the optimizer's step, and protects their old inputs.

    Args:
        layers: a model with layers of `janus_ext.lora`; or such layers or (A, B) pairs (`LoRAPair`, or plain tuples of
            its fields), as a mapping from names or as a sequence.
        energy: share of the observed input energy that `commit` protects, in [0, 1].
        rectify: for pairs: "none", "project", "tangent" (only while nothing is protected) or "exact". Own layers have
            their own, and must be made with rectify_in="step".
        damping, share, balance: for pairs; see `janus_ext.ops.lora_linear`.
        estimator, estimator_rank: "gram" or "isvd" and its rank, see `OnlineEstimator`.
        energy_power: see `janus_ext.ops.extend_basis`.

    Raises:
        ArgumentError: no layer, factors in half precision or of shapes that do not fit, or layers that rectify in their
            own backward.
    """

    def __init__(
        self,
        layers: nn.Module | Mapping[str, Any] | Iterable[Any],
        energy: float = 0.9,
        *,
        rectify: str = "exact",
        damping: float = ops.DAMPING,
        share: float = ops.SHARE,
        balance: bool = True,
        estimator: str = "gram",
        estimator_rank: int | None = None,
        energy_power: int = 1,
    ) -> None:
        if not 0 <= energy <= 1:
            raise ArgumentError(f"GradientRectifier: energy must be in [0, 1], got {energy:g}")
        check_rectification("GradientRectifier", 1.0, rectify, damping, share)
        options = {"rectify": rectify, "damping": damping, "share": share, "balance": balance}
        self.energy = energy
        self._entries = [_entry(name, item, options) for name, item in _named(layers)]
        if not self._entries:
            raise ArgumentError("GradientRectifier: layers must hold at least one LoRA layer or (A, B) pair, got none")
        self.estimators = self._make_estimators(estimator, estimator_rank, energy_power)

    def _make_estimators(self, kind: str, rank: int | None, energy_power: int) -> dict[str, OnlineEstimator]:
        """One for each observed module: pairs that share a module share their input, hence the estimator."""
        estimators: dict[str, OnlineEstimator] = {}
        by_module: dict[int, OnlineEstimator] = {}
        for entry in self._entries:
            key = id(entry.A) if entry.module is None else id(entry.module)
            if key not in by_module:
                where = {"dtype": entry.A.dtype, "device": entry.A.device}
                by_module[key] = OnlineEstimator(
                    entry.A.shape[-1], kind, rank, name=entry.name, energy_power=energy_power, **where
                )
            estimators[entry.name] = by_module[key]
        return estimators

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Within it, the inputs of every layer are observed in each forward pass, compiled ones included.

        Pairs without a module cannot be watched: feed `rectifier.estimators[name].observe(x)` yourself.
        """
        for entry in self._entries:
            if entry.module is None:
                raise ArgumentError(f"{entry.name}: observe() needs the pair's module, got None")
        first = {id(e.module): e for e in reversed(self._entries)}.values()  # of the pairs on one module
        names = [entry.name for entry in first]
        with observing({e.name: e.module for e in first}, {name: self.estimators[name] for name in names}):
            yield

    def commit(self, energy: float | None = None) -> None:
        """End the task: protect what was observed, from now on. Merge the factors first, so that every B is zero.

        Attached optimizers forget their state of the factors: momenta of the last task know nothing of the next.

        Raises:
            TaskBoundaryError: a B is not zero; nothing has changed.
            StatisticsError: a layer's statistics are empty, zero or not finite; nothing has changed.
        """
        for entry in self._entries:
            if bool(entry.B.any()):
                raise TaskBoundaryError(f"{entry.name}: commit() came while B is not zero: merge the factors first")
        share = self.energy if energy is None else energy
        estimators = {id(e): e for e in self.estimators.values()}
        rooms = {key: e.dim - self._rank_on(e) for key, e in estimators.items()}
        bases = {key: estimator.extended(share, rooms[key]) for key, estimator in estimators.items()}
        for key, basis in bases.items():  # all were looked at before any is changed
            estimators[key].adopt(basis)
        for entry in self._entries:
            self._protect(entry, bases[id(self.estimators[entry.name])])
            if entry.optimizer is not None:
                for factor in (entry.A, entry.B):
                    entry.optimizer.state.pop(factor, None)

    def _rank_on(self, estimator: OnlineEstimator) -> int:
        return max(e.A.shape[-2] for e in self._entries if self.estimators[e.name] is estimator)

    def _protect(self, entry: _Entry, basis: Tensor) -> None:
        if entry.layer is not None:
            entry.layer.protect(basis)
            return
        entry.pair_basis = basis
        if entry.options["rectify"] == "exact":
            project_rows_(entry.A, basis)

    def rectify(self) -> None:
        """Rewrite `.grad` of all factors, rectified: after unscaling, before clipping and the optimizer's step.

        Raises ArgumentError when one factor of a layer has a gradient and the other has none.
        """
        self._rectify(self._entries)

    def _rectify(self, entries: list[_Entry]) -> None:
        groups: dict[tuple[Any, ...], list[_Entry]] = {}
        for entry in entries:
            if (entry.A.grad is None) != (entry.B.grad is None):
                without = "A" if entry.A.grad is None else "B"
                raise ArgumentError(f"{entry.name}: rectification needs both gradients, {without}.grad is None")
            if entry.A.grad is not None:
                groups.setdefault(tuple(entry.options.values()), []).append(entry)
        for group in groups.values():
            ops.rectify_(
                [e.effective_A() for e in group],
                [e.B for e in group],
                [e.A.grad for e in group],
                [e.B.grad for e in group],
                [e.basis() for e in group],
                [e.scale for e in group],
                **group[0].options,
            )

    def project(self) -> None:
        """A <- A P for every pair under "exact": what an optimizer's step may have broken. Own layers need none."""
        self._project(self._entries)

    @torch.no_grad()
    def _project(self, entries: list[_Entry]) -> None:
        for entry in entries:
            if entry.layer is None and entry.options["rectify"] == "exact" and not ops.is_empty(entry.pair_basis):
                entry.A.copy_(ops.project(entry.A, entry.pair_basis))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on `optimizer.step()` rectifies first, and restores A V = 0 of plain pairs afterwards.

        What runs between the backward and `step()`, such as clipping, sees plain gradients; a loop that clips calls
        `rectify()` itself instead. A factor's new optimizer takes the place of its old one.

        Raises:
            ArgumentError: the optimizer is attached already, or holds no factor of a rectified layer, or one of two.
        """
        if self._attached(optimizer):
            raise ArgumentError("attach: optimizer must be new to this rectifier, got one that is attached already")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        entries = [e for e in self._entries if id(e.A) in held or id(e.B) in held]
        if not entries:
            raise ArgumentError("attach: optimizer must hold the factors of the rectified layers, got none of them")
        for entry in entries:
            if id(entry.A) not in held or id(entry.B) not in held:
                raise ArgumentError(f"attach: optimizer must hold both factors of a layer, got one of {entry.name}")
        for entry in entries:
            entry.optimizer = optimizer
        optimizer.register_step_pre_hook(lambda stepping, *_: self._rectify(self._attached(stepping)))
        optimizer.register_step_post_hook(lambda stepping, *_: self._project(self._attached(stepping)))

    def _attached(self, optimizer: torch.optim.Optimizer) -> list[_Entry]:
        return [entry for entry in self._entries if entry.optimizer is optimizer]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The estimators' states by layer name; pairs' bases are those of the estimators."""
        return {name: estimator.state_dict() for name, estimator in self.estimators.items()}

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        """Continue from `state_dict()`; raises ArgumentError when the layers are not the same."""
        if set(state) != set(self.estimators):
            raise ArgumentError(f"state must hold layers {sorted(self.estimators)}, got {sorted(state)}")
        for name, estimator in self.estimators.items():
            estimator.load_state_dict(state[name])
        for entry in self._entries:
            if entry.layer is None:
                entry.pair_basis = self.estimators[entry.name].basis


def _named(layers: nn.Module | Mapping[str, Any] | Iterable[Any]) -> list[tuple[str, Any]]:
    if isinstance(layers, nn.Module):
        return [(name, module) for name, module in layers.named_modules() if isinstance(module, LoRALayer)]
    if isinstance(layers, Mapping):
        return list(layers.items())
    return [(f"layer {i}", item) for i, item in enumerate(layers)]


def _entry(name: str, item: Any, options: dict[str, Any]) -> _Entry:
    if isinstance(item, LoRALayer):
        if item.rectify_in != "step":
            raise ArgumentError(f"{name}: the layer rectifies in its backward; make it with rectify_in='step'")
        return _Entry(name, item.A, item.B, item.scale, item, item.options(), layer=item)
    if not isinstance(item, Sequence) or not 2 <= len(item) <= 4:
        raise ArgumentError(f"{name}: must be a LoRA layer or (A, B[, scale[, module]]), got {type(item).__name__}")
    pair = LoRAPair(*item)
    _check_pair(name, pair)
    return _Entry(name, pair.A, pair.B, pair.scale, pair.module, options)


def _check_pair(name: str, pair: LoRAPair) -> None:
    for factor, tensor in (("A", pair.A), ("B", pair.B)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(
                f"{name}: {factor} must be float32 or float64, got {str(tensor.dtype).removeprefix('torch.')}: "
                "half precision cannot keep A V = 0; hold the adapter in float32"
            )
    if pair.A.dim() != 2 or pair.B.dim() != 2 or pair.A.shape[0] != pair.B.shape[1]:
        raise ArgumentError(
            f"{name}: A and B must be [r, n] and [m, r], got {list(pair.A.shape)} and {list(pair.B.shape)}"
        )
