"""What a learner has been through, beside its tensors: its classes, what each task added, and where it comes from."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from janus_ext.data.images import CROP_MODES, INTERPOLATIONS, View
from janus_ext.errors import ArgumentError, CheckpointError, warn

if TYPE_CHECKING:
    from janus_ext.config import LearnConfig
    from janus_ext.methods.base import Method
    from janus_ext.runs.run import Run, Saved

LOG = logging.getLogger("janus_ext")
WHOLE = ("emoji", "cifar100")  # benchmarks whose images are shown whole; of runs that have not stored it
MOST_MARGIN = 8


@dataclass
class Past:
    """Where a learner stands.

    Attributes:
        tasks: the names of the classes of each task.
        factors: what each task has added to the weights, on the CPU, without the bases.
        benchmark: of the run that it comes from.
        preset: of that run, which says whether another head brings its guard along.
        view: of its images, but for their size.
        own_backbone: whether the network was handed over as a model, and has no name.
        unprotected: whether there are old classes of which nothing is protected.
        results: of the run that it comes from, while no task has followed.
        learned_from: the folders of class folders that tasks were learned from.
    """

    tasks: list[tuple[str, ...]] = field(default_factory=list)
    factors: list[dict[str, Tensor]] = field(default_factory=list)
    benchmark: str | None = None
    preset: str | None = None
    view: View = View()
    own_backbone: bool = False
    unprotected: bool = False
    results: dict[str, Any] | None = None
    learned_from: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, run: Run, settings: Mapping[str, Any], saved: Saved, config: LearnConfig) -> Past:
        """What a run or saved learner has left in its folder, with ``config``'s head from now on; says if not done."""
        benchmark, done, planned = settings["benchmark"], len(saved.tasks), settings["tasks"]
        if benchmark is not None and done < planned:
            known, all_of_them = sum(map(len, saved.tasks)), len(settings["class_names"])
            LOG.warning(
                "%s has finished %d of %d tasks and knows %d of %d classes; --resume goes on with it",
                *(run.folder, done, planned, known, all_of_them),
            )
        return cls(
            tasks=list(saved.tasks),
            factors=[_without_bases(run.factors(task)) for task in range(len(saved.tasks))],
            benchmark=benchmark,
            preset=settings.get("preset"),
            view=_view(settings),
            own_backbone=settings.get("own_backbone", False),
            unprotected=settings.get("unprotected", False),
            results=_measured_by(config, json.loads(saved.about.get("results", "null")), settings),
            learned_from=_learned_from(settings),
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of all classes, in the order of the model's outputs."""
        return tuple(name for task in self.tasks for name in task)

    def check_new(self, names: Sequence[str], config: LearnConfig) -> None:
        """ArgumentError unless a task of these classes can be learned; a warning where it teaches the head alone."""
        config.require_incremental()
        known = [name for name in names if name in self.classes]
        if known:
            some = ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
            raise ArgumentError(f"classes must be new, got {some}, which the learner knows already")
        if len(names) == 1 and config.head == "linear":
            raise ArgumentError(
                f"a task needs two classes at least, got {names[0]} alone, from which linear heads learn nothing; "
                "wait for another, or take another head, such as lda"
            )
        if len(names) == 1 and config.lets_learn(len(self.tasks)):
            warn(f"a task of one class teaches the head alone, here {config.head}: the backbone learns nothing from it")

    def warn_of_unprotected(self, method: Method) -> None:
        """A warning to who lets ``method`` learn, where nothing protects old classes."""
        if self.unprotected:
            none = f"method {method.config.method} protects nothing"
            cure = "ContinualLearner.observe() takes images of that kind, without labels" if method.remembers else none
            warn(f"nothing of what the model knew is protected: {cure}")

    def check_met(self, known: Sequence[int], shown: Sequence[int]) -> None:
        """ArgumentError unless images are ``shown`` of exactly those classes that no image was ``known`` of."""
        missing = set(range(len(self.classes))) - set(known)
        for found, what in ((set(shown) & set(known), "was learned from images"), (missing - set(shown), "has none")):
            if found:
                raise ArgumentError(
                    f"labelled images must be of all classes that were learned without any, {len(missing)} here, and "
                    f"of no others: {self.classes[min(found)]} {what}"
                )

    def add(self, names: tuple[str, ...], factors: Mapping[str, Tensor], images: Any = None) -> None:
        """A task was learned from ``images``; results of a run were measured without it."""
        kept = _without_bases(factors)  # an interrupt in it leaves what was
        if isinstance(images, (str, os.PathLike)) and os.path.abspath(images) not in self.learned_from:
            self.learned_from.append(os.path.abspath(images))
        self.tasks.append(names)
        self.factors.append(kept)
        self.results = None

    def to_json(self) -> dict[str, Any]:
        """What of it ``config.json`` holds; the tasks are in the metadata of the model."""
        return {
            "benchmark": self.benchmark,
            "preset": self.preset,
            "class_names": list(self.classes),
            "view_margin": self.view.margin,
            "view_interpolation": self.view.interpolation,
            "view_crop_mode": self.view.crop_mode,
            "own_backbone": self.own_backbone,
            "unprotected": self.unprotected,
            "learned_from": self.learned_from,
        }


def _view(settings: Mapping[str, Any]) -> View:
    """What ``config.json`` holds of it."""
    margin = settings.get("view_margin", 1.0 if settings["benchmark"] in WHOLE else View().margin)
    if not isinstance(margin, (int, float)) or not 0 < margin <= MOST_MARGIN:
        raise CheckpointError(f"view_margin in config.json must lie between 0 and {MOST_MARGIN}, got {margin!r:.40}")
    named = {}
    for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        named[name] = settings.get(f"view_{name}", getattr(View(), name))
        if named[name] not in known:
            raise CheckpointError(f"view_{name} in config.json must be one of {', '.join(known)}")
    return View(margin=margin, **named)


def _learned_from(settings: Mapping[str, Any]) -> list[str]:
    """What ``config.json`` holds of it; of a run of ``janus_ext.train`` that is its own folder of images."""
    own, later = settings.get("data_dir"), settings.get("learned_from", [])
    if not isinstance(later, list) or not all(isinstance(folder, str) for folder in [own or "", *later]):
        raise CheckpointError("data_dir and learned_from in config.json must name folders")
    return [own, *later] if own else later


def _without_bases(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; bases, the largest part by far, are not needed behind their task."""
    return {name: tensor.detach().cpu().clone() for name, tensor in factors.items() if not name.endswith(".basis")}


def _measured_by(
    config: LearnConfig, results: dict[str, Any] | None, settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """``results`` of a run as the head of ``config`` has them; None where nobody measured that."""
    if results is None:
        return None
    if config.head == settings["head"]:
        return results if config.head_width == settings.get("head_width") else None
    measured = results.get("heads", {}).get(config.head)
    return None if measured is None else results | measured
