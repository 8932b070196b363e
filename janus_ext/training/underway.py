"""A task in the middle of its training: what its steps change, as tensors and numbers to go on from with the same bits.

All else follows from the files of the task before and from the seed: what a method computes at a task's beginning it
computes anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from janus_ext import processes
from janus_ext.errors import CheckpointError, TrainingError
from janus_ext.named_tensors import below, prefixed
from janus_ext.training.optimization import NOT_NEGATIVE, SLOTS
from janus_ext.training.progress import finite

if TYPE_CHECKING:
    from janus_ext.methods.base import Method
    from janus_ext.training.progress import Progress


class State(NamedTuple):
    """Of a task within its training: named tensors, and values of JSON."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    def check(self, epochs: int, steps: int) -> None:
        """CheckpointError unless it is of a task with so many epochs of so many steps, and tells the time."""
        with _fitting():
            epoch, step = self.position
            if type(epoch) is not int or type(step) is not int:
                raise TypeError(f"epoch and step must be whole numbers, got {epoch!r:.40} and {step!r:.40}")
            within = 0 <= epoch < epochs and 0 <= step <= steps or (epoch, step) == (epochs, 0)
            if not within or not epochs or finite(self.about["seconds"]) < 0:
                raise ValueError(f"it is behind epoch {epoch!r:.40}, step {step!r:.40}, of {epochs} epochs of {steps}")
            if not isinstance(self.versions, dict):
                raise TypeError(f"versions must be a dictionary, got {self.versions!r:.40}")

    @property
    def position(self) -> tuple[int, int]:
        """How many whole epochs are done, and how many steps of the next one."""
        return self.about["epoch"], self.about["step"]

    @property
    def versions(self) -> dict[str, Any]:
        """With what it was computed, as in ``results.json``; earlier versions of this program did not say."""
        return self.about.get("versions", {})


@dataclass
class Underway:
    """What changes from step to step: parameters, optimizer, scaler, the method's statistics, random state, losses."""

    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    device: torch.device

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves: the method's parameters and the newest head's."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state(self, epoch: int, step: int) -> State:
        """Where the task stands, after ``step`` steps of ``epoch``; of several processes, what the first is to keep.

        Raises:
            TrainingError: a loss, a parameter, a moment or a statistic is not finite: nobody could go on with that.
        """
        self.progress.read()
        slots = self.optimizer.state_dict()["state"]
        tensors = {f"parameters.{i}": p.detach() for i, p in enumerate(self.parameters)}
        for index, slot in slots.items():
            tensors |= prefixed(f"optimizer.{index}", {k: v for k, v in slot.items() if isinstance(v, Tensor)})
        tensors |= prefixed("method", self.method.state_within_task())
        for number, random in enumerate(processes.gathered(_random_states(self.device))):
            tensors |= prefixed(_random(number), random)
        self._require_finite(tensors, epoch, step)
        about = {"epoch": epoch, "step": step, "scaler": self.scaler.state_dict(), "progress": self.progress.state()}
        return State(tensors, about)

    def require_finite(self, epoch: int, step: int) -> None:
        """TrainingError, in all processes, where the steps so far left a parameter or a statistic that is not finite.

        No loss tells of the last step, nor of an input whose square is too large.
        """
        tensors = {f"parameters.{i}": p.detach() for i, p in enumerate(self.parameters)}
        self._require_finite(tensors | prefixed("method", self.method.added_up()), epoch, step)

    def _require_finite(self, tensors: dict[str, Tensor], epoch: int, step: int) -> None:
        floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        flags = [tensor.isfinite().all().to(self.device) for tensor in floats.values()]
        whole = torch.stack(flags).tolist()  # the device is waited for once
        broken = [name for name, is_whole in zip(floats, whole, strict=True) if not is_whole]
        if processes.largest([len(broken)])[0]:  # statistics are each process's own, and all end together
            broken = next(found for found in processes.gathered(broken) if found)
            names = {id(parameter): name for name, parameter in self.method.model.named_parameters()}
            kind, index, slot = f"{broken[0]}.".split(".", 2)
            ours = names[id(self.parameters[int(index)])] if kind in ("parameters", "optimizer") else ""
            what = f"{slot[:-1]} of the optimizer for {ours}" if kind == "optimizer" else ours or broken[0]
            raise TrainingError(
                f"{what} is not finite in task {self.progress.task + 1}, behind epoch {epoch} and step {step} of the "
                "next; a smaller --lr, --clip-norm 1 or --amp off may help"
            )

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Takes up what ``state`` gave, behind the beginning of the same task; random state: `restore_epoch`.

        Raises:
            CheckpointError: it does not fit.
        """
        with _fitting():
            self._restore(state)

    def _restore(self, state: State) -> None:
        for index, parameter in enumerate(self.parameters):
            name = f"parameters.{index}"
            parameter.copy_(_like(parameter, name, state.tensors[name]))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": self._slots(state.tensors), "param_groups": groups})
        if self.scaler.is_enabled():
            self._restore_scaler(state.about["scaler"])
        self.method.load_state_within_task(below("method", state.tensors))

    def _slots(self, tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """What the optimizer kept, by its parameters' numbers. A fused step reads and writes as many numbers as the
        parameter has, whatever the shape of what it is given: nothing else may come in.
        """
        parameters, step = dict(enumerate(self.parameters)), torch.zeros(())
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in below("optimizer", tensors).items():
            index, _, key = name.partition(".")
            like = step if key == "step" else parameters[int(index)]
            slots.setdefault(int(index), {})[key] = _like(like, f"optimizer.{name}", tensor)
            if key in NOT_NEGATIVE and bool((tensor < 0).any()):
                raise ValueError(f"optimizer.{name} is negative")
        for index, slot in slots.items():
            if slot.keys() != SLOTS[type(self.optimizer)]:
                raise ValueError(f"optimizer.{index} has {', '.join(sorted(slot))}")
        if slots and isinstance(self.optimizer, torch.optim.SGD):  # a fused step takes momenta of all or of none
            for index, parameter in parameters.items():
                slots.setdefault(index, {"momentum_buffer": torch.zeros_like(parameter)})
        return slots

    def _restore_scaler(self, kept: dict[str, Any]) -> None:
        """What changes of it; the rest are settings, which a fresh one has."""
        fresh = self.scaler.state_dict()
        scale, tracker = finite(kept["scale"]), kept["_growth_tracker"]
        if not scale > 0 or type(tracker) is not int or not 0 <= tracker <= fresh["growth_interval"]:
            raise ValueError(f"the gradients cannot be scaled by {scale}, {tracker!r:.40} steps behind the last change")
        self.scaler.load_state_dict(fresh | {"scale": scale, "_growth_tracker": tracker})

    def restore_epoch(self, state: State) -> None:
        """The random numbers that the model draws next, and the losses of the epoch so far; errors likewise.

        A process that was not there when the state was kept goes on with those it has.
        """
        with _fitting():
            random = below(_random(processes.rank()), state.tensors)
            if random or processes.is_first():
                torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda" and (random or processes.is_first()):
                torch.cuda.set_rng_state(random["cuda"], self.device)
            self.progress.load_state(state.about["progress"])
            if self.progress.step != state.position[1]:
                raise ValueError(f"{self.progress.step} steps are in its sums")


@contextmanager
def _fitting() -> Iterator[None]:
    """Says in one line that a state does not fit what takes it up."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"what was kept within the task does not fit this run: {reason}") from error


def _like(wanted: Tensor, name: str, tensor: Tensor) -> Tensor:
    """``tensor``, if it has the shape and dtype of ``wanted``, and is finite: no other is ever kept."""
    if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
        raise ValueError(f"{name} is {list(tensor.shape)} of {tensor.dtype}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} is not finite")
    return tensor


def _random(process: int) -> str:
    """Under what name the random states of a process are kept."""
    return "random" if process == 0 else f"random-{process}"


def _random_states(device: torch.device) -> dict[str, Tensor]:
    of_gpu = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | of_gpu
