"""ContinualLearner.from_classifier: a deployed model keeps its answers, and what was observed moves less."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_close
from learners import FIRST, SECOND, SETTINGS, assert_same, squares, state_of
from PIL import Image
from torch import Tensor, nn

from janus_ext import ContinualLearner, export
from janus_ext.backbone import prepare_torchvision
from janus_ext.data.images import View
from janus_ext.errors import ArgumentError, CheckpointError

SIZES = ((45, 80, 3), (90, 40, 3), (32, 32, 3), (57, 200, 3))


@pytest.fixture
def deployed(photos) -> nn.Module:
    """timm's smallest vision transformer with a classifier for two classes of the photographs."""
    prepare_torchvision()
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
    cfg = model.pretrained_cfg
    seen = squares(32, margin=1 / cfg["crop_pct"], interpolation=cfg["interpolation"])
    pixels = torch.stack([torch.from_numpy(seen(p)) for n in FIRST for p in sorted((photos / n).iterdir())])
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
    learner = ContinualLearner.from_classifier(deployed, FIRST, **SETTINGS)
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


@pytest.mark.parametrize(
    "shown",
    [
        {"crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"},
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"},
        {"crop_pct": 0.8, "crop_mode": "squash", "interpolation": "bilinear"},
        {"crop_pct": 1.15, "crop_mode": "center", "interpolation": "bilinear"},
    ],
    ids=lambda shown: f"{shown['crop_mode']} {shown['crop_pct']}",
)
def test_it_is_shown_what_its_own_transform_shows(tmp_path, shown):
    """timm's, on wide images and on high ones; and so does what is exported from it, by the description beside it."""
    timm = timm_with_transforms()
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32, pretrained_cfg_overlay=shown).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, size, "uint8")) for i, size in enumerate(SIZES)]
    learner = ContinualLearner.from_classifier(model, ["a", "b", "c"], **SETTINGS)
    said = [dict(answer) for answer in learner.predict(images)]
    learner.save(tmp_path / "saved")
    assert [dict(a) for a in ContinualLearner.load(tmp_path / "saved", backbone=model).predict(images)] == said
    export.main([str(tmp_path / "saved"), "--format", "timm", "--output", str(tmp_path / "plain")])
    plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    for network in (model, plain):
        said_of_it = timm.data.resolve_model_data_config(network) | {"input_size": (3, 32, 32)}
        transform = timm.data.create_transform(**said_of_it)
        with torch.no_grad():
            wanted = [network(transform(image)[None])[0].softmax(-1) for image in images]
        for found, want in zip(said, wanted, strict=True):
            assert_close(torch.tensor([found[name] for name in "abc"]), want, torch.float32, 30)


def test_how_it_is_shown_that_cannot_be_is_refused(deployed):
    deployed.pretrained_cfg = deployed.pretrained_cfg | {"crop_mode": "border"}
    with pytest.raises(ArgumentError, match="crop_mode center or squash, its pretrained_cfg has 'border'"):
        ContinualLearner.from_classifier(deployed, FIRST, **SETTINGS)
    with pytest.raises(ArgumentError, match="crop_mode center or squash"):
        ContinualLearner(deployed, **SETTINGS)
    deployed.pretrained_cfg |= {"crop_mode": "center", "interpolation": "random"}
    with pytest.raises(ArgumentError, match="interpolation bilinear or bicubic or nearest, .* has 'random'"):
        ContinualLearner.from_classifier(deployed, FIRST, **SETTINGS)


def test_sides_are_those_of_timm():
    timm = timm_with_transforms()
    known = {(c["input_size"][-1], c["crop_pct"]) for c in map(config_of, timm.list_models(pretrained=True)) if c}
    assert len(known) > 50
    for size, crop in known:
        view = View(size, margin=1 / crop)
        assert view.side == math.floor(size / crop) == math.floor(size / view.crop_pct), (size, crop)


def timm_with_transforms() -> Any:
    prepare_torchvision()
    import timm

    return timm


def config_of(name: str) -> dict[str, Any] | None:
    import timm

    found = timm.get_pretrained_cfg(name)
    return found and found.to_dict()


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
    learner = ContinualLearner.from_classifier(deployed, FIRST, method="lora", device="cpu", epochs=1)
    with pytest.raises(ArgumentError, match="method lora remembers no inputs"):
        learner.observe(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("head", ["ncm", "lda", "ridge", "aligned"])
def test_labelled_images_of_its_classes_make_every_head_possible(deployed, photos, head):
    learner = ContinualLearner.from_classifier(deployed, FIRST, **SETTINGS, head=head)
    for use in (lambda: learner.learn(photos, SECOND), lambda: learner.predict(photos)):
        warnings.simplefilter("ignore", UserWarning)  # of what is not protected
        with pytest.raises(ArgumentError, match=rf"head '{head}' needs images of all classes.*labelled=True"):
            use()
    assert learner.classes == tuple(FIRST)
    learner.observe(labelled_paths(photos, FIRST), labelled=True)
    learner.learn(photos, SECOND)
    assert learner.evaluate(labelled_paths(photos, [*FIRST, *SECOND])).accuracy >= 50
    assert sorted(learner._core.method.prototypes.classes) == [0, 1, 2, 3]
    with pytest.raises(ArgumentError, match=f"0 here, and of no others: {FIRST[0]} was learned from images"):
        learner.observe(labelled_paths(photos, FIRST), labelled=True)


def test_labelled_images_must_be_of_all_its_classes(deployed, photos):
    learner = ContinualLearner.from_classifier(deployed, FIRST, **SETTINGS)
    before = state_of(learner)
    with pytest.raises(ArgumentError, match=f"2 here, and of no others: {FIRST[1]} has none"):
        learner.observe(labelled_paths(photos, FIRST[:1]), labelled=True)
    assert_same(state_of(learner), before)


def labelled_paths(photos: Path, names: list[str]) -> list[tuple[Path, str]]:
    return [(path, name) for name in names for path in sorted((photos / name).iterdir())]


# models that are not as they seem -------------------------------------------------------------------------------------
def timms(**options) -> nn.Module:
    prepare_torchvision()
    import timm

    torch.manual_seed(1)
    return timm.create_model("test_vit", num_classes=2, img_size=32, **options)


@pytest.mark.parametrize("options", [{"num_heads": 4}, {"act_layer": "relu"}, {"global_pool": "avg", "fc_norm": False}])
def test_a_network_that_its_name_does_not_tell_needs_the_model_again(options, photos, tmp_path):
    """Heads, activations and pooling leave no trace in names and shapes of tensors."""
    model = timms(**options)
    learner = ContinualLearner.from_classifier(model, FIRST, **SETTINGS)
    learner.save(tmp_path / "saved")
    with pytest.raises(ArgumentError, match="backbone must be a model of the same architecture"):
        ContinualLearner.load(tmp_path / "saved")
    other = timms()
    with pytest.raises(CheckpointError, match="computed something else than this one"):
        ContinualLearner.load(tmp_path / "saved", backbone=other)
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)  # what was saved holds
    loaded = ContinualLearner.load(tmp_path / "saved", backbone=model)
    assert loaded.predict(photos) == learner.predict(photos)


def test_a_network_that_timm_makes_by_its_name_loads_by_itself(photos, tmp_path):
    learner = ContinualLearner.from_classifier(timms(), FIRST, **SETTINGS)
    learner.save(tmp_path / "saved")
    assert ContinualLearner.load(tmp_path / "saved").predict(photos) == learner.predict(photos)


def test_the_model_that_is_handed_over_stays_as_it_is():
    model = timms().train()
    model.blocks[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    ContinualLearner.from_classifier(model, FIRST, **SETTINGS)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.num_classes == 2 and all(p.requires_grad for p in model.parameters())


def test_a_model_in_half_precision_becomes_float32():
    learner = ContinualLearner.from_classifier(timms().half(), FIRST, **SETTINGS)
    assert all(p.dtype == torch.float32 for p in learner._core.model.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timms(in_chans=1), "must take square images in three colours"),
        (lambda: timms(global_pool=""), "must make one feature"),
        (lambda: timms().blocks, "model must be a model of timm's"),
    ],
)
def test_models_that_do_not_fit_are_one_line(make, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        ContinualLearner.from_classifier(make(), FIRST, **SETTINGS)
    assert "\n" not in str(caught.value)


def test_a_classifier_that_is_more_than_linear_is_refused():
    model = timms()
    plain = type(model).forward_head

    class Doubled(type(model)):
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return plain(self, x, pre_logits) if pre_logits else 2 * plain(self, x)

    model.__class__ = Doubled
    with pytest.raises(ArgumentError, match="must be a linear classifier behind"):
        ContinualLearner.from_classifier(model, FIRST, **SETTINGS)


def test_it_is_said_until_something_is_protected(deployed, photos, tmp_path):
    learner = ContinualLearner.from_classifier(deployed, FIRST, **SETTINGS)
    learner.save(tmp_path / "saved")
    for one in (learner, ContinualLearner.load(tmp_path / "saved")):
        for _ in range(2):
            with pytest.warns(UserWarning, match="observe"), pytest.raises(KeyboardInterrupt):
                one._core._step = interrupted
                one.learn(photos, SECOND)
    plain = ContinualLearner.from_classifier(deployed, FIRST, "lora", device="cpu", epochs=1, workers=0)
    with pytest.warns(UserWarning, match="method lora protects nothing"):
        plain.learn(photos, SECOND)


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def test_observing_that_fails_leaves_the_learner_as_it_was(deployed, photos, monkeypatch):
    learner = ContinualLearner.from_classifier(deployed, FIRST, **SETTINGS)
    before = state_of(learner)
    layer = list(learner._core.method.layers.values())[-1]

    def failing(basis: Tensor) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(layer, "protect", failing)
    with pytest.raises(RuntimeError, match="no"):
        learner.observe(photos)
    assert_same(state_of(learner), before)
