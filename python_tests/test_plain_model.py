"""The plain model of what was learned, and its scores, are those of the run."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from exported import METHODS, assert_untouched, contents_of, contents_on, needs, run_of, scores_of, state
from learners import FIRST, learner_of
from torch import Tensor, nn

from janus_ext import ArgumentError, CheckpointError
from janus_ext.backbone import load_backbone
from janus_ext.exports import folder, onnx, plain
from janus_ext.exports.contents import Contents
from janus_ext.heads.base import Decision


@pytest.fixture(scope="module")
def run(patterns, weights, tmp_path_factory) -> Path:
    return run_of("janus", patterns, weights, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def contents(run) -> Contents:
    return contents_of(run)


@pytest.fixture
def images(patterns) -> Tensor:
    return patterns.test.images


@pytest.mark.parametrize("case", METHODS)
def test_the_plain_model_scores_as_the_run_whatever_the_method(patterns, weights, tmp_path, images, case):
    contents = contents_of(run_of(case, patterns, weights, tmp_path / "run"))
    before, random = state(contents), torch.get_rng_state()
    scores = plain.scorer(contents)(images)
    assert_close(scores, scores_of(contents, images), torch.float32)
    assert_untouched(contents, before)
    assert torch.equal(random, torch.get_rng_state())
    right = (scores.argmax(-1) == patterns.positions[patterns.test.labels]).float()
    rows = [patterns.test.of_classes(classes) for classes in patterns.tasks]
    assert contents.results["accuracy_matrix"][-1] == [pytest.approx(100 * float(right[r].mean())) for r in rows]
    assert contents.class_names == ("f", "e", "d", "c", "b", "a")


def test_what_is_still_in_the_factors_is_in_the_plain_model(run, images):
    contents = contents_of(run)
    before = scores_of(contents, images)
    for module in contents.model.modules():
        if hasattr(module, "effective_A"):
            nn.init.normal_(module.B)
    wanted = scores_of(contents, images)
    assert (wanted - before).norm() > 1e-2
    assert_close(plain.scorer(contents)(images), wanted, torch.float32)


def test_what_saved_memory_in_training_does_not_come_along(photos, weights):
    learner = learner_of(weights, checkpointing=True)
    learner.learn(photos, FIRST)
    assert learner.model().grad_checkpointing is False
    assert learner._core.model.backbone.grad_checkpointing is True


def test_pixels_may_be_floats(contents, images):
    scorer = plain.scorer(contents)
    assert torch.equal(scorer(images.float()), scorer(images))


def test_rows_decide_as_the_head(patterns, weights, tmp_path, images):
    for case in ("janus", "janus, ncm", "janus, lda", "janus, ridge", "janus, aligned"):
        contents = contents_of(run_of(case, patterns, weights, tmp_path / case))
        weight, bias = contents.decision.rows()
        features = contents.model.eval().features(images).detach()
        assert torch.equal((features @ weight.T + bias).argmax(1), contents.decision.scores(features).argmax(1))


def test_random_features_leave_no_linear_classifier(patterns, weights, tmp_path):
    contents = contents_of(run_of("janus, lda of random features", patterns, weights, tmp_path / "run"))
    with pytest.raises(ArgumentError, match="--head-width makes random features .*: ONNX and pt2 hold them"):
        contents.decision.rows()


def test_a_class_of_which_nothing_is_known_never_wins():
    weight = torch.randn(7, 32)
    seen = torch.tensor([True, False, False, True, False, True, False])
    decision = Decision.of(weight, torch.zeros(7), seen, unit=True)
    features = torch.randn(100, 32)
    rows, bias = decision.rows()
    for scores in (features @ rows.T + bias, decision.scores(features)):
        assert sorted(scores.argmax(-1).unique().tolist()) == [0, 3, 5]
    assert torch.isfinite(bias).all()


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "swinv2_cr_tiny_ns_224", "xcit_nano_12_p16_224"])
def test_classifiers_of_other_networks(name):
    contents = contents_on(load_backbone(name, "none"))
    images = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    assert_close(plain.scorer(contents)(images), scores_of(contents, images), torch.float32)


def test_what_saved_memory_in_a_network_s_stages_does_not_come_along():
    classifier = contents_on(load_backbone("swin_tiny_patch4_window7_224", "none")).model
    classifier.backbone.set_grad_checkpointing(True)  # which the network as a whole does not have
    assert not any(getattr(m, "grad_checkpointing", False) for m in plain.merged_backbone(classifier).modules())


def test_a_classifier_that_is_no_linear_map_of_the_features_is_refused():
    contents = contents_on(load_backbone("volo_d1_224", "none"))
    with pytest.raises(ArgumentError, match="VOLO .*linear"):
        plain.scorer(contents)


def test_a_network_that_torch_cannot_follow_is_one_line():
    class Moody(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return pixels.mean((2, 3)) * (1 if pixels.sum() > 0 else 2)

    scorer = plain.Scorer(Moody(), torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    with pytest.raises(ArgumentError, match="^torch.export cannot follow this Moody: [^\n]+$"):
        plain.program_of(scorer, folder.random_images(8))


def test_rows_that_do_not_fit_are_refused(contents):
    with pytest.raises(ArgumentError, match="decision must be of 5 classes, got 6"):
        replace(contents, class_names=tuple("abcde"))


def test_weights_of_a_head_with_random_features_count_too(photos, weights, tmp_path, monkeypatch):
    needs("onnx")
    learner = learner_of(weights, head="lda", head_width=40)
    learner.learn(photos, FIRST)
    contents = learner.contents()
    parameters = sum(p.nbytes for p in plain.scorer(contents).parameters())
    monkeypatch.setattr(onnx, "LARGEST", parameters)  # what else there is are buffers
    onnx.export(contents, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx.data").exists()


def test_a_folder_that_keeps_its_place_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    """As an empty volume that is mounted there does."""

    def refuse(source, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    (tmp_path / "volume").mkdir()
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="volume cannot be written: .*busy"):
        patch.setattr(folder.os, "replace", refuse)
        with folder.new_folder(tmp_path / "volume"):
            pytest.fail("nothing is to be made")
    assert [path.name for path in tmp_path.rglob("*")] == ["volume"]
    found = (tmp_path / "volume").stat().st_ino
    with pytest.raises(ZeroDivisionError), folder.new_folder(tmp_path / "volume"):
        1 / 0  # noqa: B018
    assert (tmp_path / "volume").stat().st_ino == found  # the folder that was there, with whom it belongs to
    with folder.new_folder(tmp_path / "volume") as made:
        (made / "x").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["volume", "x"]
