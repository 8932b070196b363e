"""Layers that get one and the same input, as q, k and v of attention do, share an estimator: found out by watching.

Two layers share from the first pass in which the very same tensor is given to both, if nothing was observed for either
before. In every later pass it is checked that they still get the same one. An estimator has the name of the layer that
it observes: the one of the sharing layers that computes first.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from janus_ext import processes
from janus_ext.errors import ArgumentError, TaskBoundaryError
from janus_ext.estimator import Observer, OnlineEstimator, intercepted

Seen = tuple["weakref.ref[Tensor]", int | Tensor]  # a tensor, and by what one sees that it was written into


class SharedInputs:
    """Lets estimators observe the inputs of modules; those of modules with the same input become one.

    Args:
        estimators: by name; where two share, the entry of the second becomes that of the first, in place.
    """

    def __init__(self, estimators: dict[str, OnlineEstimator]) -> None:
        self.estimators = estimators
        self._last: dict[str, Seen] = {}
        self._passes: dict[str, int] = {}
        self._fresh: set[str] = set()

    @contextmanager
    def observing(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within it, the inputs of `modules` are observed, of each by the estimator of its name."""
        self._last, self._passes = {}, dict.fromkeys(modules, 0)
        self._fresh = {name for name in modules if not self.estimators[name].rows}
        with ExitStack() as stack:
            for name, module in modules.items():
                stack.enter_context(intercepted(module, self._observer(name)))
            yield

    def _observer(self, name: str) -> Observer:
        def observe(given: Tensor, entering: Tensor) -> None:
            if torch.compiler.is_compiling():  # a graph keeps no tensor to compare with
                if self.estimators[name].name == name:
                    self.estimators[name].observe(entering)
            elif torch._C._current_graph_task_id() == -1:  # not while checkpointing computes its inputs a second time
                self._observe(name, given, entering)

        return observe

    def _observe(self, name: str, given: Tensor, entering: Tensor) -> None:
        leader = self.estimators[name].name
        if leader != name:
            self._check_shared(name, leader, given)
            return
        self._passes[name] += 1
        leader = self._find_leader(name, given)
        if leader is not None:
            _join(self.estimators, name, leader)
            return
        self.estimators[name].observe(entering)
        self._last = {other: seen for other, seen in self._last.items() if seen[0]() is not None}  # no more copies held
        self._last[name] = weakref.ref(given), given.clone() if given.is_inference() else given._version

    def _find_leader(self, name: str, given: Tensor) -> str | None:
        """A layer whose first input since the last commit is this one's, too, and whose basis is the same."""
        if self._passes[name] > 1 or name not in self._fresh:
            return None
        basis = self.estimators[name].basis
        return next(
            (
                other
                for other in self._last
                if self._passes[other] == 1
                and other in self._fresh
                and self._is_last_of(other, given)
                and torch.equal(self.estimators[other].basis, basis)
            ),
            None,
        )

    def _is_last_of(self, name: str, given: Tensor) -> bool:
        tensor, written = self._last.get(name, (lambda: None, 0))
        if tensor() is not given:
            return False
        return torch.equal(written, given) if isinstance(written, Tensor) else written == given._version

    def _check_shared(self, name: str, leader: str, given: Tensor) -> None:
        if not self._is_last_of(leader, given):
            raise ArgumentError(
                f"{name}: its input must be that of {leader}, as in the first pass that was observed, and is another "
                "one: make the GradientRectifier with share_inputs=False"
            )


def _join(estimators: dict[str, OnlineEstimator], name: str, leader: str) -> None:
    """Lets the leader's estimator take the place of that of `name`, under whatever names that stands."""
    left = estimators[name]
    estimators.update({key: estimators[leader] for key, estimator in estimators.items() if estimator is left})


def share_together(estimators: dict[str, OnlineEstimator]) -> None:
    """Lets the same layers share in every process of torch.distributed; one that observed nothing follows the others.

    Raises:
        TaskBoundaryError: in one process two layers got the same input, in another they did not; in all of them.
    """
    if processes.count() == 1:
        return
    names = list(estimators)
    leaders = [names.index(estimators[name].name) for name in names]
    own = [0 if i == leader else 1 + leader for i, leader in enumerate(leaders)]
    agreed = processes.largest(own)
    differing = [name for name, mine, all_have in zip(names, own, agreed, strict=True) if mine != all_have]
    at_odds = [name for name in differing if estimators[name].rows]
    error = TaskBoundaryError(
        f"{', '.join(at_odds)}: its input is that of another layer in one process, and its own in another: make the "
        "GradientRectifier with share_inputs=False; nothing has changed"
    )
    processes.refuse_together(error if at_odds else None)
    for name in differing:
        _join(estimators, name, names[agreed[names.index(name)] - 1])
