"""``janus_ext.export``: writes what a run has learned for timm, ONNX, PEFT or as a program of torch.export."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from janus_ext.config.parts import HEAD_NAMES
from janus_ext.exports import onnx, peft, pt2, timm
from janus_ext.exports.contents import Contents
from janus_ext.learner import ContinualLearner
from janus_ext.plugins import typed
from janus_ext.terminal import command

FORMATS: dict[str, Callable[[Contents, Path], None]] = {
    "timm": timm.export,
    "onnx": onnx.export,
    "peft": peft.export,
    "pt2": pt2.export,
}


@dataclass(frozen=True)
class ExportConfig:
    """Writes what a run has learned so far for use elsewhere, with a model card; the run stays as it is.

    For example: janus_ext.export runs/emoji-janus-0 --format onnx --output flat-icons
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of a run of janus_ext.train, or of a learner that was saved."""
    format: Literal["timm", "onnx", "peft", "pt2"]
    """timm: weights and config.json; onnx, pt2: image to scores in one file; peft: an adapter for every task."""
    output: Path
    """Folder to write, new or empty."""
    head: Annotated[str | None, arg(metavar=HEAD_NAMES, help_behavior_hint="")] = None
    """Another classifier than the run's own, for which no image is needed; one of your own has to be said again."""
    method: Annotated[str | None, arg(metavar="MODULE:CLASS", help_behavior_hint="")] = None
    """The run's method, where it is one of your own: saying it is what lets its code be loaded."""


@command("janus_ext.export", "interrupted, nothing was written")
def main(argv: Sequence[str] | None = None) -> int:
    """Parses ``argv`` and exports; 0 on success, 2 with one line on stderr for what the user can mend."""
    export(tyro.cli(ExportConfig, prog="janus_ext.export", args=argv))
    return 0


def export(config: ExportConfig) -> None:
    """Writes the folder and says where it is."""
    learner = ContinualLearner.load(config.run, device="cpu", head=typed(config.head), method=typed(config.method))
    FORMATS[config.format](learner.contents(), config.output)
    print(f"{config.output}: README.md there says how to load it")


if __name__ == "__main__":
    sys.exit(main())
