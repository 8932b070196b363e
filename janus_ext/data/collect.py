"""Images that somebody hands over, in any of the usual forms, as a split: a folder of class folders, files with labels,
a data set of images with labels; and images without labels.

Whatever is to be learned from is decoded once before, so an image that cannot be read is an error while nothing is
learned yet.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from janus_ext.arguments import checked_path, shown
from janus_ext.data import check
from janus_ext.data.benchmark import Split
from janus_ext.data.files import warn_of_unread
from janus_ext.data.images import Files, ImageSplit, Source, View
from janus_ext.data.items import MOST_NAMED, PATHS, Items, Label, is_pair, look_at, name_of, naming, to_label
from janus_ext.data.layout import require_class_level, shorten
from janus_ext.data.listing import Problem, class_samples, files_below, subfolders
from janus_ext.data.names import ENDINGS, is_image, similar, to_bytes
from janus_ext.errors import ArgumentError, DataError, on_one_line

LABELLED = "a folder of class folders, a list of (path, label), or a map-style data set of (image, label)"
UNLABELLED = "a folder, a pattern or path, a PIL image, a uint8 tensor, a list of these, or a map-style data set"
CLASS_LEVEL = "hand over one of them, or name them in classes= if they are classes"
SQUARE = View()  # 224 pixels, the middle of a resized image


# with labels ---------------------------------------------------------------------------------------------------------
class Labelled(NamedTuple):
    """Images whose labels are positions in ``class_names``; each class has one at least."""

    split: ImageSplit
    class_names: tuple[str, ...]


def labelled(images: Any, classes: Sequence[str] | None = None, view: View = SQUARE, workers: int = 0) -> Labelled:
    """Images to learn, all of them decoded once, as a split whose images become what ``view`` says.

    ``images`` is a folder of class folders (images at any depth below, as for the benchmark "folder"), a list of (path,
    label), or a map-style data set of (image, label), where an image is what
    :func:`~janus_ext.data.items.to_image` takes. A label is a class name or an integer: a position among the data set's
    own ``.classes`` (a Subset's are those of what it is cut from), or in ``classes`` where it has none.

    ``classes`` are the names in the order of the labels. Of a folder, and of a data set with ``.classes``, they choose:
    images of other classes there are left alone. Left out, they are the sorted folders, the ``.classes`` that have
    images, or the sorted names among the labels. One image is enough for a class. Training passes crop and flip at
    random, others resize and take the middle; the bits are the same for any number of ``workers``.

    Raises:
        ArgumentError: ``images`` or ``classes`` is nothing of the kind.
        DataError: there is no image, or none of a class; one cannot be read; a label is none of the classes'. The
            first culprits are named.
    """
    wanted = None if classes is None else checked_names(classes)
    found = _find(images, wanted, workers)
    if wanted and found.own:
        _require_known(wanted, found.own, images)
    names = wanted or found.present_names()
    rows, labels = found.resolve(names, leaving=found.own)
    lacking = [names[label] for label in sorted(set(range(len(names))) - set(labels))]
    if lacking:
        raise DataError(f"images must be of every class, {len(lacking)} of {len(names)} have none: {shorten(lacking)}")
    return Labelled(found.checked_split(rows, labels, view, workers), names)


def labelled_as(images: Any, classes: Sequence[str], view: View = SQUARE, workers: int = 0) -> ImageSplit:
    """Images to evaluate a model of ``classes`` on, in the forms of :func:`labelled`; labels are positions in these.

    Not every class needs an image, but every image's class has to be among ``classes``.

    Raises:
        ArgumentError, DataError: as :func:`labelled`.
    """
    names = checked_names(classes)
    found = _find(images, None, workers, names)
    rows, labels = found.resolve(names)
    return found.checked_split(rows, labels, view, workers)


@dataclass(frozen=True)
class Found:
    """Images with their labels as they came; ``own`` are the names that they brought for their classes, if they did."""

    source: Source
    keys: Sequence[Any]
    samples: Sequence[str]
    labels: Sequence[Label]
    own: tuple[str, ...] = ()

    def present_names(self) -> tuple[str, ...]:
        """The classes that have images: of their own ones, in their order, or the sorted names among the labels."""
        if not self.own and any(isinstance(label, int) for label in self.labels):
            raise DataError("the labels are numbers, so classes= must name the classes, in their order")
        found = {self._name(label, self.own) for label in self.labels}
        if self.own:
            return tuple(name for name in self.own if name in found)
        return tuple(sorted(found, key=to_bytes))

    def resolve(self, names: tuple[str, ...], leaving: Sequence[str] = ()) -> tuple[list[int], list[int]]:
        """(rows, labels): the images of the classes ``names`` and their positions there; those of ``leaving`` are left.

        DataError names the first labels that are in neither.
        """
        ids = {name: label for label, name in enumerate(names)}
        rows, labels, culprits = [], [], []
        for row, label in enumerate(self.labels):
            name = self._name(label, self.own or names)
            if name in ids:
                rows.append(row)
                labels.append(ids[name])
            elif name is None or name not in leaving:
                culprits.append(row)
        if culprits:
            self._refuse(culprits, names)
        return rows, labels

    def checked_split(self, rows: Sequence[int], labels: Sequence[int], view: View, workers: int) -> ImageSplit:
        """The images at ``rows``; DataError names the first files among them that cannot be read."""
        keys, samples = ([values[row] for row in rows] for values in (self.keys, self.samples))
        if isinstance(self.source, Files):
            _refuse(check.examine(self.source, keys), f"images below {self.source.root}: ")
        return ImageSplit(self.source, keys, torch.tensor(labels, dtype=torch.int64), samples, view, workers)

    def _name(self, label: Label, names: Sequence[str]) -> str | None:
        """The class of a label; None for a number outside ``names``."""
        if isinstance(label, str):
            return label
        return names[label] if 0 <= label < len(names) else None

    def _refuse(self, culprits: Sequence[int], names: Sequence[str]) -> None:
        phrases = []
        first = {self.labels[row]: row for row in reversed(culprits)}  # of each label
        for row in sorted(first.values())[:MOST_NAMED]:
            label = self.labels[row]
            name = self._name(label, self.own)
            hint = f" (wanted 0..{len(self.own or names) - 1})" if name is None else similar(name, names)
            phrases.append(f"{self.samples[row]} has {label if name is None else repr(name)}{hint}")
        raise DataError(
            f"{len(culprits):,} of {len(self.labels):,} labels are none of the {len(names)} classes: "
            + "; ".join(phrases)
        )


def _find(images: Any, chosen: tuple[str, ...] | None, workers: int, known: Sequence[str] = ()) -> Found:
    """The images in any form; of a folder those of the ``chosen`` class folders alone. ``known`` classes are some."""
    if isinstance(images, PATHS):
        return _find_folders(checked_path("images", images), chosen, known)
    _require_items(images, LABELLED)
    if isinstance(images, (list, tuple)) and all(is_pair(item) and isinstance(item[0], PATHS) for item in images):
        return _find_files(images)
    in_memory = isinstance(images, (list, tuple))  # PIL reads on first use: here, before workers share open files
    labels = look_at(images, True, 0 if in_memory else workers)
    rows = range(len(labels))
    return Found(Items(images), rows, [name_of(row) for row in rows], labels, _own_names(images))


def _find_folders(root: Path, chosen: tuple[str, ...] | None, known: Sequence[str]) -> Found:
    named = on_one_line(str(root))
    if not root.is_dir():
        state = "is no folder" if root.exists() else "does not exist"
        raise DataError(f"images: {named} {state}; wanted {LABELLED}")
    there = tuple(subfolders(root))
    if not there:
        raise DataError(f"images: {named} has no class folders; wanted {named}/<class>/*.jpg. {ENDINGS}")
    if chosen is None and not set(there) <= set(known):
        require_class_level(root, there, CLASS_LEVEL)
    if chosen is not None:
        _require_known(chosen, there, root)
    names = chosen or there
    found = class_samples(root, "", names)
    _refuse(found.problems, f"images below {named}: ")
    warn_of_unread(root, found.unread)
    keys = [sample.name for sample in found.samples]
    return Found(Files(root, upright=True), keys, keys, [sample.label for sample in found.samples], names)


def _find_files(pairs: Sequence[tuple[Any, Any]]) -> Found:
    """Files by their paths below the folder that they have in common."""
    labels = []
    for index, (_, label) in enumerate(pairs):
        with naming(index):
            labels.append(to_label(label))
    paths = [Path(path).absolute() for path, _ in pairs]
    root = os.path.commonpath([path.parent for path in paths])
    keys = [path.relative_to(root).as_posix() for path in paths]
    of_key: dict[str, Label] = {}
    for key, label in zip(keys, labels, strict=True):
        if of_key.setdefault(key, label) != label:
            raise DataError(f"images: {on_one_line(key)} has two labels, {of_key[key]!r} and {label!r}")
    return Found(Files(Path(root), upright=True), keys, keys, labels)


def _own_names(images: Any) -> tuple[str, ...]:
    """The class names that a data set, or the one that it is a subset of, has itself."""
    while isinstance(images, Subset):
        images = images.dataset
    names = getattr(images, "classes", None)
    sound = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return tuple(names) if sound and len(set(names)) == len(names) else ()


# without labels ------------------------------------------------------------------------------------------------------
def unlabelled(images: Any, view: View = SQUARE, workers: int = 0) -> ImageSplit:
    """Images without labels (all of them -1) as a split whose images become what ``view`` says.

    ``images`` is a folder (all images below), a pattern ("photos/**/*.jpg"), a path, a PIL image, a uint8 tensor
    [3, H, W] or several in one [N, 3, H, W], a list of paths, PIL images and tensors, or a map-style data set of
    images; of an (image, label) the label is not read. ``samples`` are the paths, or positions as in "images[3]".
    None is decoded here: :func:`require_readable` looks at all, :func:`readable` leaves out what cannot be read.

    Raises:
        ArgumentError: ``images`` is nothing of the kind.
        DataError: there is no image. The split's passes raise it, with the name, for one that cannot be read.
    """
    from PIL.Image import Image

    if isinstance(images, PATHS):
        images = find_images([images])
    elif isinstance(images, Tensor):
        images = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, Image):
        images = [images]
    _require_items(images, UNLABELLED)
    labels = torch.full((len(images),), -1)
    if isinstance(images, (list, tuple)) and all(isinstance(image, PATHS) for image in images):
        paths = [os.fspath(path) for path in images]
        return ImageSplit(Files(Path(), upright=True), paths, labels, paths, view, workers)
    if isinstance(images, (list, tuple)):
        _load(images)
    rows = range(len(images))
    return ImageSplit(Items(images), rows, labels, [name_of(row) for row in rows], view, workers)


def require_readable(split: ImageSplit) -> None:
    """Decodes every image of a split from :func:`unlabelled`; DataError names the first that cannot be read."""
    if isinstance(split.source, Files):
        _refuse(check.find_broken(split.source, split.keys), "images: ")
    elif isinstance(split.source, Items):
        look_at(split.source.items, False, split.workers)


def find_images(places: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Paths of images, each once: of a folder all images below it, of a pattern those that match, a path as it is.

    A path that does not exist and a pattern that nothing matches stay as they are, for :func:`readable` to report.

    Raises:
        DataError: a folder holds no image, or cannot be read.
    """
    found: list[str] = []
    for place in map(os.fspath, places):
        if os.path.isdir(place):
            below = _images_below(place)
            if not below:
                raise DataError(f"{on_one_line(place)} holds no image. {ENDINGS}")
            found += below
        else:
            found += [place] if os.path.lexists(place) else _matching(place) or [place]
    return list(dict.fromkeys(found))


def readable(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[str], list[Problem]]:
    """(the paths of images that can be read, what is wrong with the others), each in their order; all are decoded."""
    names = [os.fspath(path) for path in paths]
    problems = check.find_broken(Files(Path(), upright=True), names)
    broken = {problem.where for problem in problems}
    return [name for name in names if name not in broken], problems


def _images_below(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in files_below(Path(folder), "") if is_image(name)]


def _matching(pattern: str) -> list[str]:
    """The images that a pattern matches, and those below folders that it matches."""
    found: list[str] = []
    for path in sorted(glob.glob(pattern, recursive=True), key=to_bytes):
        found += _images_below(path) if os.path.isdir(path) else [path] if is_image(path) else []
    return found


def _load(images: Sequence[Any]) -> None:
    """Lets PIL images read what they have not read yet, before workers share their open files."""
    from PIL.Image import Image

    for index, image in enumerate(images):
        if isinstance(image, Image):
            with naming(index):
                image.load()


def checked_split(split: Any) -> Split:
    """``split`` if it is one."""
    if not isinstance(split, Split):
        raise ArgumentError(f"split must be a Split, as those of a benchmark are, got {shown(split)}")
    return split


# checks --------------------------------------------------------------------------------------------------------------
def _require_items(images: Any, wanted: str) -> None:
    """Refuses what cannot be counted and asked by position, and what holds nothing."""
    import numpy as np

    has_positions = hasattr(images, "__len__") and hasattr(images, "__getitem__")
    strange = (str, bytes, Mapping, Tensor, np.ndarray, IterableDataset)
    if not has_positions or isinstance(images, strange):
        raise ArgumentError(f"images must be {wanted}, got {shown(images)}")
    if not len(images):
        raise DataError(f"images is empty; wanted {wanted}")


def checked_names(names: Sequence[str], argument: str = "classes") -> tuple[str, ...]:
    """``names`` if they are different texts, one at least."""
    if not isinstance(names, (list, tuple)) or not names:
        raise ArgumentError(f"{argument} must be a list of class names, got {shown(names)}")
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"{argument} must be names, got {shown(name)} at position {place}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ArgumentError(f"{argument} must be different names, got several times: {shorten(repeated)}")
    return tuple(names)


def _require_known(names: Sequence[str], there: Sequence[str], where: Any) -> None:
    """DataError names those of ``names`` that are none of the classes ``there``."""
    strange = [name for name in names if name not in set(there)]
    if strange:
        place = f"below {where}" if isinstance(where, PATHS) else "of the data set"
        some = "; ".join(f"{name!r}{similar(name, there)}" for name in strange[:MOST_NAMED])
        raise DataError(
            f"classes: {len(strange)} of {len(names)} names are none of the {len(there)} classes {place}: {some}"
        )


def _refuse(problems: Sequence[Problem], before: str) -> None:
    """DataError with the first problems, if there are any."""
    if problems:
        others = f"; and {len(problems) - MOST_NAMED:,} more" if len(problems) > MOST_NAMED else ""
        raise DataError(before + "; ".join(map(str, problems[:MOST_NAMED])) + others)
