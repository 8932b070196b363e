"""Every error that janus_ext raises on purpose. Catch :class:`JanusError` to catch them all.

The ops themselves (``janus_ext.ops``) raise ``ValueError`` and ``TypeError``, as PyTorch's own operators do.
"""


class JanusError(Exception):
    """Base class of the errors below."""


class ArgumentError(JanusError, ValueError):
    """An argument or a combination of options cannot work; the message names it, what was wanted and what was found."""


class NativeError(JanusError, ImportError):
    """The compiled library is missing, was built for another PyTorch, or cannot be loaded."""


class StatisticsError(JanusError, ValueError):
    """Input statistics of a layer are empty, zero, NaN or infinite; the basis in force stays as it was."""


class TaskBoundaryError(JanusError, RuntimeError):
    """An action that belongs between two tasks was asked for while an adapter holds an unmerged update."""


class DataError(JanusError):
    """A data set is missing, incomplete or unlike its description."""


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
