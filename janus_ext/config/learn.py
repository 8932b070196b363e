"""What a learner can be told, whatever images it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from janus_ext.config import checks, presets
from janus_ext.config.foreign import OURS, find_head, find_method, own_settings
from janus_ext.config.parts import TRAINED_HEADS, MachineConfig, MethodConfig, ModelConfig, OptimizationConfig
from janus_ext.errors import ArgumentError

T = TypeVar("T", bound="LearnConfig")
# What a run reads only where the backbone learns, and where anything is trained in steps.
OF_BACKBONE = (
    *("targets", "rank", "lr", "scale", "gpm", "rectify", "damping", "share", "balance", "estimator"),
    *("estimator_rank", "energy_start", "energy_end", "energy_power", "margin_weight", "margin", "temperature"),
)
OF_MARGIN = ("margin_weight", "margin", "temperature")
OF_STEPS = (
    *("epochs", "batch_size", "head_lr", "head_init", "optimizer", "schedule", "milestones", "clip_norm"),
    "accumulate",
)


@dataclass(frozen=True)
class LearnConfig(MachineConfig, OptimizationConfig, ModelConfig, MethodConfig):
    """Method, network, optimisation and machine of a learner; see the parts for the fields."""

    own: Mapping | None = None
    """Settings that only this method has, by name, as JSON has them; None where it has none."""

    def resolved(self: T) -> T:
        """The checked configuration, with the values of ``--benchmark folder`` for what was not said.

        Of the embedded backbone these are the ones of ``--benchmark emoji``.
        """
        return self._filled("default", "folder")

    def _filled(self: T, preset: str, benchmark: str) -> T:
        """The checked configuration with the preset's values for what was not said; ArgumentError names the flag."""
        method = find_method(self.method)
        like, declared = (self.method, {}) if method is None else (method.like, method.defaults)
        defaults = presets.values(preset, benchmark, like, declared, self.backbone, self.head)
        if self.schedule not in ("auto", "step"):  # the user's schedule leaves the preset's milestones
            defaults.pop("milestones", None)
        unsaid = {n: v for n, v in defaults.items() if hasattr(self, n) and getattr(self, n) in (None, "auto")}
        config = replace(self, **unsaid, own=own_settings(self.method, method, self.own))
        find_head(config.head)
        checks.check_learning(config)
        checks.check_effect(self, config.without_effect(), defaults)
        return config

    def lets_learn(self, task: int) -> bool:
        """Whether ``--learn`` lets the backbone learn in a task, counted from 0."""
        return self.learn == "all" or (self.learn == "first" and task == 0)

    def require_incremental(self) -> None:
        """ArgumentError where the method is joint training, or like it."""
        found = find_method(self.method)
        if "joint" in (self.method, found and found.like):
            raise ArgumentError("method joint learns all classes at once, and a learner one set after another")

    def without_effect(self) -> dict[str, str]:
        """The fields that a run of this resolved configuration does not read, each with what it would take."""
        other = self.method not in OURS  # which may read whatever its limits take
        rectified = (self.rectify in ("tangent", "exact"), "--rectify tangent or exact")
        remembering = (self.estimator != "none", "a method that remembers old inputs, and an --estimator")
        learning = (self.learn != "none", "a backbone that learns: --learn all or first")
        several = self.learn == "all" and self.method != "joint" and getattr(self, "tasks", None) != 1
        later = (several, "a backbone that learns in several tasks: --learn all, --tasks above 1, no --method joint")
        training = (learning[0] or self.head in TRAINED_HEADS, f"--head {' or '.join(TRAINED_HEADS)}, or {learning[1]}")
        pushing = (self.margin_weight > 0, "--method janus or lora-drs, and a --margin-weight above 0")
        sharp = other or self.method == "janus"
        needs = {
            "rank": (self.method != "bilora", "LoRA factors, and --method bilora has --frequencies"),
            "frequencies": (other or self.method == "bilora", "--method bilora"),
            "gpm": (other or self.method == "inflora", "--method inflora"),
            "energy_start": remembering,
            "energy_end": remembering,
            "energy_power": remembering,
            "damping": rectified,
            "share": rectified,
            "balance": rectified,
            "margin": pushing,
            "temperature": (pushing[0] and sharp, "--method janus, and a --margin-weight above 0"),
            "merge_scale": learning,
            "drift_budget": learning,
            "drift": later,
            "milestones": (max(self.milestones or (0,)) < self.epochs, f"epochs below --epochs {self.epochs}"),
        }
        unread = dict.fromkeys(OF_MARGIN, later) if self.method == "janus" and not several else {}  # no old prototypes
        unread |= dict.fromkeys(OF_BACKBONE, learning) if not learning[0] else {}
        unread |= dict.fromkeys(OF_STEPS, training) if not training[0] else {}
        return {name: wanted for name, (is_read, wanted) in (needs | unread).items() if not is_read}
