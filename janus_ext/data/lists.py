"""Lists of labelled images, as text and as CODA-Prompt's yaml: read leniently, every contradiction noted by its place.

A path may begin with folders of another machine, with ``./``, and may have backslashes: its last steps are what counts.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from janus_ext.arguments import shown
from janus_ext.data.listing import Problem, Sample
from janus_ext.data.names import is_possible
from janus_ext.errors import DataError

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_lines(path: Path, argument: str, advice: str = "") -> list[str]:
    """The lines of a text file, with or without a byte order mark, of any system.

    Bytes that are no UTF-8 are kept as Python keeps them in names of files. DataError if it cannot be read: begins with
    ``argument``, which names the file, and ends with ``advice``.
    """
    try:
        data = _contents(path)
        text = data.decode("utf-16") if data.startswith(UTF16) else data.decode("utf-8-sig", "surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{argument} {path} cannot be read: {reason}{advice}") from error
    return re.split(r"\r\n|\r|\n", text)


def _contents(path: Path) -> bytes:
    """OSError for a pipe in a folder, which would be waited for; one of the shell's, ``<(sort names)``, is read."""
    if path.is_fifo() and path.parts[:2] != ("/", "dev"):
        raise OSError(0, "it is a pipe, and no file")
    return path.read_bytes()


def class_id(word: str) -> int | str:
    """The number that a word of a list is, in at most nine digits; the word itself where it is none."""
    return int(word) if re.fullmatch("[0-9]{1,9}", word) else word


def read_yaml(file: Path) -> Iterator[tuple[str, Any, Any]]:
    """(place, path, class id) of each entry of a file with the lists "data" and "targets"; no code in it is run."""
    import yaml

    try:
        table = yaml.load(_contents(file), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        data, targets = list(table["data"]), list(table["targets"])
    except OSError as error:
        raise DataError(f"--split coda: {file} cannot be read: {error.strerror}; name it with --split-files") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())  # the constructors of dates and numbers raise what they meet
        raise DataError(f"--split coda: {file} is no yaml with the lists 'data' and 'targets': {reason}") from error
    if len(data) != len(targets):
        raise DataError(f"--split coda: {file} has {len(data)} entries in 'data' and {len(targets)} in 'targets'")
    for number, (path, label) in enumerate(zip(data, targets, strict=True), start=1):
        yield f"{file.name}, entry {number}", path, label


def _shown(value: Any) -> str:
    """A value for a message; of a list or table of yaml, which may be endless when it is written out, the type."""
    return f"{value!r:.80}" if isinstance(value, (str, float)) else shown(value)[:80]


@dataclass
class Register:
    """All entries of the lists of one data set; notes what does not fit, with its place.

    ``steps`` are the last steps of a path that name an image: 2 for <class>/<file>, 3 for <domain>/<class>/<file>.
    ``first`` is the least class id of the lists, which becomes 0; ``names`` are by the ids of the lists.
    """

    classes: int
    steps: int
    first: int = 0
    names: dict[int, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    _places: dict[str, str] = field(default_factory=dict)  # where an image was listed first
    _labels: dict[str, int] = field(default_factory=dict)  # class id by name, the inverse of names

    def add(self, where: str, path: Any, label: Any, within: Collection[str] = ()) -> Sample | None:
        """The image of an entry, or None and a problem; its first step is among ``within``, if there are any."""
        name = self._name(path, within)
        if name is None:
            form = ("/".join(("|".join(within), "<class>", "<file>"))).lstrip("/")
            return self.refuse(where, f"wanted {form}, got {_shown(path)}")
        if not isinstance(label, int) or isinstance(label, bool) or label not in self.ids:
            span = f"{self.ids[0]}..{self.ids[-1]}"
            return self.refuse(where, f"the class id must lie in {span}, got {_shown(label)}")
        complaint = self._contradiction(name, label, where)
        return self.refuse(where, complaint) if complaint else Sample(name, label - self.first)

    def refuse(self, where: str, complaint: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem("wrong", where, complaint))

    def class_names(self, lists: str) -> tuple[str, ...]:
        """The names of all classes; DataError if some are missing and no entry is to blame, which is said otherwise."""
        missing = [label for label in self.ids if label not in self.names]
        if missing and not self.problems:
            raise DataError(
                f"{lists} must name {self.classes} classes ({self.ids[0]}..{self.ids[-1]}), got {len(self.names)}; "
                f"the first that is missing is {missing[0]}"
            )
        return tuple(self.names.get(label, f"class {label}") for label in self.ids)

    @property
    def ids(self) -> range:
        """The class ids that the lists may have."""
        return range(self.first, self.first + self.classes)

    def _name(self, path: Any, within: Collection[str]) -> str | None:
        if not isinstance(path, str) or not is_possible(path):
            return None
        steps = [step for step in path.replace("\\", "/").split("/") if step not in ("", ".")][-self.steps :]
        sound = len(steps) == self.steps and ".." not in steps and (not within or steps[0] in within)
        return "/".join(steps) if sound else None

    def _contradiction(self, name: str, label: int, where: str) -> str:
        """Complaint about an image that is listed twice, a class with two ids or two names; notes what is sound."""
        class_name = name.split("/")[-2]
        if name in self._places:
            return f"{name} is listed in {self._places[name]} already"
        self._places[name] = where
        if self.names.get(label, class_name) != class_name:
            return f"class {label} is {self.names[label]} in earlier entries, here {class_name}"
        if self._labels.get(class_name, label) != label:
            return f"{class_name} is class {self._labels[class_name]} in earlier entries, here {label}"
        self.names[label], self._labels[class_name] = class_name, label
        return ""
