"""What is known of the classes learned so far, and kept in place of their images."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from janus_ext.errors import ArgumentError
from janus_ext.heads.expansion import Expansion
from janus_ext.heads.statistics import FeatureStatistics
from janus_ext.margin import ClassPrototypes
from janus_ext.named_tensors import below, prefixed


class Knowledge:
    """Linear heads, prototypes and statistics of all classes: what heads are fitted to.

    Attributes:
        heads: the model's linear heads, one a task.
        prototypes: unit mean features.
        statistics: of the features.
        expanded: of `Expansion` of the features, None without a width.
        expansion: of ``width`` random features, made once, of the first task; None before, and without a width.
        head: the one that works on expanded features, where there is a width.
        untrained: the tasks whose linear head was never trained, because a fitted one stood in its place, or because
            a task has one class.
        seed: of what a head draws.
    """

    def __init__(
        self, heads: nn.ModuleList, dim: int, device: torch.device, width: int | None = None, head: str = "lda"
    ) -> None:
        self.heads = heads
        self.head = head
        self.prototypes = ClassPrototypes(dim, device)
        self.statistics = FeatureStatistics(dim, device)
        self.expanded = FeatureStatistics(dim + width, device) if width else None
        self.expansion: Expansion | None = None
        self.untrained: list[int] = []
        self.seed = 0

    @property
    def sizes(self) -> list[int]:
        """Number of classes of each task."""
        return [head.out_features for head in self.heads]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return sum(self.sizes)

    @property
    def has_means(self) -> bool:
        """Whether there are means of classes of every task: images of them were seen."""
        ends = list(itertools.accumulate(self.sizes))
        return {bisect.bisect_right(ends, c) for c in self.prototypes.classes} == set(range(len(ends)))

    @property
    def has_statistics(self) -> bool:
        """Whether the statistics have seen all of these classes, too: not so of runs before there were statistics."""
        kept = [s.seen.nonzero().flatten().tolist() for s in (self.statistics, self.expanded) if s is not None]
        return self.has_means and all(seen == sorted(self.prototypes.classes) for seen in kept)

    def require(self, head: str) -> None:
        """ArgumentError unless ``head`` can be fitted to what is known."""
        if head in ("linear", "aligned"):
            self.require_trained(head)
        if head == "ncm":
            self.require_means(head)
        elif head != "linear":
            self.require_statistics(head)

    def require_trained(self, head: str) -> None:
        """ArgumentError unless all linear heads were trained; ``aligned`` begins at those of one class as they are."""
        untrained = [t for t in self.untrained if head != "aligned" or self.sizes[t] > 1]
        if untrained:
            raise ArgumentError(
                f"head {head!r} needs linear heads, and those of {len(untrained)} of {len(self.sizes)} tasks were "
                "never trained: of one class, or of a backbone that did not learn, with a fitted head in their place"
            )

    def require_means(self, head: str) -> None:
        """ArgumentError unless there are means."""
        if not self.has_means:
            raise ArgumentError(
                f"head {head!r} needs images of all classes, and some were learned without: "
                "ContinualLearner.observe(images, labelled=True) shows them; or take head 'linear'"
            )

    def require_statistics(self, head: str) -> None:
        """ArgumentError unless there are statistics."""
        self.require_means(head)
        if not self.has_statistics:
            raise ArgumentError(
                f"head {head!r} needs statistics of all classes, and some were learned by a version of this program "
                "that kept none: take head 'linear' or 'ncm'"
            )

    def seen_by(self, head: str) -> tuple[FeatureStatistics, Expansion | None]:
        """The statistics that ``head`` is fitted to, and what they are of, unless it is the features themselves."""
        if self.expanded is None or head != self.head:
            return self.statistics, None
        return self.expanded, self.expansion

    def ages(self) -> Tensor:
        """0.9 + 0.1 (t + 1) / T, float64 [C]: by how much classifier alignment scales the means of task t of T."""
        shares = [0.9 + 0.1 * (t + 1) / len(self.sizes) for t in range(len(self.sizes))]
        return torch.tensor(shares, dtype=torch.float64).repeat_interleave(torch.tensor(self.sizes))

    def add(self, features: Tensor, labels: Tensor, seed: int, trained: bool = True) -> None:
        """Takes up the features [n, d] of new classes; ``trained``: whether the newest linear head was."""
        self.seed = seed
        if not trained:
            self.untrained.append(len(self.heads) - 1)
        self.prototypes.add(features, labels)
        self.statistics.observe(features, labels)
        if self.expanded is not None:
            if self.expansion is None:
                self.expansion = Expansion.of(self.statistics, self.expanded.dim - self.statistics.dim, seed)
            self.expanded.observe(self.expansion(features), labels)
        for statistics in (self.statistics, self.expanded):
            if statistics is not None:
                statistics.reserve(self.classes)  # the last classes may have no images

    def spread(self, features: Tensor, labels: Tensor) -> Tensor:
        """Covariance [d, d] within the classes known and those of further features [n, d], shrunk as `lda` does it."""
        statistics = FeatureStatistics(self.statistics.dim, self.statistics.gram.device)
        statistics.merge(self.statistics)
        statistics.observe(features, labels)
        return statistics.spread()

    def move(self, matrix: Tensor) -> None:
        """Replaces every feature f of old classes by f R, R [d, d]."""
        self.prototypes.transform(matrix)
        self.statistics.transform(matrix)

    def state_dict(self) -> dict[str, Tensor]:
        """Named tensors of all but the linear heads, which are the model's."""
        state = prefixed("prototypes", self.prototypes.state_dict())
        state |= prefixed("statistics", self.statistics.state_dict()) | {"head_seed": torch.tensor(self.seed)}
        state["untrained"] = torch.tensor(self.untrained, dtype=torch.int64)
        if self.expanded is not None and self.expansion is not None:
            state |= prefixed("expanded", self.expanded.state_dict())
            state |= prefixed("expansion", self.expansion._asdict())
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` gave; of runs before there were statistics, what they have."""
        if self.expanded is not None and "projection" in state:
            raise ArgumentError(
                "--head-width: an earlier version made this, with other random features; name a --head, or train again"
            )
        self.prototypes.load_state_dict(below("prototypes", state))
        for name, statistics in (("statistics", self.statistics), ("expanded", self.expanded)):
            if statistics is not None:
                empty = FeatureStatistics(statistics.dim, statistics.gram.device).state_dict()
                statistics.load_state_dict(below(name, state) or empty)
        self.seed = int(state.get("head_seed", 0))
        self.untrained = state["untrained"].tolist() if "untrained" in state else []
        self.expansion = None
        if self.expanded is not None and self.expanded.rows:
            self.expansion = Expansion.loaded(below("expansion", state), self.statistics, self.expanded.dim)
