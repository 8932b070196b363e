"""``domainnet``: 345 classes in up to six domains, from the official folders and lists.

Class ids and names come from the lists, so does the split; the five domains without quickdraw are the default, as in
the lists that the LoRA papers share (CODA-Prompt #19). Every line of a list is checked before an image is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from janus_ext.data.benchmark import Benchmark
from janus_ext.data.files import build
from janus_ext.data.listing import Listing, Problem, Sample, require_root
from janus_ext.errors import DataError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

CLASSES = 345
TASKS = 5
OFFICIAL = {  # images in <domain>_train.txt and <domain>_test.txt
    "clipart": (33_525, 14_604),
    "infograph": (36_023, 15_582),
    "painting": (50_416, 21_850),
    "quickdraw": (120_750, 51_750),
    "real": (120_906, 52_041),
    "sketch": (48_212, 20_916),
}
PAGE = "http://ai.bu.edu/M3SDA/"
ADVICE = f"For clipart and painting take the 'ground truth' archives of {PAGE}, the other ones lack files."


def layout(domains: Iterable[str]) -> str:
    """The files wanted, for an error message."""
    return "".join(
        f"<data-dir>/{domain}/<class>/*.jpg   <data-dir>/{domain}_train.txt   <data-dir>/{domain}_test.txt\n"
        for domain in domains
    ) + ("\nLines of a list read: clipart/aircraft_carrier/clipart_001_000001.jpg 0")


def load(config: TrainConfig) -> Benchmark:
    """The domains of --domains mixed, 69 classes a task by default; class ids are those of the lists."""
    return build(read(config), config)


def read(config: TrainConfig) -> Listing:
    """Reads the lists; DataError if one is missing or the classes are not 345, all else is among the problems."""
    domains = [domain for domain in OFFICIAL if domain in config.domains]
    root = require_root("domainnet", config.data_dir, layout(domains), PAGE)
    lists = Lists(root)
    parts = {}
    for part in ("train", "test"):
        parts[part] = {domain: lists.read(domain, part) for domain in domains}
    if len(lists.names) != CLASSES:
        raise DataError(f"--data-dir: the lists in {root} must name {CLASSES} classes (0..344), got {len(lists.names)}")
    return Listing(
        name="domainnet",
        root=root,
        class_names=tuple(lists.names[label] for label in range(CLASSES)),
        train=mix(parts["train"].values()),
        test=mix(parts["test"].values()),
        default_tasks=TASKS,
        folders=tuple(domains),
        advice=ADVICE,
        problems=tuple(lists.problems),
        expected={f"{d} {p}": OFFICIAL[d][i] for d in domains for i, p in enumerate(("train", "test"))},
        found={f"{d} {p}": len(parts[p][d]) for d in domains for p in ("train", "test")},
    )


def mix(domains: Iterable[Iterable[Sample]]) -> tuple[Sample, ...]:
    """All samples, the domains taking turns within each class, so that the first few of a class are of all domains."""
    ranked = []
    for samples in domains:
        seen: dict[int, int] = {}
        for sample in samples:
            seen[sample.label] = rank = seen.get(sample.label, -1) + 1
            ranked.append((rank, sample))
    ranked.sort(key=lambda item: item[0])  # stable: the domains keep their order
    return tuple(sample for _, sample in ranked)


@dataclass
class Lists:
    """Reads the lists of a data set one after another and notes what does not fit, with file and line."""

    root: Path
    names: dict[int, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    _first: dict[str, str] = field(default_factory=dict)  # where an image was listed first
    _labels: dict[str, int] = field(default_factory=dict)  # class id by name, the inverse of names

    def read(self, domain: str, part: str) -> list[Sample]:
        """The sound lines of <domain>_<part>.txt; DataError if there is no such file."""
        file = f"{domain}_{part}.txt"
        samples = []
        for number, line in enumerate(self._lines(file), start=1):
            where = f"{file}:{number}"
            complaint, sample = self._parse(line.strip(), domain)
            complaint = complaint or self._notice(sample, where)
            if complaint:
                self.problems.append(Problem("wrong", where, complaint))
            elif sample:
                samples.append(sample)
        return samples

    def _lines(self, file: str) -> Iterator[str]:
        try:
            yield from (self.root / file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            domain = file.rpartition("_")[0]
            raise DataError(
                f"--data-dir: the list {self.root / file} cannot be read: {reason} (--domains may leave {domain} out); "
                f"wanted:\n\n{layout([domain])}"
            ) from error

    def _parse(self, line: str, domain: str) -> tuple[str, Sample | None]:
        """(complaint, None) or ("", sample); an empty line is nothing."""
        if not line:
            return "", None
        path, _, label = line.rpartition(" ")
        if not path or not label.isdecimal():
            return f"wanted <path> <class id>, got {line[:80]!r}", None
        if int(label) >= CLASSES:
            return f"the class id must lie in 0..{CLASSES - 1}, got {label}", None
        path = path.strip()
        steps = path.split("/")
        if len(steps) != 3 or steps[0] != domain or not {"", ".", ".."}.isdisjoint(steps):
            return f"wanted {domain}/<class>/<file>, got {path[:80]!r}", None
        return "", Sample(path, int(label))

    def _notice(self, sample: Sample | None, where: str) -> str:
        """Complaint about a line that contradicts an earlier one: an image twice, a class with two ids or two names."""
        if sample is None:
            return ""
        name = sample.name.split("/")[1]
        if sample.name in self._first:
            return f"{sample.name} is listed in {self._first[sample.name]} already"
        self._first[sample.name] = where
        if self.names.setdefault(sample.label, name) != name:
            return f"class {sample.label} is {self.names[sample.label]} in earlier lines, here {name}"
        if self._labels.setdefault(name, sample.label) != sample.label:
            return f"{name} is class {self._labels[name]} in earlier lines, here {sample.label}"
        return ""
