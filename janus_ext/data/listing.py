"""What the folders and lists of a data set say, before any image is opened: samples, classes, counts, problems."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from janus_ext.data.names import ENDINGS, is_clutter, is_image, is_other_image, to_bytes
from janus_ext.errors import DataError, on_one_line


class Sample(NamedTuple):
    """One image: its path below the data set's folder, with slashes, and its class id."""

    name: str
    label: int


class Problem(NamedTuple):
    """Something wrong with a file or a line of a list; ``kind`` says what it is, ``where`` is a path or path:line."""

    kind: str
    where: str
    detail: str = ""

    def __str__(self) -> str:
        return on_one_line(f"{self.where} is {self.kind}" + (f": {self.detail}" if self.detail else ""))


@dataclass(frozen=True)
class Listing:
    """A data set as its folders and lists describe it.

    ``expected`` holds the official number of images per part, ``found`` the listed one, under the same keys;
    ``folders`` are those in which every image should be listed; ``advice`` ends every report about broken files;
    ``unread`` are image files in class folders whose ending does not count; ``upright`` applies the orientation that
    a camera noted.
    """

    name: str
    root: Path
    class_names: tuple[str, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    default_tasks: int
    folders: tuple[str, ...]
    advice: str
    problems: tuple[Problem, ...] = ()
    expected: Mapping[str, int] = field(default_factory=dict)
    found: Mapping[str, int] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    upright: bool = False

    def unlike_official(self) -> list[str]:
        """One phrase per part whose number of images is not the official one."""
        pairs = [(part, self.found.get(part, 0), count) for part, count in self.expected.items()]
        return [f"{part} {found:,} images (official: {count:,})" for part, found, count in pairs if found != count]


def require_root(benchmark: str, data_dir: Path | None, layout: str, page: str) -> Path:
    """--data-dir if it is a folder; otherwise a DataError that shows the files wanted and where they are described."""
    wanted = f"wanted:\n\n{layout.rstrip()}\n\nThe data set is described at {page}"
    if data_dir is None:
        raise DataError(f"--benchmark {benchmark} needs --data-dir; {wanted}")
    if not data_dir.is_dir():
        found = "is no folder" if data_dir.exists() else "does not exist"
        raise DataError(f"--data-dir {data_dir} {found}; {wanted}")
    return data_dir


def subfolders(folder: Path) -> list[str]:
    """Sorted names of the folders in ``folder``, without clutter (which editors, notebooks and archives leave)."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e.name for e in entries if os.path.isdir(e) and not is_clutter(e.name)), key=to_bytes)
    except OSError as error:
        raise DataError(f"{on_one_line(str(folder))} cannot be read: {error.strerror}") from error


def files_below(root: Path, folder: str) -> list[str]:
    """Sorted paths, relative to ``root``, of all files below ``root / folder`` but clutter; links are followed.

    ``folder`` is below ``root``, or "" for all that is.
    DataError names a folder that cannot be read and a link to a folder that it lies in.
    """
    start = os.path.join(root, folder)
    try:
        above = frozenset(map(_identity, [root, os.path.dirname(start)] if folder else ()))
        found = list(_walk(start, above))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    found.sort(key=lambda path: os.path.split(to_bytes(path)))  # folder by folder, as torchvision's ImageFolder sorts
    skipped = len(os.path.join(root, ""))
    return [path[skipped:].replace(os.sep, "/") for path in found]


def _identity(folder: str | Path) -> tuple[int, int]:
    """What a folder is under all its names."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Paths of all files below ``folder``, in no order; ``above`` are the folders it lies in."""
    identity = _identity(folder)
    if identity in above:
        raise DataError(f"{on_one_line(str(folder))} is a symbolic link to a folder it lies in; remove the link")
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_clutter(entry.name):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                yield entry.path  # a link to nothing or to itself: missing, which the check of the images reports
            elif entry.is_dir():
                yield from _walk(entry.path, above | {identity})
            else:
                yield entry.path


class Found(NamedTuple):
    """What class folders hold: images, problems, and images whose ending does not count."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    unread: tuple[str, ...]


def class_samples(root: Path, part: str, classes: Sequence[str]) -> Found:
    """Images of the class folders ``root / part / <class>``, labelled by position, and a problem per empty class."""
    samples: list[Sample] = []
    problems, unread = [], []
    for label, name in enumerate(classes):
        folder = f"{part}/{name}" if part else name
        files = files_below(root, folder)
        images = [Sample(path, label) for path in files if is_image(path)]
        others = [path for path in files if is_other_image(path)]
        if not images:
            detail = f"its {len(others)} files like {others[0]} are not read. {ENDINGS}" if others else ""
            problems.append(Problem("without images", folder, detail or "a class folder has at least one"))
        samples += images
        unread += others
    return Found(tuple(samples), tuple(problems), tuple(unread))


def list_parts(root: Path, parts: tuple[str, str], classes: Sequence[str]) -> tuple[Found, Found]:
    """The training and the test images of the class folders in the two folders ``parts`` of ``root``."""
    return class_samples(root, parts[0], classes), class_samples(root, parts[1], classes)


def count(samples: Iterable[Sample], classes: int) -> list[int]:
    """Number of samples of each class."""
    counts = [0] * classes
    for sample in samples:
        counts[sample.label] += 1
    return counts


def require_classes(found: Sequence[str], wanted: int, where: Path, layout: str) -> None:
    """DataError unless ``found`` has exactly ``wanted`` classes."""
    if len(found) != wanted:
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise DataError(
            f"--data-dir: {where} must hold {wanted} class folders, got {len(found)} ({some or 'none'}); "
            f"wanted:\n\n{layout.rstrip()}"
        )
