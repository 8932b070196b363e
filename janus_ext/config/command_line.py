"""``janus_ext.train``'s command line: the parts of its configuration as groups of flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass

import tyro

from janus_ext import plugins
from janus_ext.config.foreign import Declared, find_method
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
    wanted = _groups(_method(argv))
    groups = tyro.cli(wanted, prog="janus_ext.train", description=ABOUT, args=argv, config=(tyro.conf.OmitArgPrefixes,))
    parts = dict(vars(groups))
    own = parts.pop("own", None)
    said = {name: value for part in parts.values() for name, value in vars(part).items()}
    for name in ("benchmark", "head"):
        plugins.typed(said[name])
    return TrainConfig(**said, own=own and vars(own))


def _method(argv: Sequence[str] | None) -> type[Declared] | None:
    """The class of --method where it is from elsewhere: its own flags are part of the help and of the parser."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", nargs="?")
    name = parser.parse_known_args(argv)[0].method
    return None if name is None else find_method(plugins.typed(name))


def _groups(method: type[Declared] | None) -> type[Groups]:
    """All groups, with one for what only ``method`` has."""
    if method is None or method.Own is None:
        return Groups
    own = ("own", method.Own, field(default_factory=method.Own))
    return make_dataclass("Groups", [own], bases=(Groups,), frozen=True)
