"""``folder``: anybody's images, one folder a class; train/ and test/ as they are, or one tree and a fixed split of it.

The split of one tree takes a fifth of every class for the test, chosen by SHA-256 digests of the file names: the same
on every machine and for every seed, and no file is moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from janus_ext.data.benchmark import Benchmark
from janus_ext.data.files import build
from janus_ext.data.layout import find_parts, require_class_level, require_several, shared_classes
from janus_ext.data.listing import Listing, Problem, Sample, class_samples, list_parts, require_root, subfolders
from janus_ext.data.names import ENDINGS, to_bytes
from janus_ext.data.tasks import default_tasks
from janus_ext.errors import DataError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

LAYOUT = f"""\
<data-dir>/train/<class>/*.jpg      one folder a class, any depth below it
<data-dir>/test/<class>/*.jpg       the same classes; val, valid, validation or dev will do

or one tree, of which a fifth of the images of each class, by their names, is taken for the test:

<data-dir>/<class>/*.jpg

{ENDINGS}
"""
PAGE = "https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html"
ADVICE = "A file that cannot be had again may be deleted."
CLASS_LEVEL = "call splits train and test, name one domain as --data-dir, or say"
MOST_TASKS = 10
TEST_SHARE = 5  # one image in so many, rounded, one at least


def load(config: TrainConfig) -> Benchmark:
    """The images below --data-dir; class ids follow the sorted names of the class folders."""
    return build(read(config), config)


def read(config: TrainConfig) -> Listing:
    """Lists both splits; DataError if --data-dir is not laid out as wanted, or as something else."""
    root = require_root("folder", config.data_dir, LAYOUT, PAGE)
    parts = find_parts(root)
    if config.split == "folders" and not parts:
        raise DataError(f"--split folders needs {root}/train and {root}/test; wanted:\n\n{LAYOUT.rstrip()}")
    if config.split == "random" and parts:
        raise DataError(
            f"--split random is for one tree of classes, and {root} has {' and '.join(parts)}: leave it out"
        )
    return _read_parts(root, parts, config) if parts else _read_tree(root, config)


def _read_parts(root: Path, parts: tuple[str, str], config: TrainConfig) -> Listing:
    classes = shared_classes(root, *parts)
    if config.split == "auto":
        require_class_level(root / parts[0], classes, f"{CLASS_LEVEL} --split folders if they are classes")
    train, test = list_parts(root, parts, classes)
    problems, unread = train.problems + test.problems, train.unread + test.unread
    return _listing(root, classes, (train.samples, test.samples), parts, problems, unread)


def _read_tree(root: Path, config: TrainConfig) -> Listing:
    classes = subfolders(root)
    if not classes:
        raise DataError(f"--data-dir {root} has no class folders; wanted:\n\n{LAYOUT.rstrip()}")
    require_several(root, classes)
    if config.split == "auto":
        require_class_level(root, classes, f"{CLASS_LEVEL} --split random if they are classes")
    found = class_samples(root, "", classes)
    train, test = split_each_class(found.samples, len(classes))
    lonely = sorted({s.label for s in test} - {s.label for s in train})
    small = [Problem("too small", classes[c], "one image cannot be trained on and tested on") for c in lonely]
    return _listing(root, classes, (train, test), classes, (*found.problems, *small), found.unread)


def _listing(
    root: Path,
    classes: Sequence[str],
    splits: tuple[Sequence[Sample], Sequence[Sample]],
    folders: Sequence[str],
    problems: Sequence[Problem],
    unread: Sequence[str],
) -> Listing:
    train, test = map(tuple, splits)
    return Listing(
        name="folder",
        root=root,
        class_names=tuple(classes),
        train=train,
        test=test,
        default_tasks=default_tasks(len(classes), MOST_TASKS),
        folders=tuple(folders),
        advice=ADVICE,
        problems=tuple(problems),
        found={"train": len(train), "test": len(test)},
        unread=tuple(unread),
        upright=True,  # photographs of one's own; the published protocols take the pixels as they are stored
    )


def split_each_class(samples: Sequence[Sample], classes: int) -> tuple[list[Sample], list[Sample]]:
    """(training, test): one in TEST_SHARE of every class, and at least one, is for the test."""
    members: list[list[Sample]] = [[] for _ in range(classes)]
    for sample in samples:
        members[sample.label].append(sample)
    train, test = [], []
    for group in members:
        ranked = sorted(group, key=lambda sample: hashlib.sha256(to_bytes(sample.name)).digest())
        size = max(1, round(len(ranked) / TEST_SHARE))
        test += ranked[:size]
        train += ranked[size:]
    return train, test
