"""Scalars of a run as event files for TensorBoard, whose package is an optional extra."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from janus_ext.errors import ArgumentError, CheckpointError

Write = Callable[[str, Mapping[str, float | None], int], None]


def require_tensorboard() -> None:
    """ArgumentError, which says how to install it, where TensorBoard's package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401 - imports the package
    except ImportError as error:
        raise ArgumentError(
            "--tensorboard needs the package tensorboard: pip install tensorboard, or janus-ext with [tensorboard]"
        ) from error


def write_nothing(group: str, values: Mapping[str, float | None], step: int) -> None:
    """Takes the place of the writer where no event files are wanted."""


@contextmanager
def writing(folder: Path | None, done: int = 0) -> Iterator[Write]:
    """Within it, write(group, values, step) appends "group/name" for every value that is there to files in folder.

    Of what the folder holds already, steps beyond ``done`` are not shown any more.
    """
    if folder is None:
        yield write_nothing
        return
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    with _naming(folder):
        writer = SummaryWriter(str(folder), purge_step=done + 1)

    def write(group: str, values: Mapping[str, float | None], step: int) -> None:
        with _naming(folder):
            for name, value in values.items():
                if value is not None:
                    writer.add_scalar(f"{group}/{name}", value, step)
            writer.flush()  # to be seen while the run goes on

    try:
        yield write
    except BaseException:
        with suppress(OSError):  # it is the first error that counts
            writer.close()
        raise
    with _naming(folder):
        writer.close()


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
