"""Runs that differ only in their seed are one group: its name, its numbers with their spread, how it differs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_ext.config import TrainConfig, flag
from janus_ext.errors import ArgumentError
from janus_ext.reports.found import FoundRun
from janus_ext.reports.table import measured
from janus_ext.runs.checkpoint import to_json
from janus_ext.runs.settings import CONTENTS, NOT_COMPARED, with_own

UNREAD = "–"  # the method does not read the setting, or an older run has not stored it
OF_EACH_SEED = "of each seed"  # in place of the digest of a split that the seed draws
MOST_IN_NAME = 2  # settings in a group's name
DEFAULTS = {(flag(name), to_json(value)) for name, value in TrainConfig().to_json().items()}


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, in the order of their seeds."""

    name: str
    runs: tuple[FoundRun, ...]

    @property
    def folder(self) -> Path:
        """The folder that a single run has to itself, or that holds all the seeds'."""
        parents = {run.folder.parent for run in self.runs}
        return parents.pop() if len(self.runs) > 1 and len(parents) == 1 else self.runs[0].folder


def group_runs(runs: Iterable[FoundRun]) -> list[Group]:
    """The groups in the order of their first runs, by names that tell them apart.

    A run that repeats another one's seed is in a group of its own: it is no other draw, and would narrow the spread.
    """
    together: dict[tuple[str, int], list[FoundRun]] = {}
    repeated: Counter[tuple[str, int]] = Counter()
    for run in runs:
        identity = _identity(run)
        key = identity, run.results["seed"]
        together.setdefault((identity, repeated[key]), []).append(run)
        repeated[key] += 1
    groups = [Group("", tuple(sorted(group, key=lambda run: run.results["seed"]))) for group in together.values()]
    return [Group(name, group.runs) for name, group in zip(_names(groups), groups, strict=True)]


def differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Settings and versions that differ among the runs that have them: the name, and each group's value or values."""
    read = [[_settings(run) | run.results.get("versions", {}) for run in group.runs] for group in groups]
    names = dict.fromkeys(name for runs in read for settings in runs for name in settings)
    values = {name: [[_in_words(run.get(name, UNREAD)) for run in runs] for runs in read] for name in names}
    return [
        (name, [", ".join(dict.fromkeys(texts)) for texts in of_groups])
        for name, of_groups in values.items()
        if len({text for texts in of_groups for text in texts} - {UNREAD}) > 1
    ]


def _settings(run: FoundRun) -> dict[str, Any]:
    """What the run read of its configuration and what it was on, but for the seed and what no result depends on."""
    unread = NOT_COMPARED | {"seed", "class_names"} | _without_effect(run.settings)
    settings = {flag(name): value for name, value in with_own(run.settings).items() if name not in unread}
    drawn = run.settings.get("shuffle_classes") or run.settings.get("validation") is not None
    return settings | ({"--split-sha256": OF_EACH_SEED} if drawn else {})


def _without_effect(settings: dict[str, Any]) -> set[str]:
    """The settings that a run does not read; none where they are of a version whose settings mean something else."""
    known = {name: value for name, value in settings.items() if name in TrainConfig.__dataclass_fields__}
    try:
        return set(TrainConfig(**known).without_effect()) if known else set()
    except (ArgumentError, TypeError):  # the latter where a setting is missing
        return set()


def _identity(run: FoundRun) -> str:
    """What runs share that differ only in their seed.

    Images are compared by their names, or by where they lie if each seed draws its own split; weights by their content,
    devices by kind.

    A setting that an older run lacks, because its version did not know it, was what it is by default.
    """
    if not run.settings:
        return str(run.folder)
    settings = _settings(run)
    known = {key for key in CONTENTS if settings.get(flag(key)) not in (None, OF_EACH_SEED)}
    same = {other for key in known for other in CONTENTS[key][1]}
    settings = {name: value for name, value in settings.items() if name not in map(flag, same)}
    settings = {name: value for name, value in settings.items() if (name, to_json(value)) not in DEFAULTS}
    settings["--device"] = str(settings.get("--device")).partition(":")[0]
    return to_json([sorted(settings.items()), run.settings.get("class_names"), len(run.results["accuracy_matrix"])])


def _names(groups: Sequence[Group]) -> list[str]:
    """The method; before it the benchmark where there are several; behind it what tells groups of one name apart.

    Where some were measured on test images and others not, each says on which.
    """
    several = len({group.runs[0].results["benchmark"] for group in groups}) > 1
    names = [_method(group, several) for group in groups]
    kinds = [measured(group.runs[0].results) for group in groups]
    if len(set(kinds)) > 1:
        names = [f"{name} on {kind}" for name, kind in zip(names, kinds, strict=True)]
    for name in dict.fromkeys(names):
        alike = [index for index, other in enumerate(names) if other == name]
        if len(alike) > 1:
            for index, addition in zip(alike, _additions([groups[index] for index in alike]), strict=True):
                names[index] = f"{name}, {addition}"
    return names


def _method(group: Group, with_benchmark: bool) -> str:
    results = group.runs[0].results
    return f"{results['benchmark']}: {results['method']}" if with_benchmark else results["method"]


def _additions(groups: Sequence[Group]) -> list[str]:
    """One short text a group, all different: the settings in which they differ, if these are few, or where they lie."""
    typed = [each for each in differences(groups) if each[0].startswith("--") and not each[0].endswith("sha256")]
    differing = [(name.removeprefix("--"), values) for name, values in typed]
    few = differing if len(differing) <= MOST_IN_NAME else []
    by_settings = [", ".join(f"{name} {values[i]}" for name, values in few) for i in range(len(groups))]
    if len(set(by_settings)) == len(groups):
        return by_settings
    shared = os.path.commonpath([group.folder.absolute() for group in groups])
    return [str(group.folder.absolute().relative_to(shared)) for group in groups]


def _in_words(value: Any) -> str:
    """A setting as one reads it."""
    if value is None or value == []:
        return "left out"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
