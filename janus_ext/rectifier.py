"""Gradient Rectification as a plug-in: for the layers of `janus_ext.lora` and for LoRA factors that somebody else owns.

model = get_peft_model(base, config)        # PEFT; own layers and (A, B) pairs likewise
rectifier = GradientRectifier(model, energy=0.95)
rectifier.attach(optimizer)                 # rectifies before each step, keeps A V = 0 after it
with rectifier.observe():                   # the last epoch of the task
    train_one_epoch()
model = get_peft_model(model.merge_and_unload(), config)
rectifier.commit(layers=model)              # the task's inputs are protected from now on, in the new adapter's layers

A loop that clips rectified gradients does not attach its optimizer, but calls

loss.backward(); rectifier.rectify(); clip_your_gradients(); optimizer.step(); rectifier.project()
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from janus_ext.arguments import check_flag, check_integer, check_number, first_of, shown
from janus_ext.errors import ArgumentError, TaskBoundaryError, warn
from janus_ext.estimator import NothingObserved, OnlineEstimator, observing
from janus_ext.pairs import warn_of_rounded_weights
from janus_ext.processes import refuse_together
from janus_ext.rectification import Rectification, rectification_of
from janus_ext.rectified import Rectified, rectified_layers, rectify_all
from janus_ext.shared_inputs import SharedInputs, share_together


class GradientRectifier:
    """Rectifies the gradients of many layers in one call before the optimizer's step, and protects their old inputs.

    In data-parallel training every process has its rectifier, and all of them call `commit` together.

    Args:
        layers: a model with layers of `janus_ext.lora` or LoRA layers of PEFT; or such layers or (A, B) pairs
            (`LoRAPair`, or plain tuples of its fields), as a mapping from names or as a sequence.
        energy: share of the observed input energy that `commit` protects, in [0, 1].
        adapter: of a PEFT model, the one that is rectified; None: the one that is active. What PEFT trains beside it
            (`modules_to_save`) is left alone.
        rectify: for pairs and PEFT: a `Rectification`, or the name of one; "tangent" only while nothing is protected.
            Own layers have their own, and must be made with rectify_in="step".
        estimator, estimator_rank: "gram" or "isvd" and its rank, see `OnlineEstimator`.
        energy_power: see `janus_ext.ops.extend_basis`.
        share_inputs: whether layers that are seen to get the very same input (q, k and v of attention) share an
            estimator: observed once, one basis. Found out in the first observed pass of a task, checked in all others;
            not in compiled ones.
        distributed: where torch.distributed runs several processes, `commit` protects what all of them observed, see
            `OnlineEstimator`.
        options: damping, share and balance of a `Rectification` that is given by name.

    Raises:
        ArgumentError: no layer, factors in half precision or of shapes that do not fit, layers that rectify in their
            own backward, or adapters of PEFT that compute or train more than W x + s B A x.
    """

    def __init__(
        self,
        layers: nn.Module | Mapping[str, Any] | Iterable[Any],
        energy: float = 0.9,
        *,
        adapter: str | None = None,
        rectify: str | Rectification = "exact",
        estimator: str = "gram",
        estimator_rank: int | None = None,
        energy_power: int = 1,
        share_inputs: bool = True,
        distributed: bool = True,
        **options: Any,
    ) -> None:
        check_number("GradientRectifier: energy", energy, lambda e: 0 <= e <= 1, "in [0, 1]")
        self._rectification = rectification_of("GradientRectifier", rectify, options)
        if estimator_rank is not None:
            check_integer("GradientRectifier: estimator_rank", estimator_rank, lambda r: r >= 1, "positive")
        check_flag("GradientRectifier: share_inputs", share_inputs)
        check_flag("GradientRectifier: distributed", distributed)
        self.energy, self.share_inputs, self.distributed = energy, share_inputs, distributed
        self._entries = rectified_layers(layers, self._rectification, adapter)
        self._estimating = {
            "estimator": estimator,
            "rank": estimator_rank,
            "energy_power": energy_power,
            "distributed": distributed,
        }
        self.estimators = self._make_estimators()
        self._idle = False  # whether it was said that no factor of this task has a gradient
        warn_of_rounded_weights({e.name: e.module for e in self._entries if e.layer is None})

    def _make_estimators(self) -> dict[str, OnlineEstimator]:
        """One for each observed module: pairs that share a module share their input, hence the estimator."""
        estimators: dict[str, OnlineEstimator] = {}
        by_module: dict[int, OnlineEstimator] = {}
        for entry in self._entries:
            key = id(entry.A) if entry.module is None else id(entry.module)
            if key not in by_module:
                where = {"dtype": entry.A.dtype, "device": entry.A.device}
                by_module[key] = OnlineEstimator(entry.A.shape[-1], name=entry.name, **self._estimating, **where)
            elif by_module[key].dim != entry.A.shape[-1]:
                wanted, found = by_module[key].dim, entry.A.shape[-1]
                raise ArgumentError(f"{entry.name}: A must be [r, {wanted}] as others on its module, got [r, {found}]")
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
        modules = {entry.name: entry.module for entry in reversed(first)}
        if self.share_inputs:
            with SharedInputs(self.estimators).observing(modules):
                yield
        else:
            with observing(modules, {name: self.estimators[name] for name in modules}):
                yield

    def commit(self, energy: float | None = None, layers: Any = None, adapter: str | None = None) -> None:
        """End the task: protect what was observed, from now on. Merge the factors first, so that every B is zero.

        With PEFT: `model = get_peft_model(model.merge_and_unload(), config)`, then `commit(layers=model)`; or keep the
        adapter by `merge_adapter()`, zero every B in place, `unmerge_adapter()`, which so takes nothing back, and
        `commit()`. Attached optimizers forget their state of the factors: momenta of the last task know nothing of the
        next.

        Args:
            energy: share of the observed energy that is protected, if not the rectifier's own.
            layers: those of the next task where they are new ones, as the constructor takes them, under the same names
                and with inputs of the same width; of a PEFT model the active adapter's, or those of `adapter`. PEFT's
                `unload()` in place of `merge_and_unload()` forgets the task, and nobody can see that.

        A layer that got no input in the task, as an expert that was never asked, keeps its basis, with a warning.

        Raises:
            ArgumentError: layers are others than before.
            TaskBoundaryError: a B is not zero, or PEFT's adapter still merged, or one of before is neither merged nor
                active, in any process; nothing has changed.
            StatisticsError: nothing was observed, or a layer's statistics are zero or not finite; nothing has changed.
        """
        entries = self._entries if layers is None else self._successors(layers, adapter)
        refusal = self._refusal(entries)
        if self.distributed:
            refuse_together(refusal)
            share_together(self.estimators)
        elif refusal is not None:
            raise refusal
        share = self.energy if energy is None else energy
        estimators = {id(e): e for e in self.estimators.values()}
        rooms = {key: e.dim - self._rank_on(e, entries) for key, e in estimators.items()}
        bases = _held_once(_extended(estimators, share, rooms))
        self._warn_of_unrectified()
        for key, basis in bases.items():  # all were looked at before any is changed
            estimators[key].adopt(basis)
        self._entries, self._idle = entries, False
        for entry in self._entries:
            entry.protect(bases[id(self.estimators[entry.name])])
            if entry.optimizer is not None:
                for factor in (entry.A, entry.B):
                    entry.optimizer.state.pop(factor, None)

    def _successors(self, layers: Any, adapter: str | None) -> list[Rectified]:
        """The layers of the next task, by the names of the present ones."""
        entries = rectified_layers(layers, self._rectification, adapter)
        wanted, found = ({e.name: e.kind for e in group} for group in (self._entries, entries))
        if found != wanted:
            differing = next(name for name in (wanted | found) if wanted.get(name) != found.get(name))
            raise ArgumentError(
                f"commit: layers must have the names, widths, dtypes and devices of before: {differing} is "
                f"{found.get(differing, 'missing')}, and was {wanted.get(differing, 'missing')}"
            )
        by_name = {entry.name: entry for entry in entries}
        warn_of_rounded_weights({e.name: e.module for e in entries if e.layer is None})
        return [by_name[name] for name in wanted]

    def _refusal(self, entries: list[Rectified]) -> TaskBoundaryError | None:
        """What stands against a commit in this process."""
        try:
            for old, entry in zip(self._entries, entries, strict=True):
                entry.check_consolidated(is_new=entry.A is not old.A)
                entry.check_succession(old)
        except TaskBoundaryError as error:
            return error
        return None

    def _warn_of_unrectified(self) -> None:
        """One warning where a task's update reached what the tasks before it protect."""
        moved = [entry.name for entry in self._entries if entry.is_unsafe()]
        if moved:
            warn(
                f"{first_of(moved)}: the update of this task was not kept from protected inputs: attach() the "
                "optimizer of every task, or call rectify() before and project() behind its steps"
            )

    def _rank_on(self, estimator: OnlineEstimator, entries: list[Rectified]) -> int:
        return max(e.A.shape[-2] for e in entries if self.estimators[e.name] is estimator)

    def rectify(self) -> None:
        """Rewrite `.grad` of all factors, rectified: after unscaling, before clipping and the optimizer's step.

        For loops that do not attach their optimizer. With plain pairs under "exact", `project()` follows each step.
        Where B is zero, factors that were drawn anew are projected here; `project()` right after the draw lets the
        first gradients be those of the projected A.

        Where no factor has a gradient nothing is done, and one warning a task says so. Raises ArgumentError when one
        factor of a layer has a gradient and the other has none, when a pair under "exact" has A V far from 0, or an
        attached optimizer would rectify a second time.
        """
        for entry in self._entries:
            if entry.optimizer is not None:
                raise ArgumentError(
                    f"{entry.name}: rectify() would come twice, since the attached optimizer rectifies before its "
                    "step: a loop that calls it does not attach, and calls project() after each step"
                )
            entry.settle()
        self._rectify(self._entries)

    def _rectify(self, entries: list[Rectified]) -> None:
        protecting = [entry.name for entry in entries if entry.protects()]
        if protecting and not self._idle and all(entry.A.grad is None and entry.B.grad is None for entry in entries):
            self._idle = True
            warn(
                f"{first_of(protecting)}: no rectified factor has a gradient, so nothing is rectified: where other "
                "factors are trained by now, as another adapter's, commit(layers=...) names them"
            )
        rectify_all(entries)

    def project(self) -> None:
        """A <- A P for every pair under "exact": what an optimizer's step may have broken. Own layers need none."""
        for entry in self._entries:
            entry.project()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on `optimizer.step()` rectifies first, and restores A V = 0 of plain pairs afterwards.

        With `step(closure)` the gradients of each call of the closure are rectified. What runs between the backward and
        `step()`, such as clipping, sees plain gradients; a loop that clips calls `rectify()` and `project()` itself
        instead. A factor's new optimizer takes the place of its old one. Wrappers (accelerate's, Lightning's) are
        looked through.

        Raises:
            ArgumentError: the optimizer is attached already, or holds no factor of a rectified layer, or one of two;
                or a pair's A V is not 0 while B is not.
        """
        optimizer = _unwrapped(optimizer)
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
            entry.settle()
        for entry in entries:
            entry.optimizer = optimizer
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def _attached(self, optimizer: torch.optim.Optimizer) -> list[Rectified]:
        return [entry for entry in self._entries if entry.optimizer is optimizer]

    def _before_step(self, stepping: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Rectify now, or after each call of the closure that computes the gradients: args are (self, closure, ...)."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._rectify(self._attached(stepping))
            return None
        closure = self._rectifying(closure, stepping)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def _rectifying(self, closure: Callable[..., Any], stepping: torch.optim.Optimizer) -> Callable[..., Any]:
        def rectifying(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            self._rectify(self._attached(stepping))
            return loss

        return rectifying

    def _after_step(self, stepping: torch.optim.Optimizer, *_: Any) -> None:
        for entry in self._attached(stepping):
            entry.project()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The estimators' states by layer name; pairs' bases are those of the estimators."""
        return {name: estimator.state_dict() for name, estimator in self.estimators.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from `state_dict()`, with factors as they are: protected from now on is what the state protects.

        Where B is zero, A is projected and own layers get the basis. Otherwise the factors must be of the task that the
        state is of: load them first, or while B is zero.

        Raises:
            ArgumentError: the layers are not the same, or a rank too large for the basis; nothing has changed.
            TaskBoundaryError: a B is not zero and the layer's update not one that leaves the basis alone; likewise.
        """
        if not isinstance(state, Mapping) or set(state) != set(self.estimators):
            found = sorted(map(str, state)) if isinstance(state, Mapping) else shown(state)
            raise ArgumentError(f"GradientRectifier: state must hold layers {sorted(self.estimators)}, got {found}")
        for entry in self._entries:
            self.estimators[entry.name].check_state(state[entry.name])
            entry.check_basis(state[entry.name]["basis"].to(entry.A))
        self.estimators = self._make_estimators()  # layers that shared one may have had two when the state was taken
        for name, estimator in self.estimators.items():
            estimator.load_state_dict(state[name])
        bases = _held_once({name: estimator.basis for name, estimator in self.estimators.items()})
        for name, estimator in self.estimators.items():
            estimator.basis = bases[name]
        for entry in self._entries:
            entry.resume(self.estimators[entry.name].basis)


def _held_once(bases: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """Equal bases as one tensor, so that layers are rectified together, to the same bits, whatever way they came."""
    alike: dict[Any, list[Tensor]] = {}
    held = {}
    for key, basis in bases.items():
        kept = alike.setdefault((basis.device, basis.dtype, basis.shape), [])
        same = next((other for other in kept if torch.equal(other, basis)), None)
        if same is None:
            kept.append(basis)
        held[key] = basis if same is None else same
    return held


def _extended(estimators: dict[int, OnlineEstimator], share: float, rooms: dict[int, int]) -> dict[int, Tensor]:
    """The next basis of every estimator; the present one where nothing was observed, unless that is so of all."""
    bases, unseen = {}, []
    for key, estimator in estimators.items():
        try:
            bases[key] = estimator.extended(share, rooms[key])
        except NothingObserved as error:
            bases[key] = estimator.basis
            unseen.append(error)
    if len(unseen) == len(estimators):
        raise unseen[0]
    if unseen:
        names = ", ".join(str(error).partition(":")[0] for error in unseen)
        warn(f"{names}: no input was observed since the last commit, what was protected stays so")
    return bases


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The innermost optimizer, whose step is the one that is taken: accelerate, Lightning and Fabric hold it.

    They may share its hooks, by a copy of its `__dict__`, but it is the inner one that the hooks are called with.
    """
    outer, found = optimizer, None
    while optimizer is not found:
        found, optimizer = optimizer, getattr(optimizer, "optimizer", getattr(optimizer, "_optimizer", optimizer))
    if not isinstance(found, torch.optim.Optimizer):
        raise ArgumentError(
            f"attach: optimizer must be a torch.optim.Optimizer, or hold one as .optimizer, got {shown(outer)}"
        )
    return found
