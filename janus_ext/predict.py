"""``janus_ext.predict``: classifies images with what a run has learned. ``--help`` says how."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from janus_ext.arguments import shown
from janus_ext.config import flag
from janus_ext.config.checks import MANY
from janus_ext.config.parts import HEAD_NAMES
from janus_ext.data.collect import find_images, readable, unlabelled
from janus_ext.errors import ArgumentError, on_one_line
from janus_ext.learner import ContinualLearner
from janus_ext.plugins import typed
from janus_ext.terminal import command


@dataclass(frozen=True)
class PredictConfig:
    """Classifies images with what a run has learned: a line an image, its most likely classes with their scores.

    Images that cannot be read are named on the standard error, and the others classified all the same; the status then
    is 1. For example: janus_ext.predict runs/photos new-photos "more/*.jpg" --top 3
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of a run of janus_ext.train, or of a learner that was saved."""
    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="")]
    """Image files, folders (all images below) and patterns."""
    top: int = 5
    """How many classes of each image."""
    head: Annotated[str | None, arg(metavar=HEAD_NAMES, help_behavior_hint="")] = None
    """Another classifier than the run's own, for which no image is needed; one of your own has to be said again."""
    method: Annotated[str | None, arg(metavar="MODULE:CLASS", help_behavior_hint="")] = None
    """The run's method, where it is one of your own: saying it is what lets its code be loaded."""
    json: bool = False
    """Lines of JSON instead of a table: the path, and names and scores of the classes, or what was wrong."""
    batch_size: Annotated[int | None, arg(help_behavior_hint="")] = None
    """Images at once; by default as many as take no more memory than 200 do in a ViT-B/16."""
    workers: Annotated[int | None, arg(help_behavior_hint="")] = None
    """Processes that decode images; by default as the run had them."""
    device: Annotated[str | None, arg(help_behavior_hint="")] = None
    """cpu, cuda, cuda:1, ...; by default what the run was trained on, if it is there."""


@command("janus_ext.predict")
def main(argv: Sequence[str] | None = None) -> int:
    """Classifies; 0 on success, 1 where images could not be read, 2 with one line on stderr for other mistakes."""
    return predict(tyro.cli(PredictConfig, prog="janus_ext.predict", args=argv))


def _check(config: PredictConfig) -> None:
    for name, least, most in (("top", 1, MANY), ("batch_size", 1, MANY), ("workers", 0, 1024)):
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise ArgumentError(f"{flag(name)} must lie in [{least}, {most}], got {shown(value)}")
    if not config.images:
        raise ArgumentError("IMAGE: name an image at least, or a folder or pattern of images")


def predict(config: PredictConfig) -> int:
    """Prints what the images are; 1 if any could not be read, else 0."""
    _check(config)
    learner = ContinualLearner.load(config.run, config.device, head=typed(config.head), method=typed(config.method))
    paths = find_images(config.images)
    good, problems = readable(paths)
    for problem in problems:
        print(f"janus_ext.predict: {problem}", file=sys.stderr)
        if config.json:
            print(json.dumps({"image": problem.where, "error": f"{problem.kind}: {problem.detail}".rstrip(": ")}))
    width = max((len(on_one_line(path)) for path in good), default=0)
    for path, classes in zip(good, _classified(learner, good, config), strict=True):
        print(_json(path, classes) if config.json else _row(path, width, classes))
    if problems:
        print(f"janus_ext.predict: {len(problems):,} of {len(paths):,} images could not be read", file=sys.stderr)
    return 1 if problems else 0


def _classified(
    learner: ContinualLearner, paths: Sequence[str], config: PredictConfig
) -> Iterator[list[tuple[str, float]]]:
    if not paths:
        return iter(())
    if config.batch_size is not None:
        learner.images_at_once = config.batch_size
    return learner.classify(unlabelled(paths, learner.view, learner.workers(config.workers)), config.top)


def _json(path: str, classes: Sequence[tuple[str, float]]) -> str:
    return json.dumps({"image": path, "classes": [{"name": name, "score": score} for name, score in classes]})


def _row(path: str, width: int, classes: Sequence[tuple[str, float]]) -> str:
    named = (f"{on_one_line(name)} {100 * score:.1f} %" for name, score in classes)
    return f"{on_one_line(path):<{width}}  " + "   ".join(named)


if __name__ == "__main__":
    sys.exit(main())
