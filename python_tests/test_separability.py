"""Whether a task has spoiled its own features: cross-validation by lda, McNemar's test, and what the guard makes of it.

See docs/method.md, property 15.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_trainer, patterns_under
from gaussians import gaussians, known_of

from janus_ext.data import Benchmark
from janus_ext.heads import lda
from janus_ext.heads.separability import FOLDS, is_worse, told_apart

RUINOUS = 3.0  # a rate that no backbone survives
COUNTS = [13, 9, 1, 10]


@pytest.fixture(scope="module")
def many() -> Benchmark:
    """Images enough to tell that a task has spoiled its own features."""
    return replace(patterns_under(150, train=32, test=12), tasks=((5, 4, 3), (2, 1, 0)))


@pytest.mark.parametrize("distance", [0.3, 1.0])
def test_an_image_is_judged_by_the_others_alone(distance: float) -> None:
    """What `lda` says of the images of a fold, fitted to the four others."""
    features, labels = gaussians(COUNTS, 12, distance)
    order = torch.tensor([int((labels[:i] == labels[i]).sum()) for i in range(len(labels))])  # the k-th of its class
    want = torch.zeros(len(labels), dtype=torch.bool)
    for i in range(len(labels)):
        rest = order % FOLDS != order[i] % FOLDS
        scores = lda.fit(known_of(features[rest], labels[rest], [4])).scores(features[i : i + 1])
        want[i] = scores.argmax() == labels[i]
    assert torch.equal(told_apart(features, labels), want)
    assert want.any() and not want.all()
    assert not want[labels == 2].any()  # a single image of its class: the others know none


def test_features_that_say_nothing_tell_no_more_than_chance() -> None:
    labels = torch.arange(400) % 4
    features = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    assert 70 < int(told_apart(features, labels).sum()) < 130
    features[torch.arange(400), labels] += 9
    assert told_apart(features, labels).all()
    assert int(told_apart(torch.ones(400, 6), labels).sum()) <= 100  # they do not scatter at all
    assert not told_apart(1e8 + 1e-9 * features.double(), labels).all()


@pytest.mark.parametrize("images", [0, 1, 2])
def test_too_few_images_tell_nothing(images: int) -> None:
    assert told_apart(torch.randn(images, 5), torch.arange(images)).tolist() == [False] * images


@pytest.mark.parametrize(
    ("lost", "won", "worse"), [(0, 0, False), (4, 0, False), (5, 0, True), (9, 3, False), (11, 3, True), (3, 11, False)]
)
def test_worse_is_what_chance_does_not_do(lost: int, won: int, worse: bool) -> None:
    """b - c > 2 sqrt(b + c); images that are right or wrong both times say nothing."""
    before = torch.tensor([True] * lost + [False] * won + [True] * 50 + [False] * 7)
    after = torch.tensor([False] * lost + [True] * won + [True] * 50 + [False] * 7)
    assert is_worse(before, after) == worse


@pytest.mark.parametrize("method", ["janus", "lora", "bilora", "joint"])
def test_a_first_task_that_spoils_its_own_features_is_kept_within_the_budget(
    many, weights, tmp_path, caplog, method: str
) -> None:
    """At a rate that no backbone survives the heads know nearly as much as behind the frozen one, and it is said."""
    settings = {"method": method, "head": "lda", "lr": RUINOUS, "epochs": 2}
    settings |= {"frequencies": 100} if method == "bilora" else {}
    frozen = make_trainer(many, weights, tmp_path / "frozen", learn="none", head="lda").run()
    ruined = make_trainer(many, weights, tmp_path / "ruined", **settings, drift_budget=1e9).run()
    kept = make_trainer(many, weights, tmp_path / "kept", **settings).run()
    assert ruined["merged"][0] == 1.0 and ruined["acc"] < frozen["acc"] - 20
    assert kept["merged"][0] < 1 and kept["movement"][0] <= 0.1
    assert kept["acc"] > frozen["acc"] - 8
    said = [line for line in caplog.messages if "would tell its images apart worse than before" in line]
    assert len(said) == 1


def test_the_first_task_learns_freely_where_it_does_no_harm(many, weights, tmp_path, caplog) -> None:
    results = make_trainer(many, weights, tmp_path, head="lda", learn="first").run()
    assert results["merged"][0] == 1.0 and results["movement"][0] > 0.1
    assert not [line for line in caplog.messages if "apart worse" in line]
