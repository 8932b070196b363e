"""``janus_ext.train``'s command line: the parts of its configuration as groups of flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro

from janus_ext.config.parts import (
    DataConfig,
    MachineConfig,
    MethodConfig,
    ModelConfig,
    OptimizationConfig,
    RunConfig,
)
from janus_ext.config.train import TrainConfig

ABOUT = """Trains one vision transformer on the tasks of a benchmark, one task after another.

For example: janus_ext.train --benchmark folder --data-dir photos --backbone emoji --epochs 5 --output runs/photos
"""


@dataclass(frozen=True)
class Groups:
    """The groups of flags, in the order of the help."""

    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    run: RunConfig = field(default_factory=RunConfig)


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that ``argv`` (the process's arguments, without its name) asks for; exits on wrong flags."""
    groups = tyro.cli(Groups, prog="janus_ext.train", description=ABOUT, args=argv, config=(tyro.conf.OmitArgPrefixes,))
    return TrainConfig(**{name: value for part in vars(groups).values() for name, value in vars(part).items()})
