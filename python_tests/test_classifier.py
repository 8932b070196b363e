"""The model of all methods: how its heads start, and what a pass over images takes."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_trainer, task_of

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
def test_the_setting_reaches_the_head(patterns, weights, tmp_path, head_init):
    trainer = make_trainer(patterns, weights, tmp_path / "run", head_init=head_init)
    trainer.learner.method.begin_task(task_of(trainer, 0))
    assert bool(trainer.learner.model.heads[0].bias.any()) == (head_init == "default")


def test_what_a_head_draws_does_not_depend_on_the_setting_before_it(weights):
    """A default run has the same bits as before the setting came."""
    model = ContinualClassifier(load_backbone("emoji", str(weights)))
    torch.manual_seed(3)
    head = model.add_task(5)
    torch.manual_seed(3)
    torch.nn.Linear(model.feature_dim, 5)
    assert torch.equal(head.weight, torch.nn.init.normal_(torch.empty(5, model.feature_dim), std=0.01))


class Backbone(torch.nn.Linear):
    """What the classifier asks a backbone, of any size."""

    input_mean, input_std = (0.5,) * 3, (0.5,) * 3

    def __init__(self, size: int, width: int, patch: int | None) -> None:
        super().__init__(1, 1)
        self.input_size, self.num_features, self.fused_attn = size, width, True
        if patch:
            self.embed_dim, self.patch_embed = width, SimpleNamespace(num_patches=(size // patch) ** 2)


@pytest.mark.parametrize(
    ("backbone", "images"),
    [
        ((224, 768, 16), 200),  # ViT-B/16
        ((64, 192, 8), 200),  # the embedded one
        ((518, 384, 14), 57),  # DINOv2
        ((518, 768, 14), 28),
        ((224, 1024, 16), 150),
        ((4096, 1536, 4), 1),
        ((32, 64, None), 200),  # no patches to ask
        ((512, 768, None), 38),
    ],
)
def test_a_pass_takes_fewer_images_the_larger_they_are_to_the_model(backbone, images):
    assert ContinualClassifier(Backbone(*backbone)).images_at_once == images


@pytest.mark.parametrize(("size", "plain"), [(64, True), (224, True), (256, True), (384, False), (518, False)])
def test_attention_is_taken_apart_only_for_few_tokens(size, plain):
    backbone = Backbone(size, 768, 16)
    ContinualClassifier(backbone, amp=torch.bfloat16)
    assert backbone.fused_attn != plain


def test_evaluation_follows_the_model(patterns, weights, tmp_path, monkeypatch):
    trainer = make_trainer(patterns, weights, tmp_path / "run", epochs=1)
    want = trainer.run()["accuracy_matrix"]
    trainer.learner.model.images_at_once = 3
    sizes = [len(images) for images, _ in trainer.learner.clean_batches(trainer.test_images[0])]
    assert sizes == [3, 3, 2] and trainer._evaluate(2)["lda"][0] == want[-1]
