"""Which folders of a data set are its training and its test side, and trees that are not what they look like."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from janus_ext.data.listing import subfolders
from janus_ext.errors import DataError, on_one_line

LOG = logging.getLogger("janus_ext")
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation", "dev")
TEST_NAMES = ("test", "testing", *VALIDATION_NAMES)  # the first that is there


def find_parts(root: Path, tests: Sequence[str] = TEST_NAMES) -> tuple[str, str] | None:
    """The folders of ``root`` with training and test images, in any case of letters; None if it has no such pair.

    Of several test sides the first in the order of ``tests`` is taken, those without class folders last (as the images
    without labels of a competition); what is not used beside them is said once.
    """
    found = subfolders(root)
    train, test = ([name for w in wanted for name in found if name.lower() == w] for wanted in (TRAIN_NAMES, tests))
    if not train or not test:
        return None
    if len(train) > 1:
        raise DataError(f"--data-dir: {root} has {' and '.join(train)}: leave one folder of training images there")
    test.sort(key=lambda name: not subfolders(root / name))  # stable
    unused = [f"{name}/" for name in found if name not in (train[0], test[0])]
    if unused:
        LOG.warning("%s: images come from %s/ and %s/; not used: %s", root, train[0], test[0], shorten(unused))
    return train[0], test[0]


def shared_classes(root: Path, first: str, second: str) -> list[str]:
    """The class folders of ``root / first``; DataError unless ``root / second`` has the same ones."""
    classes = subfolders(root / first)
    others = sorted(set(classes) ^ set(subfolders(root / second)))
    if others or not classes:
        found = f"only one of them has {shorten(others)}" if others else "they have none"
        raise DataError(f"--data-dir: {root / first} and {root / second} must have the same class folders; {found}")
    return classes


def require_class_level(root: Path, folders: Sequence[str], advice: str) -> None:
    """DataError if the ``folders`` of ``root`` all hold the same folders: splits or domains, whose classes lie below.

    At least half of all that they hold must be common to all. One common folder is no sign: many data sets have
    <class>/images/. The names of a training and a test side are one, whatever they hold: a competition's test images
    have no labels. ``advice`` says what to do, and how to say that they are classes all the same.
    """
    if len(folders) < 2:
        return
    sides = [[name for name in folders if name.lower() in names] for names in (TRAIN_NAMES, TEST_NAMES)]
    if all(sides):
        raise DataError(
            f"{root} holds training and test images ({shorten(sides[0] + sides[1])}), and no class folders: {advice}"
        )
    every = common = set(subfolders(root / folders[0]))
    for folder in folders[1:]:
        if len(common) < 2:
            return
        held = set(subfolders(root / folder))
        every, common = every | held, common & held
    if len(common) >= 2 and 2 * len(common) >= len(every):
        raise DataError(
            f"the {len(folders)} folders of {root} ({shorten(folders)}) all hold the same folders "
            f"({shorten(sorted(common))}), so they look like splits or domains and not like classes: {advice}"
        )


def require_several(root: Path, classes: Sequence[str]) -> None:
    """DataError if ``classes``, the folders of ``root``, are one alone; says where the classes may be."""
    if len(classes) == 1:
        below = subfolders(root / classes[0])
        hint = f", which holds {len(below)} folders: is --data-dir {root / classes[0]} meant?" if below else ""
        raise DataError(
            f"--data-dir: {root} has one class folder alone, {classes[0]}{hint or '; wanted are two or more'}"
        )


def shorten(names: Sequence[str], most: int = 3) -> str:
    """The first ``most`` names, and a sign that there are others."""
    return ", ".join(map(on_one_line, names[:most])) + (", ..." if len(names) > most else "")
