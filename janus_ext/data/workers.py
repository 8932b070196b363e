"""Worker processes that read: requests go out in order, what they read comes back in order, and no wait is endless.

What was read comes back in shared memory (/dev/shm), of which a container often has no more than 64 MiB: the
look-ahead is bounded by what is free there, and what finds no room comes through a worker's pipe, a little slower.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from janus_ext.errors import DataError
from janus_ext.processes import on_this_machine

if TYPE_CHECKING:
    import numpy as np

LOG = logging.getLogger("janus_ext")
PATIENCE = 600  # seconds without any answer of the workers after which the run ends: longer than any disk thinks
SHARED_MEMORY = "/dev/shm"
LOCKS = 4 * 4096  # bytes there that a worker's locks and queues take


def sendable(tensor: Tensor) -> Tensor | np.ndarray:
    """``tensor`` as a worker should return it: in shared memory, or as an array if there is no room, for the pipe.

    The loader itself would find out in a thread of the worker, which could tell nobody, and wait for ever.
    """
    if get_worker_info() is None:
        return tensor
    try:
        return tensor.share_memory_()
    except RuntimeError:  # no space there, no such file system, or no file handle left
        return tensor.numpy()


class Requests:
    """The requests of the pass in progress: a sampler that a loader with lasting workers reads anew for each pass."""

    def __init__(self) -> None:
        self.current: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.current)

    def __len__(self) -> int:
        return len(self.current)


class Workers:
    """``count`` processes that start with the first pass over requests and live as long as this object."""

    def __init__(self, reader: Dataset, count: int) -> None:
        self.reader = reader
        self.count = count
        self._requests = Requests()
        self._loader: DataLoader | None = None

    def read(self, requests: Sequence[Any], ahead: int, size: int) -> Iterator[Any]:
        """What the reader makes of ``requests``, in order, ``ahead`` of them at once, of ``size`` bytes each.

        Raises:
            DataError: a worker has died, or nothing came for PATIENCE seconds.
            RuntimeError: a later pass has the workers by now.
        """
        if self._loader is None and free_shared_memory() < LOCKS * (4 + self.count):
            LOG.warning("%s is full: this process reads the images by itself, which is slower", SHARED_MEMORY)
            yield from map(self.reader.__getitem__, requests)
            return
        self._requests.current = requests
        with naming_lost_workers(OSError, EOFError):
            answers = iter(self._lasting_loader(ahead, size))
        for _ in requests:
            if self._requests.current is not requests:
                raise RuntimeError("another pass over this split began before this one had ended")
            with naming_lost_workers(OSError, EOFError):
                answer = next(answers)
            yield answer

    def _lasting_loader(self, ahead: int, size: int) -> DataLoader:
        """The loader of all passes: starting processes for each would cost more than a small epoch."""
        if self._loader is None:
            gc.collect()  # ends the processes of loaders that are garbage, as behind an error; see _begin, too
            self._loader = DataLoader(
                self.reader,
                sampler=self._requests,
                batch_size=None,  # requests come out as they are
                collate_fn=_unchanged,  # the default makes tensors of arrays
                num_workers=self.count,
                multiprocessing_context="fork",  # Python 3.14's default would pickle the reader, images and all
                persistent_workers=True,
                prefetch_factor=self._each_ahead(ahead, size),
                timeout=PATIENCE,
                worker_init_fn=_begin,
                generator=torch.Generator(),  # or each pass would draw from the global one
            )
        return self._loader

    def _each_ahead(self, ahead: int, size: int) -> int:
        """Requests that each worker has at once: all together take half of the shared memory at most."""
        room = free_shared_memory() // 2 // on_this_machine()[1] // max(1, size)
        if room < self.count:
            LOG.warning(
                "%s has %.0f MiB free, too little for --workers %d: images come through pipes, which may be "
                "slower (docker run --shm-size 1g gives more)",
                *(SHARED_MEMORY, free_shared_memory() / 2**20, self.count),
            )
        return max(1, min(-(-ahead // self.count), room // self.count))


def _begin(worker: int) -> None:
    """In a worker: what is garbage of the parent's stays so, loaders among it whose end would look for the parent's
    processes. Signals to all processes of a job are for the one that trains, and that needs its workers.

    It ends when its parent asks for that, by SIGTERM as well, or is gone (which the loader looks after).
    """
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)  # as the loader's own handler does: another status would be a lost worker

    threading.Thread(target=wait, daemon=True).start()


def _unchanged(answer: Any) -> Any:
    return answer


def free_shared_memory() -> int:
    """Bytes that are free for what processes share; as good as endless on systems that do not say."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return sys.maxsize
    return status.f_bavail * status.f_frsize


@contextmanager
def naming_lost_workers(*others: type[Exception]) -> Iterator[None]:
    """Turns what the loader raises about its workers into one line; errors of the types ``others`` are about them, too.

    The death of one is raised wherever the program is at that moment, so whoever computes between two batches should
    do it within this.
    """
    try:
        yield
    except (RuntimeError, *others) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "DataLoader timed out" in reason:
            message = f"no image came from the worker processes in {PATIENCE} s: is the disk of the images still there?"
            raise DataError(f"{message} --workers 0 reads without such processes") from error
        if "DataLoader worker (pid" in reason or isinstance(error, others):
            raise DataError(f"a worker process ended: {reason}; fewer --workers need less memory, 0 none") from error
        raise
