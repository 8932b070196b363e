"""Which folder a run goes to: the one that was named, or a default that loses nothing."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from janus_ext.errors import ArgumentError
from janus_ext.runs.checkpoint import read_json
from janus_ext.runs.folder import OTHER, is_finished, is_run, is_saved_learner, require_no_learner
from janus_ext.runs.settings import differing

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig


def choose_folder(config: TrainConfig) -> Path:
    """--output, or the first of runs/<benchmark>-<method>-<seed>, ...-2, ...-3 without a finished run in it, nor one
    that was begun with other settings; ``config.tasks`` is the number that there are.

    With --resume: --output, or of these the one that was begun with the same settings, another that is not finished, or
    the last that is. A saved learner is never chosen.
    """
    several = len(config.seed) > 1
    if config.output is not None:
        _require_text(config.output)
        whole = config.output / ("summary.json" if several else "results.json")
        if is_finished(config.output, several) and not (config.resume and whole.exists()):
            raise ArgumentError(f"{config.output} holds a finished run; {OTHER}")
        require_no_learner(config.output)
        if several and is_run(config.output):
            raise ArgumentError(f"{config.output} holds a run with one seed; {OTHER}")
        return config.output
    # of what comes from elsewhere, own_module:Class, a name that needs no quotes anywhere
    names = (re.sub(r"[^\w.-]", "-", name) for name in (config.benchmark, config.method))
    name = "-".join(names) + ("" if several else f"-{config.seed[0]}")
    return _default_folder(name, several, config)


def _default_folder(name: str, several: bool, config: TrainConfig) -> Path:
    finished = begun = None
    for number in count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if is_finished(folder, several):
            finished = folder
        elif _is_begun_otherwise(folder, several, config):
            begun = begun or folder
        elif not is_saved_learner(folder):
            break
    if config.resume and not folder.exists():
        return begun or finished or folder
    return folder


def _is_begun_otherwise(folder: Path, several: bool, config: TrainConfig) -> bool:
    """Whether there is a run with other settings than these, whatever its seed."""
    runs = folder.glob("seed-*") if several else (folder,)
    asked = config.to_json()
    stored = (read_json(run / "config.json") for run in runs if is_run(run) and not is_saved_learner(run))
    return any(differing(asked, settings, but={"seed"}) for settings in stored)


def _require_text(folder: Path) -> None:
    """Refuses a name of bytes that are no UTF-8: safetensors would write there and could not read it again."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"--output {str(folder)!a} is no valid text; choose another name") from error
