"""The folder of a run: which one it is, whether it is ours, and that one process alone works in it."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.runs.checkpoint import (
    check_replaceable,
    make_folder,
    read_json,
    remove,
    require_replaceable,
    write_sealed_json,
)

LOG = logging.getLogger("janus_ext")
# The model first: without it nothing is taken up, whatever else a removal that was cut off has left.
OURS = (
    "checkpoints/model.safetensors",
    "checkpoints/*.safetensors",
    "metrics.jsonl",
    "results.json",
    "log.txt",
    "plots/*.png",
    "tensorboard/events.out.*",
)
APPENDED = ("metrics.jsonl", "log.txt")
FILLED = ("checkpoints", "plots", "tensorboard", "evaluation")
TEMPORARY = "[0-9]*.tmp"  # the end of a name that a file has while it is written: the process, and .tmp
LEFTOVERS = (f".*.json.{TEMPORARY}", f".metrics.jsonl.{TEMPORARY}", f"*/.*.{TEMPORARY}")
OTHER = "choose another folder with --output"


def is_finished(folder: Path, several: bool = False) -> bool:
    """True if ``folder`` holds a run's results or any seed's; a call over ``several`` goes on until a summary."""
    try:
        seeds = "summary.json" if several else "seed-*/results.json"
        return (folder / "results.json").exists() or any(folder.glob(seeds))
    except OSError as error:
        raise CheckpointError(f"--output {folder} cannot be read: {error}") from error


def is_run(folder: Path) -> bool:
    """True if ``folder`` holds the configuration of a run of this program."""
    path = folder / "config.json"
    return path.exists() and read_json(path).keys() >= {"benchmark", "method", "seed"}


def is_saved_learner(folder: Path) -> bool:
    """True if ``folder`` holds what `ContinualLearner.save` has written, and no training run."""
    return is_run(folder) and read_json(folder / "config.json")["benchmark"] is None


def place_of_learner(folder: Path) -> Path:
    """Where a learner is saved, links followed; ArgumentError if something else is there."""
    folder = check_replaceable(folder)
    if folder.exists() and not is_saved_learner(folder) and any(folder.iterdir()):
        raise ArgumentError(f"{folder} holds files that are no saved learner; choose another folder")
    return folder


def require_no_learner(folder: Path) -> None:
    """ArgumentError where ``folder`` holds a saved learner."""
    if is_saved_learner(folder):
        raise ArgumentError(f"{folder} holds a saved learner; {OTHER}")


def require_within(folder: Path) -> None:
    """ArgumentError where what is written to a run's folder would go elsewhere, as in one that a stranger has made."""
    for path in (folder / name for name in (*APPENDED, *FILLED)):
        whole = path.is_file() if path.name in APPENDED else path.is_dir()
        if path.is_symlink() or (path.exists() and not whole):
            kind = "a link" if path.is_symlink() else "no folder" if path.name in FILLED else "no file"
            raise ArgumentError(f"{path} is {kind}, and a run writes within its own folder alone; {OTHER}")


def check_same_seeds(folder: Path, seeds: tuple[int, ...]) -> None:
    """Raises ArgumentError when the summary in ``folder`` has seeds that ``seeds`` would drop."""
    path = folder / "summary.json"
    dropped = sorted(set(read_json(path).get("seeds", ())) - set(seeds)) if path.exists() else []
    if dropped:
        raise ArgumentError(f"{path} has seeds {dropped}, too: name them with --seed, or {OTHER}")


@contextmanager
def opened(folder: Path, settings: dict[str, Any], begin: bool) -> Iterator[int]:
    """Makes the folder and keeps other processes out of it; what an unfinished run left is cleared if this one begins.

    Gives the descriptor of the folder, which it holds whatever becomes of the name. ``settings`` are what its
    ``config.json`` is to hold, see `settings_of`.

    Raises:
        ArgumentError: the folder holds a saved learner, or files but no run of this program, which are left alone, or
            is in use.
        CheckpointError: it cannot be made, or written.
    """
    with naming_output():
        make_folder(folder)
    strangers = [path for path in folder.iterdir() if not path.match(f".config.json.{TEMPORARY}")]
    if strangers and not is_run(folder):
        raise ArgumentError(f"{folder} holds files that are no run of this program; {OTHER}")
    require_no_learner(folder)
    require_within(folder)
    with _locked(folder) as handle:
        remove(path for glob in LEFTOVERS for path in folder.glob(glob))
        if begin:
            if is_finished(folder):  # since it was chosen, by another process
                raise ArgumentError(f"{folder} holds a finished run; {OTHER}")
            if is_run(folder):
                LOG.warning("%s holds an unfinished run: it starts over (the same flags and --resume go on)", folder)
            with naming_output():
                remove(path for glob in OURS for path in folder.glob(glob))
                write_sealed_json(folder / "config.json", settings)
        yield handle


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keeps a folder that is new or empty for this process alone; a new one goes again if nothing came into it.

    Raises:
        ArgumentError: something is there, or another process has it.
        CheckpointError: it cannot be made, or is there and cannot be replaced, as `replace_folder` does.
    """
    place = check_replaceable(folder)
    is_new = not place.exists()
    with naming_output():
        make_folder(place)
    with _locked(place) as handle:
        if not place.is_dir() or any(place.iterdir()):
            raise ArgumentError(f"--output {folder} is there already; choose another folder")
        try:
            if not is_new:
                with naming_output():
                    require_replaceable(place)  # said before anything is learned, and not when it is to be saved
                if not os.path.samestat(os.fstat(handle), os.stat(place)):  # it was the one that another tried with
                    raise ArgumentError(f"--output {folder} is in use by another process")
            yield
        finally:
            if is_new:
                with suppress(OSError):  # something is in it
                    place.rmdir()


@contextmanager
def naming_output() -> Iterator[None]:
    """Says what to do about a folder that cannot be written, as in a checkout that is read-only."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {OTHER}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Holds a lock that ends with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    _held.add(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        _let_go(handle)
        raise ArgumentError(f"{folder} is in use by another process; wait for it, or {OTHER}") from error
    except OSError as error:  # a network's file system without locks
        LOG.warning("%s cannot be locked (%s): let no second process work in it", folder, error)
    try:
        yield handle
    finally:
        _let_go(handle)


def _let_go(handle: int) -> None:
    _held.discard(handle)
    os.close(handle)


def _let_go_in_child() -> None:
    """Workers that decode images outlive a killed run for seconds, and must not keep its lock."""
    for handle in tuple(_held):
        _let_go(handle)


_held: set[int] = set()  # locked folders, as file descriptors
os.register_at_fork(after_in_child=_let_go_in_child)
