"""Whether a task has spoiled its own features: cross-validation by lda, McNemar's test, and what the guard makes of it.

See docs/method.md, property 15.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from conftest import DEVICES, make_trainer, patterns_under
from gaussians import gaussians, known_of

from janus_ext import ClassPrototypes, ContinualLearner, DecoupledMarginLoss, LoRALinear, reference
from janus_ext.calibration import checked_temperature
from janus_ext.data.benchmark import Benchmark, MemorySplit, Selection
from janus_ext.heads import lda
from janus_ext.heads.separability import FOLDS, is_worse, told_apart

COUNTS = [13, 9, 1, 10]


@pytest.fixture(scope="module")
def many() -> Benchmark:
    """Images enough to tell that a task has spoiled its own features."""
    return replace(patterns_under(150, train=32, test=12), tasks=((5, 4, 3), (2, 1, 0)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("distance", [0.3, 1.0])
def test_an_image_is_judged_by_the_others_alone(device: str, distance: float) -> None:
    """What `lda` says of the images of a fold, fitted to the four others."""
    features, labels = gaussians(COUNTS, 12, distance)
    order = torch.tensor([int((labels[:i] == labels[i]).sum()) for i in range(len(labels))])  # the k-th of its class
    want = torch.zeros(len(labels), dtype=torch.bool)
    for i in range(len(labels)):
        rest = order % FOLDS != order[i] % FOLDS
        scores = lda.fit(known_of(features[rest], labels[rest], [4])).scores(features[i : i + 1])
        want[i] = scores.argmax() == labels[i]
    assert torch.equal(told_apart(features.to(device), labels.to(device)).cpu(), want)
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


SPOILING = {"lr": 1.0, "epochs": 2, "head": "lda"}  # at which no backbone survives


@pytest.mark.parametrize("method", ["janus", "lora", "bilora", "joint"])
def test_a_first_task_that_spoils_its_own_features_is_kept_within_the_budget(
    many, weights, tmp_path, caplog, method: str
) -> None:
    """The heads know nearly as much as behind the frozen backbone, and it is said."""
    settings = SPOILING | {"method": method} | ({"frequencies": 100, "lr": 30.0} if method == "bilora" else {})
    frozen = make_trainer(many, weights, tmp_path / "frozen", learn="none", head="lda").run()
    spoiled = make_trainer(many, weights, tmp_path / "spoiled", **settings, drift_budget=1e9).run()
    kept = make_trainer(many, weights, tmp_path / "kept", **settings).run()
    assert spoiled["merged"][0] == 1.0 and spoiled["acc"] < frozen["acc"] - 20
    assert 0 < kept["merged"][0] < 1 and 0.05 < kept["movement"][0] <= 0.1
    assert kept["acc"] > frozen["acc"] - 8
    assert len([line for line in caplog.messages if "tell its own images apart worse than before" in line]) == 1


def test_nothing_of_the_probe_is_kept_behind_a_task(many, weights, tmp_path) -> None:
    trainer = make_trainer(many, weights, tmp_path, **SPOILING, merge_scale=0.5)
    results = trainer.run()
    assert 0 < results["merged"][0] < 0.5
    assert trainer.learner.method._probe is trainer.learner.method._moved is None


def test_a_learner_is_held_as_well(many, weights, caplog) -> None:
    learner = ContinualLearner(weights=str(weights), rank=4, device="cpu", **SPOILING)
    images, labels = many.train.images, many.train.labels
    learner.learn([(image, "abcdef"[c]) for image, c in zip(images, labels.tolist(), strict=True) if c < 3])
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1 and said[0].startswith("task 1: its whole update would tell its own images apart worse")


def test_a_first_task_that_does_its_own_images_no_harm_may_move_them_further(many, weights, tmp_path, caplog) -> None:
    """As far as it goes, or ten times the budget."""
    free = make_trainer(many, weights, tmp_path / "free", head="lda", learn="first", drift_budget=1e9).run()
    moved = free["movement"][0]
    for allowed, name in ((1.01 * moved, "enough"), (moved / 2, "half")):
        settings = {"head": "lda", "learn": "first", "drift_budget": allowed / 10}
        results = make_trainer(many, weights, tmp_path / name, **settings).run()
        if allowed > moved:
            assert results["merged"][0] == 1.0 and results["movement"][0] == moved
        else:
            assert 0 < results["merged"][0] < 1 and 0.9 * allowed <= results["movement"][0] <= allowed
    assert not [line for line in caplog.messages if "apart worse" in line]


# the images that it is measured on -----------------------------------------------------------------------------------
def test_the_probe_has_images_of_every_class_or_enough_of_some() -> None:
    def probed(labels: torch.Tensor) -> torch.Tensor:
        split = MemorySplit(
            torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels, [str(i) for i in range(len(labels))]
        )
        rows = Selection.all_of(split, range(int(labels.max()) + 1)).spread(256).rows
        assert len(rows) == len(rows.unique()) == 256 or len(labels) < 256
        return labels[rows].bincount()

    assert probed(torch.arange(511) % 2).tolist() == [128, 128]  # evenly spaced rows would be of one class
    assert probed(torch.arange(90) // 30).tolist() == [30, 30, 30]
    counts = probed(torch.arange(1000).repeat(6))
    assert int((counts > 0).sum()) == 51 and counts[counts > 0].min() == 5


@pytest.mark.parametrize("number", [2**70, Fraction(10**30, 3)])
def test_numbers_that_torch_takes_no_integers_for(number) -> None:
    """They are floats wherever they are used."""
    layer = LoRALinear(torch.nn.Linear(6, 6), rank=2, scale=number, damping=number)
    layer(torch.randn(3, 6)).sum().backward()
    layer.merge()
    prototypes = ClassPrototypes(6)
    prototypes.add(torch.randn(4, 6), torch.arange(4))
    features = torch.randn(3, 6, requires_grad=True)
    DecoupledMarginLoss(0.2, number, number)(features, prototypes).backward()
    assert bool(features.grad.isfinite().all())
    plain = [reference.margin_loss(features.detach(), prototypes.matrix, 0.2, tau)[0] for tau in (2**70, 2.0**70)]
    assert torch.equal(*plain)
    assert checked_temperature(number) == float(number)
