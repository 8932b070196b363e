"""``folder``: anybody's images, one folder a class; train/ and test/ as they are, or one tree and a fixed split of it.

The split of one tree takes a fifth of every class for the test, chosen by SHA-256 digests of the file names: the same
on every machine and for every seed, and no file is moved.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from janus_ext.data.benchmark import Benchmark
from janus_ext.data.files import build
from janus_ext.data.listing import (
    Listing,
    Problem,
    Sample,
    class_samples,
    list_parts,
    require_root,
    shared_classes,
    subfolders,
)
from janus_ext.errors import DataError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

LAYOUT = """\
<data-dir>/train/<class>/*.jpg      one folder a class, any depth below it
<data-dir>/test/<class>/*.jpg       the same classes

or one tree, of which every fifth image of each class is taken for the test:

<data-dir>/<class>/*.jpg
"""
PAGE = "https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html"
ADVICE = "A file that cannot be had again may be deleted."
MOST_TASKS = 10
TEST_SHARE = 5  # one image in so many, rounded, one at least


def load(config: TrainConfig) -> Benchmark:
    """The images below --data-dir; class ids follow the sorted names of the class folders."""
    return build(read(config), config)


def read(config: TrainConfig) -> Listing:
    """Lists both splits; DataError if --data-dir is not laid out as wanted."""
    root = require_root("folder", config.data_dir, LAYOUT, PAGE)
    found = subfolders(root)
    has_parts = {"train", "test"} <= set(found)
    if config.split == "folders" and not has_parts:
        raise DataError(f"--split folders needs {root}/train and {root}/test; wanted:\n\n{LAYOUT.rstrip()}")
    if config.split == "folders" or (config.split == "auto" and has_parts):
        return _read_parts(root)
    return _read_tree(root, found)


def _read_parts(root: Path) -> Listing:
    classes = shared_classes(root, "train", "test")
    train, test, problems = list_parts(root, ("train", "test"), classes)
    return Listing(
        name="folder",
        root=root,
        class_names=tuple(classes),
        train=train,
        test=test,
        default_tasks=min(MOST_TASKS, len(classes)),
        folders=("train", "test"),
        advice=ADVICE,
        problems=problems,
        found={"train": len(train), "test": len(test)},
    )


def _read_tree(root: Path, classes: list[str]) -> Listing:
    if not classes:
        raise DataError(f"--data-dir {root} has no class folders; wanted:\n\n{LAYOUT.rstrip()}")
    samples, problems = class_samples(root, "", classes)
    train, test = split_each_class(samples, len(classes))
    lonely = sorted({s.label for s in test} - {s.label for s in train})
    problems += [Problem("too small", classes[c], "one image cannot be trained on and tested on") for c in lonely]
    return Listing(
        name="folder",
        root=root,
        class_names=tuple(classes),
        train=tuple(train),
        test=tuple(test),
        default_tasks=min(MOST_TASKS, len(classes)),
        folders=tuple(classes),
        advice=ADVICE,
        problems=tuple(problems),
        found={"train": len(train), "test": len(test)},
    )


def split_each_class(samples: list[Sample], classes: int) -> tuple[list[Sample], list[Sample]]:
    """(training, test): one in TEST_SHARE of every class, and at least one, is for the test."""
    members: list[list[Sample]] = [[] for _ in range(classes)]
    for sample in samples:
        members[sample.label].append(sample)
    train, test = [], []
    for group in members:
        ranked = sorted(group, key=lambda sample: hashlib.sha256(sample.name.encode()).digest())
        size = max(1, round(len(ranked) / TEST_SHARE))
        test += ranked[:size]
        train += ranked[size:]
    return train, test
