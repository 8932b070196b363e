"""`--checkpointing`: blocks are computed again in the backward pass, and neither bits nor statistics change.

docs/method.md, property 5.
"""

import pytest
import torch
from conftest import make_trainer, weights_of, without_time
from torch import nn

from janus_ext import ArgumentError
from janus_ext.backbone.network import recompute_blocks
from janus_ext.config import TrainConfig
from janus_ext.methods.janus import Janus

CASES = {
    "janus": {},
    "janus, in the backward": {"rectify": "tangent"},
    "janus, isvd": {"estimator": "isvd", "estimator_rank": 12},
    "janus, all targets": {"targets": ("q", "k", "v", "proj", "fc1", "fc2")},
    "inflora": {"method": "inflora"},
    "bilora": {"method": "bilora", "frequencies": 20},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_has_the_same_bits(patterns, weights, tmp_path, monkeypatch, case):
    rows, found = [], []
    close = Janus.close_task

    def looking(self, task):
        rows.append([e.rows for e in self.estimators.values()])
        return close(self, task)

    monkeypatch.setattr(Janus, "close_task", looking)
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        trainer = make_trainer(patterns, weights, folder, checkpointing=checkpointing, epochs=2, **CASES[case])
        assert trainer.learner.model.backbone.grad_checkpointing is checkpointing
        found.append((without_time(trainer.run()), weights_of(trainer)))
    (one, plain), (other, recomputed) = found
    assert one == other
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :] and (rows == [] or min(map(min, rows)) > 0)


def test_less_is_kept_between_forward_and_backward(patterns, weights, tmp_path):
    """What autograd saves outside of checkpoints: of a block its input alone."""
    kept = []
    for checkpointing in (False, True):
        trainer = make_trainer(patterns, weights, tmp_path / "run", checkpointing=checkpointing)
        trainer.learner.model.train()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            trainer.learner.model.features(patterns.train.images[:8])
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 3


class WithoutCheckpointing(nn.Module):
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, "not supported"


@pytest.mark.parametrize("model", [WithoutCheckpointing(), nn.Identity()])
def test_a_network_that_cannot_is_named(model):
    with pytest.raises(ArgumentError, match=f"--checkpointing: timm's {type(model).__name__} knows none"):
        recompute_blocks(model)


def test_it_is_no_part_of_a_graph():
    with pytest.raises(ArgumentError, match="--compile makes no graph of blocks that are computed again"):
        TrainConfig(checkpointing=True, compile=True).resolved()
