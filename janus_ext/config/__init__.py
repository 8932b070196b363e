"""Everything a learner and a run can be told: parts, the two configurations made of them, presets and checks."""

from janus_ext.config.learn import LearnConfig
from janus_ext.config.parts import (
    BenchmarkName,
    DataConfig,
    Domain,
    HeadName,
    MachineConfig,
    MethodConfig,
    MethodName,
    ModelConfig,
    OptimizationConfig,
    RunConfig,
    Settings,
    flag,
)
from janus_ext.config.train import TrainConfig

__all__ = [
    "BenchmarkName",
    "DataConfig",
    "Domain",
    "HeadName",
    "LearnConfig",
    "MachineConfig",
    "MethodConfig",
    "MethodName",
    "ModelConfig",
    "OptimizationConfig",
    "RunConfig",
    "Settings",
    "TrainConfig",
    "flag",
]
