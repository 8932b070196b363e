"""--amp fp16: a step whose gradients are not finite is left out whole, and rectification does not mind."""

import copy
from typing import Any

import pytest
import torch
from conftest import assert_protected_inputs_are_left_alone, make_trainer
from torch import Tensor

from janus_ext.errors import TrainingError
from janus_ext.methods.base import Step
from janus_ext.training.loop import Learner


class Overflowing(Learner):
    """Some steps have an infinite gradient in the first layer: they change neither weights nor the optimizer."""

    bad = frozenset({1, 2, 9, 16})
    factor = "B"
    taken = 0

    def _step(self, images: Tensor, targets: Tensor, size: int, optimizer: Any, scaler: Any) -> Step:
        self.taken += 1
        if self.taken not in self.bad:
            return super()._step(images, targets, size, optimizer, scaler)
        factor = getattr(self.method.layers["blocks.0.attn.qkv"], self.factor)
        hook = factor.register_hook(lambda grad: torch.full_like(grad, float("inf")))
        weights, state, scale = (
            copy.deepcopy(self.model.state_dict()),
            copy.deepcopy(tensors(optimizer)),
            scaler.get_scale(),
        )
        step = super()._step(images, targets, size, optimizer, scaler)
        hook.remove()
        assert all(torch.equal(value, weights[key]) for key, value in self.model.state_dict().items())
        for key, value in tensors(optimizer).items():
            assert torch.equal(value, state.get(key, torch.zeros_like(value))), key
        assert scaler.get_scale() == scale / 2
        return step


def tensors(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """The optimizer's state by parameter and name."""
    states = optimizer.state_dict()["state"].items()
    return {(i, name): value for i, state in states for name, value in state.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("mode", ["project", "tangent", "exact"])
def test_a_step_with_an_infinite_gradient_is_left_out(patterns, weights, tmp_path, mode, factor, optimizer):
    changes = {"rectify": mode, "optimizer": optimizer, "amp": "fp16", "clip_norm": 1.0}
    trainer = make_trainer(patterns, weights, tmp_path / "run", Overflowing, **changes)
    trainer.learner.factor = factor
    trainer.run()
    assert trainer.learner.taken == 18
    assert all(torch.isfinite(value).all() for value in trainer.learner.model.state_dict().values())
    if mode == "exact":
        assert_protected_inputs_are_left_alone(trainer, tasks=3)


def test_gradients_that_never_fit_end_the_run(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", Overflowing, amp="fp16", epochs=9)
    trainer.learner.bad = frozenset(range(1, 18))
    with pytest.raises(TrainingError, match="float16 does not hold the gradients of task 1, epoch 9.*--amp bf16"):
        trainer.run()


def test_float16_learns_what_float32_learns(patterns, weights, tmp_path):
    accuracies = []
    for amp in ("off", "fp16"):
        trainer = make_trainer(patterns, weights, tmp_path / amp, amp=amp, epochs=8)
        accuracies.append(trainer.run()["plasticity"])
    assert accuracies[1] >= accuracies[0] - 10
