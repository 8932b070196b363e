"""From a listing to a benchmark: the checks that need no image, the check of the images, class order and tasks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from janus_ext.data import check
from janus_ext.data.benchmark import Benchmark
from janus_ext.data.images import Files, ImageSplit, default_workers
from janus_ext.data.layout import shorten
from janus_ext.data.listing import Listing, Sample, count
from janus_ext.data.names import ENDINGS
from janus_ext.data.tasks import make_tasks
from janus_ext.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from janus_ext.config import TrainConfig

LOG = logging.getLogger("janus_ext")


def build(listing: Listing, config: TrainConfig) -> Benchmark:
    """The benchmark that ``listing`` and ``config`` describe; DataError before any training if images are unusable.

    With --check-data all images are decoded and reported, otherwise those that the run needs and that are not known
    to be fine. Counts unlike the official ones are a warning.
    """
    if config.check_data:
        check.report(listing)
    _require_sound(listing)
    warn_of_unread(listing.root, listing.unread)
    workers = default_workers(config.device) if config.workers is None else config.workers
    benchmark = assemble(
        listing.name,
        listing.class_names,
        _split(listing, listing.train, workers),
        _split(listing, listing.test, workers),
        listing.default_tasks,
        config,
    )
    if not config.check_data:
        check.verify(listing, benchmark.train.samples + benchmark.test.samples)
        if listing.unlike_official():
            LOG.warning("%s is not the official data set: %s", listing.name, "; ".join(listing.unlike_official()))
    return benchmark.decoded() if config.cache_images else benchmark


def assemble(
    name: str,
    class_names: Sequence[str],
    train: ImageSplit,
    test: ImageSplit,
    default_tasks: int,
    config: TrainConfig,
) -> Benchmark:
    """The tasks and the images that the configuration wants."""
    benchmark = Benchmark(name, tuple(class_names), train, test, make_tasks(config, class_names, default_tasks))
    return benchmark.as_asked(config)


def _require_sound(listing: Listing) -> None:
    """DataError for the first problem of lists and folders, or for a class without a training image."""
    if listing.problems:
        others = f", and {len(listing.problems) - 1:,} more" if len(listing.problems) > 1 else ""
        raise DataError(f"--data-dir: {listing.problems[0]}{others}; --check-data lists all")
    for part, samples in (("training", listing.train), ("test", listing.test)):
        counts = count(samples, len(listing.class_names))
        lacking = [name for name, n in zip(listing.class_names, counts, strict=True) if not n]
        if lacking:
            message = f"--data-dir: {len(lacking)} of {len(counts)} classes have no {part} image: {shorten(lacking)}"
            if part == "training":
                raise DataError(message)
            LOG.warning(message)


def warn_of_unread(root: Path, unread: Sequence[str]) -> None:
    """Says which files of class folders seem to be images and are left out."""
    if unread:
        LOG.warning(
            "%s: image files that are not read: %d, for example %s; convert them to be trained on. %s",
            *(root, len(unread), unread[0], ENDINGS),
        )


def _split(listing: Listing, samples: Sequence[Sample], workers: int) -> ImageSplit:
    names = [sample.name for sample in samples]
    labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    return ImageSplit(Files(listing.root, listing.upright), names, labels, names, workers=workers)
