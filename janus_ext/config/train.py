"""What a training run can be told: a learner's configuration, the data's and the run's own."""

from __future__ import annotations

from dataclasses import dataclass

from janus_ext.config import checks, presets
from janus_ext.config.learn import LearnConfig
from janus_ext.config.parts import DataConfig, RunConfig


@dataclass(frozen=True)
class TrainConfig(RunConfig, LearnConfig, DataConfig):
    """Trains one vision transformer on the tasks of a benchmark, one task after another."""

    def resolved(self) -> TrainConfig:
        """The checked configuration with the preset's values for what was not said; ArgumentError names the flag."""
        config = self._with(presets.values(self.preset, self.benchmark, self.method, self.backbone, self.head))
        checks.check_data(config)
        return config
