"""``domainnet``: 345 classes in up to six domains, from the official folders and one of two kinds of lists.

| --split | lists |
|---|---|
| auto | <domain>_train.txt and <domain>_test.txt, the official ones: lines <domain>/<class>/<file> <class id> |
| coda | domainnet_train.yaml and domainnet_test.yaml, as CODA-Prompt, InfLoRA and others share them (--split-files) |

A yaml file has a list ``data`` of paths and a list ``targets`` of class ids. In both kinds the last three steps of a
path count, so data/DomainNet/clipart/... will do, as will tabs, backslashes and a byte order mark. Class ids and names
come from the lists, so does the split; the five domains without quickdraw are the default, as in the lists that the
LoRA papers share (CODA-Prompt #19). Every entry is checked before an image is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from janus_ext.data.benchmark import Benchmark
from janus_ext.data.files import build
from janus_ext.data.layout import shorten
from janus_ext.data.listing import Listing, Problem, Sample, require_root
from janus_ext.data.lists import Register, class_id, read_lines, read_yaml
from janus_ext.data.tasks import default_tasks

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

LOG = logging.getLogger("janus_ext")
CLASSES = 345
TASKS = 5
PARTS = ("train", "test")
OFFICIAL = {  # images in <domain>_train.txt and <domain>_test.txt
    "clipart": (33_525, 14_604),
    "infograph": (36_023, 15_582),
    "painting": (50_416, 21_850),
    "quickdraw": (120_750, 51_750),
    "real": (120_906, 52_041),
    "sketch": (48_212, 20_916),
}
YAML_FILES = ("domainnet_train.yaml", "domainnet_test.yaml")
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
    """Reads the lists; DataError if one is missing or lacks classes, what is wrong with entries is among the problems.

    One domain alone may lack classes, which are then left out.
    """
    domains = [domain for domain in OFFICIAL if domain in config.domains]
    root = require_root("domainnet", config.data_dir, layout(domains), PAGE)
    register = Register(CLASSES, steps=3)
    if config.split == "coda":
        files = config.split_files or tuple(root / name for name in YAML_FILES)
        parts = [_read_yaml(register, file, domains) for file in files]
    else:
        parts = [{domain: _read_text(register, root, domain, part) for domain in domains} for part in PARTS]
    train, test = (mix(part.values()) for part in parts)
    listing = Listing(
        name="domainnet",
        root=root,
        class_names=(),
        train=train,
        test=test,
        default_tasks=TASKS,
        folders=tuple(domains),
        advice=ADVICE,
        expected={f"{d} {p}": OFFICIAL[d][i] for d in domains for i, p in enumerate(PARTS)},
        found={f"{d} {p}": len(part[d]) for d in domains for p, part in zip(PARTS, parts, strict=True)},
    )
    if len(domains) == 1 and not register.problems:
        return without_absent_classes(listing, register.names)
    names = register.class_names(f"--data-dir: the lists of {', '.join(domains)}")
    return replace(listing, class_names=names, problems=tuple(register.problems))


def without_absent_classes(listing: Listing, names: dict[int, str]) -> Listing:
    """The listing of one domain with the classes that it can teach: those with a training image, numbered anew.

    ``names`` are the names of the class ids in its lists.
    """
    domain = listing.folders[0]
    there = sorted({sample.label for sample in listing.train})
    absent = [names.get(label, f"class id {label}") for label in range(CLASSES) if label not in there]
    tasks = default_tasks(len(there), TASKS)
    if absent:
        LOG.warning(
            "%s has no training image of %d of the %d classes (%s): they are left out, the class ids behind them move "
            "up, and %d classes are divided into tasks",
            *(domain, len(absent), CLASSES, shorten(absent), len(there)),
        )
    ids = {label: position for position, label in enumerate(there)}
    train, test = (
        tuple(Sample(sample.name, ids[sample.label]) for sample in part if sample.label in ids)
        for part in (listing.train, listing.test)
    )
    return replace(listing, class_names=tuple(names[c] for c in there), train=train, test=test, default_tasks=tasks)


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


# the two kinds of lists -----------------------------------------------------------------------------------------------
def _read_text(register: Register, root: Path, domain: str, part: str) -> list[Sample]:
    """The sound lines of <domain>_<part>.txt; DataError if there is no such file, or nothing in it."""
    file = f"{domain}_{part}.txt"
    advice = f" (--domains may leave {domain} out, --split coda reads {YAML_FILES[0]}); wanted:\n\n{layout([domain])}"
    samples = []
    for number, line in enumerate(read_lines(root / file, "--data-dir: the list", advice), start=1):
        where, words = f"{file}:{number}", line.rsplit(None, 1)
        if not words:
            continue
        if len(words) < 2 or not isinstance(class_id(words[1]), int):
            register.refuse(where, f"wanted <path> <class id>, got {line.strip()[:80]!r}")
        elif sample := register.add(where, words[0], class_id(words[1]), within=[domain]):
            samples.append(sample)
    if not samples:
        register.problems.append(Problem("empty", file, "no line names an image"))
    return samples


def _read_yaml(register: Register, file: Path, domains: Sequence[str]) -> dict[str, list[Sample]]:
    """The sound entries of a yaml file by domain; those of other domains are left out."""
    samples: dict[str, list[Sample]] = {domain: [] for domain in OFFICIAL}
    for entry in read_yaml(file):
        if sample := register.add(*entry, within=OFFICIAL):
            samples[sample.name.split("/")[0]].append(sample)
    for domain in domains:
        if not samples[domain]:
            register.problems.append(
                Problem("empty", file.name, f"no entry is of {domain}, which --domains may leave out")
            )
    return {domain: samples[domain] for domain in domains}
