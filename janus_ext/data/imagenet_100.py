"""``imagenet-100``: a hundred classes of ImageNet's training and validation images, named by a list.

Different lists circulate under this name, so there is no default: --class-list is a file with one wnid a line (what
follows the wnid on a line is ignored), or first100, the first hundred of the thousand sorted wnids. The order of the
list is the order of the class ids.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from janus_ext.data.benchmark import Benchmark
from janus_ext.data.files import build
from janus_ext.data.layout import VALIDATION_NAMES, find_parts
from janus_ext.data.listing import Listing, list_parts, require_root, subfolders
from janus_ext.data.lists import read_lines
from janus_ext.errors import DataError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

CLASSES = 100
IMAGENET_CLASSES = 1000
TASKS = 10
VALIDATION_IMAGES = 50  # of each class; the training images are 732 to 1300 a class
PAGE = "https://image-net.org/download.php"
ADVICE = f"ILSVRC 2012 comes from {PAGE}."
LAYOUT = """\
<data-dir>/train/<wnid>/*.JPEG
<data-dir>/val/<wnid>/*.JPEG      in class folders, not as the flat archive unpacks

Only the classes of --class-list need to be there (for first100 all thousand).
"""


def load(config: TrainConfig) -> Benchmark:
    """The classes of --class-list; ImageNet's validation images are the test."""
    return build(read(config), config)


def read(config: TrainConfig) -> Listing:
    """Lists the images; DataError if the list or a class folder is not as wanted."""
    root = require_root("imagenet-100", config.data_dir, LAYOUT, PAGE)
    parts = find_parts(root, VALIDATION_NAMES)  # ImageNet's own test images have no labels
    if parts is None:
        raise DataError(f"--data-dir: {root} has no train/ and val/; wanted:\n\n{LAYOUT.rstrip()}")
    there = {part: subfolders(root / part) for part in parts}
    classes = choose_classes(config.class_list, there[parts[0]])
    for part, found in there.items():
        lacking = sorted(set(classes) - set(found))
        if lacking:
            raise DataError(
                f"--data-dir: {root / part} lacks {len(lacking)} of the {CLASSES} class folders, the first is "
                f"{lacking[0]}; wanted:\n\n{LAYOUT.rstrip()}"
            )
    train, test = list_parts(root, parts, classes)
    return Listing(
        name="imagenet-100",
        root=root,
        class_names=tuple(classes),
        train=train.samples,
        test=test.samples,
        default_tasks=TASKS,
        folders=tuple(f"{part}/{wnid}" for part in there for wnid in classes),
        advice=ADVICE,
        problems=train.problems + test.problems,
        expected={"val": CLASSES * VALIDATION_IMAGES},
        found={"train": len(train.samples), "val": len(test.samples)},
        unread=train.unread + test.unread,
    )


def choose_classes(class_list: str | None, there: list[str]) -> list[str]:
    """The hundred wnids that --class-list means; ``there`` are the training folders, for first100."""
    if class_list is None:
        raise DataError("--benchmark imagenet-100 needs --class-list: a file with 100 wnids, one a line, or first100")
    if class_list == "first100":
        if len(there) != IMAGENET_CLASSES:
            raise DataError(
                f"--class-list first100 are the first of all {IMAGENET_CLASSES} training folders, got {len(there)}; "
                "name the classes in a file"
            )
        return there[:CLASSES]
    return read_class_list(Path(class_list))


def read_class_list(path: Path) -> list[str]:
    """The wnids of a list file in their order; DataError naming the line that is not one, or there before."""
    first: dict[str, int] = {}
    for number, line in enumerate(read_lines(path, "--class-list", " (a file, or first100)"), start=1):
        if not line.strip():
            continue
        found = re.match(r"\s*(n\d{8})\b", line)
        if not found:
            raise DataError(f"--class-list: {path}:{number} must begin with a wnid like n01440764, got {line[:80]!r}")
        if found[1] in first:
            raise DataError(f"--class-list: {path}:{number} repeats {found[1]} of line {first[found[1]]}")
        first[found[1]] = number
    if len(first) != CLASSES:
        raise DataError(f"--class-list: {path} must name {CLASSES} classes, got {len(first)}")
    return list(first)
