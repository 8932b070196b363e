"""When the state within a task is written: every so many epochs or minutes, and as soon as the system asks.

SIGUSR1 (a cluster's warning) writes it behind the step that is computed, and goes on; outside the epochs of a task
there is nothing to write. SIGTERM and SIGINT (Ctrl-C) write it behind that step, too, and end the process; outside the
epochs, and at the second time, they end it at once.

Several processes agree now and then on whether one of them was asked, so that all stop behind the same step: every
`AGREE_EVERY` seconds or so, and every `READ_EVERY` steps at least. A launcher asks them more than once, and ends by
itself what does not end: there a second time changes nothing.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from janus_ext import processes
from janus_ext.errors import Interrupted
from janus_ext.training.progress import READ_EVERY
from janus_ext.training.underway import State, Underway

ENDING = (signal.SIGINT, signal.SIGTERM)
AGREE_EVERY = 2.0  # seconds; a launcher that has asked them to end waits 30
FADING = 0.97  # a step, of a slow pace: on a GPU only a step that reads the losses tells how long the others took


class Keeping:
    """Keeps the state of the task that is learned.

    Args:
        write: puts a state where it lasts.
        every: "3", behind every third epoch; "10m", when ten minutes have passed; either way behind the last one, too,
            since a signal behind the epochs ends the process at once; "" never.
        start: the state that the next task goes on from.
    """

    def __init__(
        self, write: Callable[[State], None] = lambda state: None, every: str = "", start: State | None = None
    ) -> None:
        self.write, self.start = write, start
        self.epochs = int(every) if every.isdigit() else math.inf
        self.seconds = 60 * float(every[:-1]) if every.endswith("m") else math.inf
        self._written = self._agreed = time.monotonic()
        self._since = 0  # steps behind the last agreement
        self._apart = 1  # so many lie between two: the first one tells how long a step takes
        self._pace = 0.0  # seconds that one took last time
        self._asked = False
        self._ending: int | None = None
        self._stepping = False
        self._process = os.getpid()

    def take_start(self) -> State | None:
        """What the task goes on from; of the next one there is none."""
        start, self.start = self.start, None
        return start

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Within it are the epochs of a task: a signal waits for the end of the step that is computed."""
        self._stepping = True
        self._since, self._agreed = 0, time.monotonic()  # what lies between two tasks is no step
        try:
            yield
        finally:
            self._stepping = False
        if self._ending is not None:  # it came behind the last look, such as while the last state was written
            raise Interrupted(self._ending)

    def step_done(self, underway: Underway, epoch: int, step: int) -> None:
        """Behind every step; raises `Interrupted` once the state is written, where the process is to end."""
        self._since += 1
        if processes.count() == 1 or self._since >= self._apart:
            self._keep(underway, epoch, step, due=time.monotonic() - self._written >= self.seconds)

    def epoch_done(self, underway: Underway, epoch: int, epochs: int) -> None:
        """Behind every epoch, when it is on record; raises likewise."""
        done = epoch + 1
        last = done == epochs and min(self.epochs, self.seconds) < math.inf
        self._keep(underway, done, 0, due=last or done % self.epochs == 0)

    def _keep(self, underway: Underway, epoch: int, step: int, due: bool) -> None:
        wanted, ending = self._agree(due)
        if wanted or ending:
            self._asked = False
            self.write(underway.state(epoch, step))
            self._written = self._agreed = time.monotonic()
        if ending:
            raise Interrupted(ending)

    def _agree(self, due: bool) -> tuple[int, int]:
        """Whether a state is wanted, and the signal that ends all, if one came; and when they will agree again."""
        if self._since:
            measured = (time.monotonic() - self._agreed) / self._since
            self._pace = max(measured, self._pace * FADING**self._since)
        wanted, ending, slowest = processes.largest([due or self._asked, self._ending or 0, round(1e6 * self._pace)])
        self._apart = max(1, min(READ_EVERY, int(1e6 * AGREE_EVERY) // max(1, slowest)))
        self._since, self._agreed = 0, time.monotonic()
        return wanted, ending

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, the signals are heard."""
        with _handling((*ENDING, signal.SIGUSR1), self._hear):
            yield

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child, between its fork and handlers of its own
            return
        if number == signal.SIGUSR1:
            self._asked = True
        elif self._stepping and (self._ending is None or processes.count() > 1 or processes.by_torchrun()):
            self._ending = number
        else:
            raise Interrupted(number)


@contextmanager
def outliving_warnings() -> Iterator[None]:
    """Within it, SIGUSR1 does not end the process where no task is being learned."""
    with _handling((signal.SIGUSR1,), lambda number, frame: None):
        yield


@contextmanager
def _handling(numbers: Iterable[int], handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within it, signals are handled so, but for those that the process was begun to ignore, as by nohup.

    Outside the main thread, where Python handles none, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    ours = {n: handler for n, handler in before.items() if handler not in (None, signal.SIG_IGN)}  # None: not Python's
    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
