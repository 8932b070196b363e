"""The model of all methods: how its heads start."""

import pytest
import torch
from conftest import make_trainer

from janus_ext.backbone import load_backbone
from janus_ext.classifier import ContinualClassifier
from janus_ext.errors import ArgumentError


def test_a_head_starts_small_or_as_pytorchs_own(weights):
    model = ContinualClassifier(load_backbone("emoji", str(weights)))
    small, default = model.add_task(2000, "small"), model.add_task(2000, "default")
    assert not small.bias.any() and float(small.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    bound = model.feature_dim**-0.5
    for values in (default.weight.detach(), default.bias.detach()):
        assert float(values.abs().max()) == pytest.approx(bound, rel=0.02)
        assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    with pytest.raises(ArgumentError, match="head_init must be 'default' or 'small', got 'large'"):
        model.add_task(2, "large")


@pytest.mark.parametrize("head_init", ["small", "default"])
def test_the_setting_reaches_the_head(benchmark, weights, tmp_path, head_init):
    trainer = make_trainer(benchmark, weights, tmp_path / "run", head_init=head_init)
    trainer.method.begin_task(trainer._task(0))
    assert bool(trainer.model.heads[0].bias.any()) == (head_init == "default")


def test_what_a_head_draws_does_not_depend_on_the_setting_before_it(weights):
    """A default run has the same bits as before the setting came."""
    model = ContinualClassifier(load_backbone("emoji", str(weights)))
    torch.manual_seed(3)
    head = model.add_task(5)
    torch.manual_seed(3)
    torch.nn.Linear(model.feature_dim, 5)
    assert torch.equal(head.weight, torch.nn.init.normal_(torch.empty(5, model.feature_dim), std=0.01))
