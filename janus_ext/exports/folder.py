"""The folder of an export: there as a whole, or not at all; and what all formats check before it is."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.runs.checkpoint import make_folder, sync_folder, sync_tree


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Within it, a folder to fill; it becomes ``path`` at the end, and after an error nothing of it is left.

    Raises:
        ArgumentError: ``path`` is there and no empty folder.
        CheckpointError: it cannot be written.
    """
    path = path.resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ArgumentError(f"--output must be a new or an empty folder, {path} is not")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had the same number
    try:
        if path.exists():  # a mount point keeps its place: tried before there is anything to lose
            os.replace(path, temporary)
            os.replace(temporary, path)
        make_folder(temporary)
        yield temporary
        sync_tree(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require(extra: str, *packages: str) -> None:
    """ArgumentError, which says how to install them, where one of ``packages`` is missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ArgumentError(
            f"--format {extra} needs {', '.join(missing)}: pip install {' '.join(missing)}, or janus-ext with [{extra}]"
        )


def random_images(size: int, count: int = 4) -> Tensor:
    """uint8 [count, 3, size, size], the same ones in every process: from plain colours to noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, 3, size, size), generator=generator)
    share = torch.linspace(0, 1, count).view(-1, 1, 1, 1)
    return (share * noise + (1 - share) * noise[..., :1, :1]).to(torch.uint8)


def check_same(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """CheckpointError unless all numbers are equal to ``tolerance`` times the largest wanted one."""
    error = float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())
    if not error <= tolerance:
        raise CheckpointError(f"{what}: it was wanted to {tolerance:g} of the largest number, and is {error:.1e} off")
