"""Published data sets of class folders: what is known of each, and a tree on the disk compared with that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from janus_ext.data.layout import shared_classes
from janus_ext.data.listing import (
    Found,
    Listing,
    Problem,
    Sample,
    class_samples,
    list_parts,
    require_classes,
    require_root,
    subfolders,
)

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

TASKS = 10
ALL = "train and test"


@dataclass(frozen=True)
class Published:
    """A data set: ``layout`` shows the files wanted, ``page`` describes it, ``advice`` says where its archive is."""

    name: str
    classes: int
    layout: str
    page: str
    advice: str

    def root(self, config: TrainConfig) -> Path:
        """--data-dir; DataError if there is no such folder."""
        return require_root(self.name, config.data_dir, self.layout, self.page)

    def tree(self, root: Path) -> tuple[list[str], Found]:
        """The class folders of ``root`` and their images; DataError unless there are as many as the data set has."""
        classes = subfolders(root)
        require_classes(classes, self.classes, root, self.layout)
        return classes, class_samples(root, "", classes)

    def sides(self, root: Path, parts: tuple[str, str], *known: Mapping[str, int]) -> Listing:
        """The training and the test images of the two folders ``parts``, which have the same classes.

        ``known`` are the numbers of images of the splits in circulation; the first is expected unless another is found.
        """
        classes = shared_classes(root, *parts)
        require_classes(classes, self.classes, root / parts[0], self.layout)
        train, test = list_parts(root, parts, classes)
        found = {"train": len(train.samples), "test": len(test.samples)}
        return self.listing(
            root,
            classes,
            (train.samples, test.samples),
            parts,
            expected=found if found in known else known[0],
            problems=train.problems + test.problems,
            unread=train.unread + test.unread,
        )

    def listing(
        self,
        root: Path,
        classes: Sequence[str],
        splits: tuple[Sequence[Sample], Sequence[Sample]],
        folders: Sequence[str],
        expected: Mapping[str, int],
        problems: Sequence[Problem] = (),
        unread: Sequence[str] = (),
    ) -> Listing:
        """The data set with ``splits``, training and test; ``expected`` counts them, or, under ALL, both together."""
        train, test = map(tuple, splits)
        counts = {"train": len(train), "test": len(test), ALL: len(train) + len(test)}
        return Listing(
            name=self.name,
            root=root,
            class_names=tuple(classes),
            train=train,
            test=test,
            default_tasks=TASKS,
            folders=tuple(folders),
            advice=self.advice,
            problems=tuple(problems),
            expected=expected,
            found={part: counts[part] for part in ("train", "test", *expected)},
            unread=tuple(unread),
        )
