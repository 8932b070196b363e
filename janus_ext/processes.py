"""The processes that torch.distributed runs: what they share out, add up and agree on.

All processes call these functions, in the same order; one that is alone gets back what it gave. Who ends while the
others wait for it ends them, too: as `ProcessError`, and one of them says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from janus_ext.arguments import check_tensor, shown
from janus_ext.errors import ArgumentError, JanusError, ProcessError

T = TypeVar("T")
PATIENCE = timedelta(minutes=15)  # without an answer; a process that waits for its disk gives up earlier, and says so
PREPARING = timedelta(days=1)  # while one fetches, decodes or checks for all
LONGEST = 60  # characters of a value in a message
_store: dist.Store | None = None  # of the group that `joined` has made
_patient: Any = None  # the same processes as another group, in which they wait for what is prepared
_given_up = False


# who is there ---------------------------------------------------------------------------------------------------------
def count(group: Any = None) -> int:
    """How many torch.distributed runs; 1 where it was not started."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Any = None) -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank(group) if count(group) > 1 else 0


def check_group(name: str, value: Any) -> None:
    """ArgumentError unless it is a group of torch.distributed, this process in it or not, or None for all processes."""
    if value is None or (dist.is_available() and value is dist.GroupMember.NON_GROUP_MEMBER):
        return
    if not dist.is_available() or not isinstance(value, dist.ProcessGroup):
        raise ArgumentError(f"{name} must be a group of torch.distributed or None, got {shown(value)}")


def is_first() -> bool:
    """Whether this process writes, and says what there is to say."""
    return rank() == 0


def on_this_machine() -> tuple[int, int]:
    """The number of this process among those of its machine, and how many these are, as the launcher tells."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def by_torchrun() -> bool:
    """Whether torchrun has begun this process: a signal to all comes twice then, the second time passed on by it."""
    return dist.is_torchelastic_launched()


@contextmanager
def joined() -> Iterator[None]:
    """Within it, the processes that torchrun has begun are one group: gloo for the CPU's tensors, nccl for a GPU's.

    Without torchrun there is nothing to join.

    Raises:
        ProcessError: the others do not come.
    """
    global _store, _patient
    if count() > 1 or not by_torchrun() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    with _reaching_others():
        _store, number, processes = next(dist.rendezvous("env://", timeout=PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=_store, rank=number, world_size=processes, timeout=PATIENCE)
        _patient = dist.new_group(backend="gloo", timeout=PREPARING)
    yield
    dist.destroy_process_group()  # not behind an error: who is gone would be waited for
    _patient = None  # nor is it left to Python's end, where a thread of its own that still holds a tensor would abort


def give_up() -> None:
    """From now on nothing is said to the others: behind an error they may wait somewhere else than this one thinks."""
    global _given_up
    _given_up = _given_up or count() > 1


def first_to_fail() -> bool:
    """Whether this process should say why all end: the one whose error came first.

    Where nobody can tell, one of each machine says it: the launcher that kept the store may be gone with its processes.
    """
    if _store is None:
        return True
    try:
        return _store.add("failed", 1) == 1
    except RuntimeError:  # the store went with the process that kept it
        return on_this_machine()[0] == 0


# sharing out and adding up --------------------------------------------------------------------------------------------
def part(rows: Tensor) -> Tensor:
    """This process's share of ``rows`` [n, ...]: consecutive ones; of two shares one is longer by a row at most."""
    return rows.tensor_split(count())[rank()]


def add_up(tensor: Tensor, group: Any = None) -> Tensor:
    """The sum of all processes' tensors, in place; ArgumentError for what is no tensor, or no group."""
    check_tensor("add_up: tensor", tensor, "with memory for each of its numbers", _has_room)
    check_group("add_up: group", group)
    if count(group) > 1:
        with _reaching_others():
            dist.all_reduce(tensor, group=group)
    return tensor


def _has_room(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def add_up_at_first(tensor: Tensor, group: Any = None) -> None:
    """The same in the first process alone; what the others have afterwards means nothing."""
    if count(group) > 1:
        with _reaching_others():
            dist.reduce(tensor, group=group, group_dst=0)


def fold(tensors: Sequence[Tensor], take: Callable[..., None], group: Any = None) -> None:
    """Lets the first process ``take`` what all have: pairs first, then pairs of pairs, log2(count) rounds in all."""
    place, distance = rank(group), 1
    while distance < count(group):
        if place % (2 * distance):
            with _reaching_others():
                for tensor in tensors:
                    dist.send(tensor.contiguous(), group=group, group_dst=place - distance)
            return
        if place + distance < count(group):
            received = [torch.empty_like(tensor) for tensor in tensors]
            with _reaching_others():
                for tensor in received:
                    dist.recv(tensor, group=group, group_src=place + distance)
            take(*received)
        distance *= 2


def copy_from_first(tensor: Tensor, group: Any = None) -> None:
    """Makes ``tensor`` what it is in the first process."""
    if count(group) > 1:
        with _reaching_others():
            dist.broadcast(tensor, group=group, group_src=0)


def rows_of_all(rows: Tensor) -> Tensor:
    """The rows [n, ...] of all processes in the order of these; n may be another one in each, and 0."""
    if count() == 1:
        return rows
    sizes = gathered(len(rows))
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    received = [torch.empty_like(padded) for _ in sizes]
    with _reaching_others():
        dist.all_gather(received, padded)
    return torch.cat([found[:size] for found, size in zip(received, sizes, strict=True)])


# agreeing -------------------------------------------------------------------------------------------------------------
def gathered(value: T, group: Any = None) -> list[T]:
    """What every process has, by its number; any object."""
    values = [value] * count()
    if count() > 1:
        with _reaching_others():
            dist.all_gather_object(values, value, group=group)
    return values


def first_says(value: T) -> T:
    """What the first process has; any object."""
    values = [value]
    if count() > 1:
        with _reaching_others():
            dist.broadcast_object_list(values, src=0, device=_wire())
    return values[0]


def from_first(ask: Callable[[], T]) -> T:
    """What ``ask()`` gives in the first process, which is the only one to call it; its error ends all."""
    if count() == 1:
        return ask()
    answer, error = None, None
    if is_first():
        try:
            answer = ask()
        except (JanusError, OSError) as found:
            error = found
    refuse_together(error)
    return first_says(answer)


def together(do: Callable[[], T]) -> T:
    """``do()`` in every process; the error of one is raised in all."""
    answer, error = None, None
    try:
        answer = do()
    except (JanusError, OSError) as found:
        error = found
    refuse_together(error, _patient)
    return answer


def in_turn(do: Callable[[], T]) -> T:
    """The same, first in one process of each machine: what that fetches or writes down is there for the others."""
    goes_first = on_this_machine()[0] == 0
    early = together(lambda: do() if goes_first else None)
    late = together(lambda: None if goes_first else do())
    return early if goes_first else late


def largest(values: Sequence[int], group: Any = None, device: torch.device | None = None) -> list[int]:
    """Place by place, the largest of all processes' values; ``device`` is one that the group's backend takes."""
    if count(group) == 1:
        return list(values)
    numbers = torch.tensor(values, device=device or _wire())
    with _reaching_others():
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
    return numbers.tolist()


def require_same(values: Mapping[str, Any], but: str = "") -> None:
    """ArgumentError, in all processes, unless all have the same ``values``; one of them may differ."""
    everyones = gathered(dict(values))
    for number, theirs in enumerate(everyones):
        for name, one in everyones[0].items():
            other = theirs.get(name)
            if one != other and name != but:
                found = f"{_short(one)} and, in process {number}, {_short(other)}"
                raise ArgumentError(f"{name} must be the same in all processes, got {found}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def refuse_together(error: Exception | None, group: Any = None) -> None:
    """Raises, in all processes, the error of the first one that has one: else the others would wait for it for ever."""
    if count() > 1:
        error = next((found for found in gathered(error, group) if found is not None), None)
    if error is not None:
        raise error


def _wire() -> torch.device:
    """Where tensors are that serve to agree: on the CPU, if the group takes such."""
    on_cpu = "cpu" in dist.get_backend_config()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _reaching_others() -> Iterator[None]:
    """Says in one line that another process is gone, whatever the backend says."""
    if _given_up:
        raise ProcessError("an error has ended what the processes did together: begin all of them again")
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        lines = str(error).strip().splitlines()
        if shared := [line for line in lines if "Duplicate GPU" in line or "same GPU" in line]:  # nccl's words
            raise ProcessError(f"each process needs a GPU of its own: {shared[0].strip()}") from error
        if "invalid usage" in lines[0]:  # of a call; nobody is gone
            raise ProcessError(f"{lines[0]}: {lines[-1].strip()}") from error
        raise ProcessError(f"another process ended, or does not answer: {lines[0]}") from error
