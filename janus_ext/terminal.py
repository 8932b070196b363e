"""What a command shows: log lines around the progress bar, escapes for what the terminal's encoding lacks, a quiet end
where nobody reads on (``| head``), and of several processes only what the first one says.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, ParamSpec, TextIO, TypeVar

from tqdm import tqdm

from janus_ext import processes
from janus_ext.errors import CheckpointError, Interrupted, JanusError, JanusWarning, on_one_line, visible

LOG = logging.getLogger("janus_ext")
P, T = ParamSpec("P"), TypeVar("T")


class TerminalHandler(logging.Handler):
    """Writes log lines to the standard output, above the progress bar; BrokenPipeError where nobody reads it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # logging would print a traceback for every line from here on
            raise
        except Exception:
            self.handleError(record)


class LogFile(logging.FileHandler):
    """Writes log lines to a file; CheckpointError where that fails, as on a full disk, which keeps nothing else."""

    def __init__(self, path: Path) -> None:
        with self._naming(path):
            super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Raises what `emit` has caught, which logging would print with a traceback."""
        with self._naming(self.baseFilename):
            raise  # noqa: PLE0704 - logging calls this within its except

    def close(self) -> None:
        with self._naming(self.baseFilename):
            super().close()

    @staticmethod
    @contextmanager
    def _naming(path: str | Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error


@contextmanager
def logging_to(path: Path | None = None) -> Iterator[None]:
    """Sends the log, and our warnings as lines of it, to the terminal, around the progress bar, and to ``path``."""
    handlers: list[logging.Handler] = [TerminalHandler()]
    if path is not None:
        handlers.insert(0, LogFile(path))  # first: it is whole wherever the terminal ends
    with ExitStack() as stack:  # in the end everything is undone, also where a file cannot be closed: see LogFile
        for handler in handlers:
            stack.callback(handler.close)
        stack.callback(LOG.setLevel, LOG.level)
        for handler in handlers:
            stack.callback(LOG.removeHandler, handler)
            LOG.addHandler(handler)
        LOG.setLevel(logging.INFO)
        stack.enter_context(_warnings_logged())
        yield


@contextmanager
def _warnings_logged() -> Iterator[None]:
    """Within it, warnings of ours are lines of the log, without the line of code, which nobody has written.

    Those of others come as ever: they may come from where an error of the log would be taken for a damaged image.
    """
    as_ever = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if issubclass(category, JanusWarning):
            LOG.warning("warning: %s", on_one_line(str(message)))
        else:
            as_ever(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():  # which undoes it, and forgets what was said before: each run has its own log
        warnings.showwarning = show
        yield


def command(name: str, interrupted: str = "interrupted") -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Makes a program of a function: its return value is the exit status, 2 with one line on the standard error for
    what the user can mend, 130 on Ctrl-C, 143 on a SIGTERM that it waits for.
    """

    def wrap(body: Callable[P, int]) -> Callable[P, int]:
        @escaping()
        @until_closed
        @functools.wraps(body)
        def main(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return body(*args, **kwargs)
            except BrokenPipeError:  # no error of ours: see until_closed
                raise
            except (JanusError, OSError) as error:  # the system's own errors name the file and what is wrong with it
                if processes.first_to_fail():
                    text = error.text if isinstance(error, JanusError) else error
                    print(visible(f"{name}: {text}"), file=sys.stderr, flush=True)
                return 2
            except KeyboardInterrupt as stop:
                if processes.first_to_fail():
                    print(f"\n{name}: {interrupted}", file=sys.stderr, flush=True)
                return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)

        return main

    return wrap


@contextmanager
def first_alone_heard() -> Iterator[None]:
    """Within it, what other processes than the first one print goes nowhere."""
    if processes.is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def until_closed(command: Callable[P, T]) -> Callable[P, T]:
    """Ends the process in silence, status 141 as after SIGPIPE, once nobody reads the command's output any more.

    The exception passes through the command, so that locks are released and files closed. A pipe that breaks elsewhere
    is an error as ever.
    """

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        if sys.stdout is None:  # closed before the process began (>&-)
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        if sys.stderr is None:  # else print() would take the standard output for it
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - likewise
        try:
            try:
                return command(*args, **kwargs)
            finally:
                sys.stdout.flush()  # while an error can still be told from success
        except BrokenPipeError:
            closed = [stream for stream in (sys.stdout, sys.stderr) if nobody_reads(stream)]
            if not closed:
                raise
            for stream in closed:  # what is left in the buffers has nowhere to go when the interpreter ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            sys.exit(128 + signal.SIGPIPE)

    return guarded


def nobody_reads(stream: TextIO) -> bool:
    """True for the writing end of a pipe or socket whose other end is closed."""
    try:
        descriptor = stream.fileno()
    except OSError:  # in memory
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def escaping() -> Iterator[None]:
    """Within it, what the standard streams cannot encode is written as an escape (``\\xe9``) instead of an error."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)
