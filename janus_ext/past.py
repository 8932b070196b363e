"""What a learner has been through, beside its tensors: its classes, what each task added, and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from janus_ext.data.images import View
from janus_ext.runs.checkpoint import read_tensors

if TYPE_CHECKING:
    from janus_ext.runs.run import Run, Saved

WHOLE = ("emoji", "cifar100")  # benchmarks whose images are shown whole; of runs that have not stored it


@dataclass
class Past:
    """Where a learner stands.

    Attributes:
        tasks: the names of the classes of each task.
        kept: what each task has added to the weights, or the file that holds it.
        benchmark: of the run that it comes from.
        margin: how much larger than the model's square an image is made before its middle is taken.
        own_backbone: whether the network was handed over as a model, and has no name.
        unprotected: whether there are old classes of which nothing is protected.
        results: of the run that it comes from, while no task has followed.
    """

    tasks: list[tuple[str, ...]] = field(default_factory=list)
    kept: list[Mapping[str, Tensor] | Path] = field(default_factory=list)
    benchmark: str | None = None
    margin: float = View().margin
    own_backbone: bool = False
    unprotected: bool = False
    results: dict[str, Any] | None = None

    @classmethod
    def of(cls, run: Run, settings: Mapping[str, Any], saved: Saved) -> Past:
        """What a run or a saved learner has left in its folder."""
        benchmark = settings["benchmark"]
        return cls(
            tasks=list(saved.tasks),
            kept=[run.factors_path(task) for task in range(len(saved.tasks))],
            benchmark=benchmark,
            margin=settings.get("view_margin", 1.0 if benchmark in WHOLE else View().margin),
            own_backbone=settings.get("own_backbone", False),
            unprotected=settings.get("unprotected", False),
            results=json.loads(saved.about.get("results", "null")),
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of all classes, in the order of the model's outputs."""
        return tuple(name for task in self.tasks for name in task)

    def add(self, names: tuple[str, ...], factors: Mapping[str, Tensor]) -> None:
        """A task was learned; results of a run were measured without it."""
        self.tasks.append(names)
        self.kept.append(factors)
        self.results = None

    def factors(self, task: int) -> Mapping[str, Tensor]:
        """What a task has added to the weights, read where it lies in a file."""
        kept = self.kept[task]
        return read_tensors(kept)[0] if isinstance(kept, Path) else kept

    def to_json(self) -> dict[str, Any]:
        """What of it ``config.json`` holds; the tasks are in the metadata of the model."""
        return {
            "benchmark": self.benchmark,
            "class_names": list(self.classes),
            "view_margin": self.margin,
            "own_backbone": self.own_backbone,
            "unprotected": self.unprotected,
        }
