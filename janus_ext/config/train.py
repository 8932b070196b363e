"""What a training run can be told: a learner's configuration, the data's and the run's own."""

from __future__ import annotations

from dataclasses import dataclass

from janus_ext import plugins
from janus_ext.config import checks, foreign
from janus_ext.config.learn import LearnConfig
from janus_ext.config.parts import DataConfig, RunConfig


@dataclass(frozen=True)
class TrainConfig(RunConfig, LearnConfig, DataConfig):
    """Trains one vision transformer on the tasks of a benchmark, one task after another."""

    def resolved(self) -> TrainConfig:
        """The checked configuration with the preset's values for what was not said; ArgumentError names the flag."""
        if self.benchmark not in foreign.BENCHMARK.ours:
            plugins.find(foreign.BENCHMARK, self.benchmark)
        config = self._filled(self.preset, self.benchmark)
        checks.check_data(config)
        return config
