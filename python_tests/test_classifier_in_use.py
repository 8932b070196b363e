"""ContinualLearner.from_classifier: a deployed model keeps its answers, and what was observed moves less."""

from pathlib import Path

import pytest
import torch
from learners import FIRST, SECOND, SETTINGS, assert_same, squares, state_of
from torch import Tensor, nn

from janus_ext import ContinualLearner
from janus_ext.backbone import prepare_torchvision
from janus_ext.errors import ArgumentError


@pytest.fixture
def deployed(photos) -> nn.Module:
    """timm's smallest vision transformer with a classifier for two classes of the photographs."""
    prepare_torchvision()
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
    pixels = torch.stack([torch.from_numpy(squares(32)(p)) for n in FIRST for p in sorted((photos / n).iterdir())])
    labels = torch.arange(2).repeat_interleave(5)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(30):
        loss = nn.functional.cross_entropy(model((pixels / 255 - mean) / std), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_a_classifier_in_use_keeps_its_answers_and_learns_more(deployed, photos, tmp_path):
    before = {name: tensor.clone() for name, tensor in deployed.state_dict().items()}
    settings = {k: v for k, v in SETTINGS.items()}
    learner = ContinualLearner.from_classifier(deployed, FIRST, **settings)
    old = [(path, name) for name in FIRST for path in sorted((photos / name).iterdir())]
    assert learner.evaluate(old).accuracy == 100, "what it knew"
    learner.observe([path for path, _ in old])
    assert all(layer.basis.shape[1] for layer in learner._core.method.layers.values())
    report = learner.learn(photos, SECOND)
    assert max(report.violation.values()) <= 1e-5
    assert learner.classes == tuple(FIRST + SECOND)
    known = learner.evaluate(old).per_task[0]
    assert known.accuracy_task_known == 100
    learner.save(tmp_path / "saved")
    assert_same(state_of(ContinualLearner.load(tmp_path / "saved")), state_of(learner))
    assert all(torch.equal(tensor, before[name]) for name, tensor in deployed.state_dict().items()), "it was copied"


def test_what_was_observed_moves_less(deployed, photos):
    """The logits of the old classes for old images, after other classes were learned."""
    old = [path for name in FIRST for path in sorted((photos / name).iterdir())]
    settings = SETTINGS | {"energy_start": 0.999, "energy_end": 0.999, "epochs": 6}
    moved = {}
    for observing in (True, False):
        learner = ContinualLearner.from_classifier(deployed, FIRST, **settings)
        before = logits_of(learner, old)
        if observing:
            learner.observe(old)
            learner.learn(photos, SECOND)
        else:
            with pytest.warns(UserWarning, match="nothing of what the model knew is protected"):
                learner.learn(photos, SECOND)
        moved[observing] = float((logits_of(learner, old)[:, :2] - before).norm())
    assert moved[True] < 0.5 * moved[False]


def logits_of(learner: ContinualLearner, paths: list[Path]) -> Tensor:
    images = torch.stack([torch.from_numpy(squares(learner.input_size)(path)) for path in paths])
    learner._core.model.eval()
    with torch.no_grad():
        return learner._core.model(images)


def test_classifiers_that_cannot_be_taken_are_named(deployed):
    with pytest.raises(ArgumentError, match="class_names must name the model's outputs"):
        ContinualLearner.from_classifier(deployed, ["one"], **SETTINGS)
    with pytest.raises(ArgumentError, match="needs the means of all classes"):
        ContinualLearner.from_classifier(deployed, FIRST, **SETTINGS, head="ncm")
    learner = ContinualLearner.from_classifier(deployed, FIRST, method="lora", device="cpu", epochs=1)
    with pytest.raises(ArgumentError, match="method lora remembers no inputs"):
        learner.observe(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
