"""Every error that janus_ext raises on purpose, and how it warns. Catch :class:`JanusError` to catch all errors;
:class:`JanusWarning` is the kind of all warnings.

The ops themselves (``janus_ext.ops``) raise ``ValueError`` and ``TypeError``, as PyTorch's own operators do.
"""

import re
import sys
import warnings
from types import FrameType

# Also what turns the direction of a text, and halves of pairs, which stand for bytes of a name that are no text: no
# output takes them.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def on_one_line(name: str) -> str:
    """``name`` with its control characters, line feeds among them, written as escapes."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), name)


def visible(text: str) -> str:
    """A text of one or more lines with all other control characters, which a terminal would obey, as escapes."""
    return "\n".join(map(on_one_line, text.split("\n")))


BETWEEN = ("janus_ext", "torch", "contextlib", "importlib")
"""Packages whose frames may lie between a warning and the line that the caller wrote."""


class JanusWarning(UserWarning):
    """Every warning of janus_ext: what was asked is done, and something about it is worth knowing."""


def warn(text: str) -> None:
    """A JanusWarning at the line that called us, however many of our own calls, and PyTorch's, lie between."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _module(frame).partition(".")[0] in BETWEEN:
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, JanusWarning, frame.f_code.co_filename, frame.f_lineno, _module(frame), registry)


def _module(frame: FrameType) -> str:
    """The name of the module whose code runs; code may run under none, or under anything (exec)."""
    name = frame.f_globals.get("__name__")
    return name if isinstance(name, str) else "<unknown>"


class JanusError(Exception):
    """Base class of the errors below. Their texts are one line, whatever the names in them hold."""

    function = ""
    """The function of ours that was called, before the text; commands leave it out: there nobody has called it."""

    @property
    def text(self) -> str:
        """What is wrong."""
        return on_one_line(super().__str__())

    def __str__(self) -> str:
        return f"{self.function}: {self.text}" if self.function else self.text


class ArgumentError(JanusError, ValueError):
    """An argument or a combination of options cannot work; the message names it, what was wanted and what was found."""


class NativeError(JanusError, ImportError):
    """The compiled library is missing, was built for another PyTorch, or cannot be loaded; or so its loader says."""

    @property
    def text(self) -> str:
        return visible(ImportError.__str__(self))


class StatisticsError(JanusError, ValueError):
    """Input statistics of a layer are empty, zero, NaN or infinite; the basis in force stays as it was."""


class TaskBoundaryError(JanusError, RuntimeError):
    """An action that belongs between two tasks was asked for while an adapter holds an unmerged update."""


class DataError(JanusError):
    """A data set is missing, incomplete or unlike its description, which stands on the lines behind the first."""

    @property
    def text(self) -> str:
        return visible(Exception.__str__(self))


class CheckpointError(JanusError):
    """A file of weights or of a run cannot be written, is truncated, or does not fit."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end, and what it leaves can be gone on with; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class ProcessError(JanusError, RuntimeError):
    """Another process of the same training ended, or does not answer."""


class TrainingError(JanusError, RuntimeError):
    """Training cannot go on: the loss or a statistic is not finite. Task, step and layer are named."""
