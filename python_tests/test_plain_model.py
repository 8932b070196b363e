"""The plain model of what was learned, and its scores, are those of the run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from exported import METHODS, assert_untouched, contents_of, contents_on, run_of, scores_of, state
from torch import Tensor, nn

from janus_ext import ArgumentError
from janus_ext.backbone import load_backbone
from janus_ext.exports import folder, plain
from janus_ext.exports.contents import Contents, linear_rows, prototype_rows


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


def test_pixels_may_be_floats(contents, images):
    scorer = plain.scorer(contents)
    assert torch.equal(scorer(images.float()), scorer(images))


def test_heads_stand_one_below_the_other(contents):
    weight, bias = linear_rows(contents.model.heads)
    features = torch.randn(5, 32)
    assert_close(features @ weight.T + bias, contents.model.classify(features), torch.float32)


def test_a_class_without_a_prototype_never_wins(contents):
    from janus_ext import ClassPrototypes

    prototypes = ClassPrototypes(32)
    prototypes.add(torch.randn(4, 32), torch.tensor([3, 0, 3, 5]))
    weight, bias = prototype_rows(prototypes, 7)
    features = torch.randn(100, 32)
    scores = features @ weight.T + bias
    assert sorted(scores.argmax(-1).unique().tolist()) == [0, 3, 5]
    cosines = prototypes.cosines(features) * features.norm(dim=1, keepdim=True)
    assert_close(scores[:, prototypes.classes], cosines, torch.float32)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "swinv2_cr_tiny_ns_224", "xcit_nano_12_p16_224"])
def test_classifiers_of_other_networks(name):
    contents = contents_on(load_backbone(name, "none"))
    images = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    assert_close(plain.scorer(contents)(images), scores_of(contents, images), torch.float32)


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
    with pytest.raises(ArgumentError, match=r"must be \[5, 32\] and \[5\], got \[6, 32\] and \[6\]"):
        replace(contents, class_names=tuple("abcde"))
