"""LoRA beside a protected subspace: what Janus-LoRA and LoRA-GPM share.

At the end of task t, for every layer, from its inputs as their estimator has seen them:
    V' <- commit(energy_start + (energy_end - energy_start) t / T)
    W <- W + s B A;  fresh factors;  V <- V' is protected in the next task
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from janus_ext.methods.base import Task, TaskReport
from janus_ext.methods.lora import SequentialLoRA
from janus_ext.named_tensors import load_states, states

if TYPE_CHECKING:
    from janus_ext.classifier import ContinualClassifier
    from janus_ext.config import TrainConfig


class ProtectedLoRA(SequentialLoRA):
    """Keeps one estimator and one growing basis per input; how the inputs are observed is up to the method.

    Layers that get the same input are protected by the same basis.
    """

    like = "lora-gpm"

    def __init__(self, model: ContinualClassifier, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.estimators = {} if config.estimator == "none" else self.make_estimators()

    def close_task(self, task: Task) -> TaskReport:
        bases = self._commit(energy(self.config, task))
        report = super().close_task(task)
        for name, basis in bases.items():
            self.layers[name].protect(basis)
            report.basis_rank[name] = basis.shape[1]
        return report

    @property
    def remembers(self) -> bool:
        return bool(self.estimators)

    def observe(self, task: Task) -> None:
        if not self.estimators:
            super().observe(task)
        self.watch(task, self.estimators)
        for name, basis in self._commit(energy(self.config, task)).items():
            self.layers[name].protect(basis)

    def _commit(self, share: float) -> dict[str, Tensor]:
        """The layers' bases of the next task; where statistics are bad, none is changed and nothing is merged."""
        rooms = {name: self.layers[name].in_features - self.layers[name].rank for name in self.estimators}
        bases = {name: estimator.extended(share, rooms[name]) for name, estimator in self.estimators.items()}
        bases = {name: self.estimators[name].adopt(basis) for name, basis in bases.items()}
        return {name: bases[source] for name, source in self.layers.inputs.items() if source in bases}

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | states("estimators", self.estimators)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        load_states("estimators", self.estimators, state)


def energy(config: TrainConfig, task: Task) -> float:
    """Share of the input energy to protect after ``task``: the schedule of GPM and InfLoRA.

    After more tasks than were planned it stays what it was to be after the last of them.
    """
    passed = min(task.index, task.total - 1) / task.total
    return config.energy_start + (config.energy_end - config.energy_start) * passed
