"""A backbone that learns in no task or in the first alone, updates merged in part, and statistics moved along.

See docs/method.md, property 15.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import TOLERANCE, assert_protected_inputs_are_left_alone, make_trainer, task_of
from torch import Tensor

from janus_ext.errors import StatisticsError, TrainingError
from janus_ext.heads import HEADS
from janus_ext.heads.drift import ShareSearch, movement
from janus_ext.heads.statistics import FeatureStatistics
from janus_ext.methods import base
from janus_ext.runs.checkpoint import make_folder
from janus_ext.training.loop import Learner
from janus_ext.training.progress import Progress, make_bar

METHODS = {
    "janus": {},
    "lora": {},
    "lora-gpm": {},
    "inflora": {},
    "lora-drs": {},
    "bilora": {"frequencies": 100},
}


def trained(patterns, weights, folder, **settings):
    """With linear heads, unless others are asked for, hence without a guard."""
    settings = {"head": "linear"} | settings
    fitted = settings.get("learn") == "none" and settings["head"] not in ("linear", "aligned")
    trainer = make_trainer(patterns, weights, folder, **({} if fitted else {"epochs": 2}) | settings)
    return trainer, trainer.run()


def features_of(trainer, images: Tensor) -> Tensor:
    """By the merged model."""
    with torch.no_grad():
        return trainer.learner.model.eval().features(images)


def backbone_of(trainer) -> Tensor:
    """Features of all test images: what of the backbone heads can see."""
    return features_of(trainer, trainer.benchmark.test.images)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", ["lda", "linear"])
def test_a_frozen_backbone_stays_as_it_was(patterns, weights, tmp_path, method, head):
    settings = METHODS[method] | {"learn": "none", "head": head}
    before = backbone_of(make_trainer(patterns, weights, tmp_path / "a", method=method, **settings))
    trainer, results = trained(patterns, weights, tmp_path / "b", method=method, **settings)
    assert torch.equal(backbone_of(trainer), before)
    assert results["movement"] == results["merged"] == [None] * 3
    assert results["heads"].keys() == {"ncm", "lda", "ridge"} | ({"linear"} if head == "linear" else set())


def test_a_fitted_head_on_a_frozen_backbone_needs_no_epoch(patterns, weights, tmp_path):
    trainer, _ = trained(patterns, weights, tmp_path / "run", learn="none", head="lda")
    assert trainer.step_count(3) == 0 and not trainer.run_on_disk.epochs()
    linear, _ = trained(patterns, weights, tmp_path / "linear", learn="none", head="linear")
    assert linear.step_count(3) > 0 and len(linear.run_on_disk.epochs()) == 6


@pytest.mark.parametrize("method", METHODS)
def test_the_first_task_alone_moves_the_backbone(patterns, weights, tmp_path, method):
    kept = {}

    def keep(task: int, trainer) -> None:
        kept[task] = backbone_of(trainer)

    settings = METHODS[method] | {"epochs": 2, "learn": "first", "head": "linear"}
    trainer = make_trainer(patterns, weights, tmp_path, method=method, **settings)
    before, save = backbone_of(trainer), trainer._save
    trainer._save = lambda index: (save(index), keep(index, trainer))
    results = trainer.run()
    assert not torch.equal(kept[0], before)
    assert torch.equal(kept[1], kept[0]) and torch.equal(kept[2], kept[0])
    assert results["merged"] == [1.0, None, None] and results["movement"][0] > 0


# merged in part ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_a_share_of_the_update_is_merged(patterns, weights, tmp_path, method):
    """Of the first task, whose training does not know of it: W - W0 is that share of the whole update."""
    changes, settings = {}, METHODS[method] | {"epochs": 2, "head": "linear"}
    for share in (1.0, 0.25, 0.0):
        trainer = make_trainer(patterns, weights, tmp_path / str(share), method=method, merge_scale=share, **settings)
        before = weights_of(trainer)
        learn_first(trainer)
        changes[share] = {name: tensor - before[name] for name, tensor in weights_of(trainer).items()}
        assert trainer.reports[0].merged == share
    for name, whole in changes[1.0].items():
        assert not changes[0.0][name].any()
        rounding = torch.finfo(torch.float32).eps * (before[name].norm() + whole.norm())
        assert (changes[0.25][name].double() - whole.double() / 4).norm() <= rounding < whole.norm() / 1e5


@pytest.mark.parametrize("budget", [0.02, 1e-12, 1e-150, 0.0])
def test_no_task_moves_its_own_features_further_than_the_budget(patterns, weights, tmp_path, budget):
    """The first ten times as far."""
    _, without = trained(patterns, weights, tmp_path / "free", lr=3e-2)
    assert min(without["movement"]) > 0.04 and without["movement"][0] > 0.2 and without["merged"] == [1.0] * 3
    _, results = trained(patterns, weights, tmp_path / "kept", lr=3e-2, drift_budget=budget)
    limits = [10 * budget, budget, budget]
    assert all(moved <= limit for moved, limit in zip(results["movement"], limits, strict=True))
    assert all(0 <= share < 1 for share in results["merged"])
    if budget == 0.02:  # as much is merged as may be
        assert all(moved > 0.89 * limit for moved, limit in zip(results["movement"], limits, strict=True))


def test_the_budget_is_kept_by_the_weights_as_they_were_merged(patterns, weights, tmp_path):
    """Measured anew, in float64, and not as the report says."""
    trainer = make_trainer(patterns, weights, tmp_path, head="lda", epochs=2, lr=3e-2, drift_budget=0.02)
    for task, limit in enumerate((0.2, 0.02, 0.02)):
        images, labels = next(trainer.train_images[task].batches(len(patterns.train)))
        before = features_of(trainer, images)
        S = trainer.learner.method.known.spread(before, labels)
        learn_first(trainer, task + 1)
        moved = (features_of(trainer, images) - before).double()
        found = torch.einsum("ni,ij,nj->n", moved, torch.linalg.inv(S), moved).mean().div(len(S)).sqrt()
        assert 0.89 * limit < found <= limit * (1 + 1e-3) and 0 < trainer.reports[task].merged < 1
        assert trainer.reports[task].movement == pytest.approx(float(found), rel=1e-3)


def test_what_cannot_be_measured_is_not_merged(patterns, weights, tmp_path, monkeypatch, caplog):
    """With a guard; without one it is merged, and nothing is said of how far it went."""
    monkeypatch.setattr(base, "movement", lambda before, after, S: math.inf)
    cases = (
        ({"drift_budget": 0.1}, 0.0, 0.0),
        ({"drift_budget": 1e9}, 1.0, None),  # no guard
        ({"merge_scale": 0.5}, 0.5, None),
        ({}, 1.0, None),
    )
    for i, (settings, merged, moved) in enumerate(cases):
        with caplog.at_level("INFO", logger="janus_ext"):
            _, results = trained(patterns, weights, tmp_path / str(i), **settings)
        assert (results["merged"], results["movement"]) == ([merged] * 3, [moved] * 3)
    said = [line for line in caplog.messages if "of the update merged" in line]
    assert [line.split(": ")[1] for line in said] == (
        ["0 % of the update merged, which moves its own features by 0.000 deviations"] * 3
        + ["100 % of the update merged, which moves features that hardly scatter"] * 3
        + ["50 % of the update merged, which moves features that hardly scatter"] * 3
    )


def test_movement_is_no_rounding_of_half_precision(patterns, weights, tmp_path):
    """A budget of less than what bfloat16 rounds is kept, of the weights as they were merged."""
    trainer = make_trainer(patterns, weights, tmp_path, amp="bf16", head="lda", epochs=2, lr=3e-2, drift_budget=2e-3)
    learner, model = trainer.learner, trainer.learner.model.eval()
    learn_first(trainer)
    images, labels = next(trainer.train_images[1].spread(256).batches(256))

    def exact():
        model.eval().amp = None
        with torch.no_grad():
            features = model.features(images)
        model.amp = torch.bfloat16
        return features

    before = exact()
    S = learner.method.known.spread(before, labels)
    learn_first(trainer, 2)
    report = trainer.reports[1]
    assert 0 < report.merged < 1 and report.movement <= 2e-3
    assert movement(before, exact(), S) == pytest.approx(report.movement, rel=0.02)


def test_a_head_that_cannot_be_fitted_is_left_out(patterns, weights, tmp_path, monkeypatch, caplog):
    """Unless it was asked for: the others are only measured beside it."""

    def unfit(known):
        raise StatisticsError("features scatter too little")

    monkeypatch.setitem(HEADS, "lda", unfit)
    _, results = trained(patterns, weights, tmp_path / "linear")
    assert results["heads"].keys() == {"linear", "ncm", "ridge"}
    assert "head lda is not measured beside linear: features scatter too little" in caplog.text
    with pytest.raises(TrainingError, match="task 1: features scatter too little"):
        trained(patterns, weights, tmp_path / "lda", head="lda")


def test_tasks_of_one_class_take_no_steps(patterns, weights, tmp_path):
    """The backbone rests in them: nothing is trained, and nothing is merged."""
    uneven = replace(patterns, tasks=((5, 4), (3,), (2, 1, 0)))
    trainer, results = trained(uneven, weights, tmp_path, head="lda")
    assert {line["task"] for line in trainer.run_on_disk.epochs()} == {0, 2}
    assert trainer.step_count(2) == trainer.step_count(1) < trainer.step_count(3)
    assert [merged is None for merged in results["merged"]] == [False, True, False]


def test_where_no_classes_are_to_come_the_first_task_is_free(patterns, weights, tmp_path):
    at_once = replace(patterns, tasks=(sum(patterns.tasks, ()),))
    _, results = trained(at_once, weights, tmp_path, drift_budget=1e-3)
    assert results["merged"] == [1.0] and results["movement"][0] > 0.01


def lost(a: float) -> float:
    """Where nothing is known of the movement of larger shares."""
    return a if a < 0.3 else math.inf


@pytest.mark.parametrize("curve", [lambda a: a, lambda a: a**3, lambda a: a**0.25, lambda a: max(0.0, a - 0.6), lost])
def test_the_share_within_a_budget_is_found_whatever_the_curve(patterns, weights, tmp_path, curve):
    """Movement as a function of the share; what is left of the update is the share that is reported."""
    trainer = make_trainer(patterns, weights, tmp_path)
    method, left = trainer.learner.method, [1.0]
    method.shrink_update = lambda share: left.append(left[-1] * share)
    method._movement = lambda task: 5 * curve(left[-1])
    share, moved = method._within(0.3, task_of(trainer, 1), 5 * curve(1.0))
    assert moved == pytest.approx(5 * curve(share)) and share == pytest.approx(left[-1])
    assert 0.8 * 0.3 <= moved <= 0.3


@pytest.mark.parametrize("curve", [lambda share: share, lambda share: share / (share + 1e-5)])
def test_of_a_share_that_factors_cannot_hold_nothing_is_merged(curve) -> None:
    for budget in (1e-12, 1e-150, 5e-324):
        assert found_by(ShareSearch(budget, 1.0), curve) == (0.0, 0.0)
    share, moved = found_by(ShareSearch(1e-2, 1.0), curve)
    assert moved == curve(share) and 0.9e-2 <= moved <= 1e-2  # also where it hardly falls at first


@pytest.mark.parametrize("excess", [1e-5, 1e-3, 0.03, 0.3, 3, 100])
@pytest.mark.parametrize("bend", [0.5, 3, 10, 30])
def test_a_share_is_found_along_curves_that_flatten(bend: float, excess: float) -> None:
    """Lines through two points of them end above the budget again and again."""
    for curve in (
        lambda a: math.tanh(bend * a) / math.tanh(bend),
        lambda a: a * (1 + bend) / (1 + bend * a),
        lambda a: a ** (1 / (1 + bend / 10)),
        lambda a: (a + bend * a**2) / (1 + bend),
    ):
        share, moved = found_by(ShareSearch(1.0, 1 + excess), lambda a, curve=curve: (1 + excess) * curve(a))
        assert 0.8 <= moved <= 1 and moved == (1 + excess) * curve(share)


def found_by(search: ShareSearch, curve) -> tuple[float, float]:
    """What `Method._within` would find where a share moves features by `curve` of it."""
    for _ in range(10):
        share = search.next_share()
        if not share:
            break
        search.add(share, curve(share))
        if 0.9 * search.budget <= curve(share) <= search.budget:
            break
    return search.below


def test_a_budget_that_is_kept_anyway_changes_nothing(patterns, weights, tmp_path):
    free, _ = trained(patterns, weights, tmp_path / "free")
    kept, results = trained(patterns, weights, tmp_path / "kept", drift_budget=1e3)
    assert results["merged"] == [1.0] * 3
    for name, tensor in weights_of(free).items():
        assert torch.equal(tensor, weights_of(kept)[name])


@pytest.mark.parametrize("settings", [{"merge_scale": 0.5}, {"drift_budget": 0.03, "lr": 3e-2}])
def test_what_is_protected_is_as_safe(patterns, weights, tmp_path, settings):
    """A part of an update that leaves a subspace alone leaves it alone."""
    settings = {"head": "linear", "epochs": 2, "rectify": "exact"} | settings
    trainer = make_trainer(patterns, weights, tmp_path, Learner, **settings)
    assert max(trainer.run()["merged"]) < 1
    assert_protected_inputs_are_left_alone(trainer, 3)


def test_what_is_protected_behind_a_part_of_an_update_are_its_own_inputs(patterns, weights, tmp_path):
    """Training has seen the inputs that the whole update makes; each layer's basis is that of another pass."""
    trainer = make_trainer(patterns, weights, tmp_path, epochs=2, lr=5e-2, merge_scale=0.2)
    method, seen = trainer.learner.method, {}
    watch = method.watch

    def watching(task, estimators):
        seen["before"] = {name: float(e.statistics.gram.abs().sum()) for name, e in estimators.items()}
        watch(task, estimators)
        seen["after"] = {name: e.statistics.gram.clone() for name, e in estimators.items()}

    method.watch = watching
    learn_first(trainer)
    assert not any(seen["before"].values())  # what training has seen is gone
    for name, gram in seen["after"].items():
        basis = method.layers[name].basis
        whole, kept = gram.diagonal().sum(), ((gram @ basis) * basis).sum()
        least = float(torch.linalg.eigvalsh(gram)[-basis.shape[1] :].sum() / whole)
        assert float(kept / whole) == pytest.approx(least, rel=1e-4) and float(kept / whole) >= 0.9
    assert not method.shrunk


def test_the_share_that_is_merged_is_said(patterns, weights, tmp_path, caplog):
    """Behind a guard always, also where the update is merged whole; without one only where it is not."""
    for budget, whole in ((0.02, 0), (1e9, 3), (None, 3)):
        caplog.clear()
        with caplog.at_level("INFO", logger="janus_ext"):
            _, results = trained(patterns, weights, tmp_path / str(budget), lr=3e-2, drift_budget=budget)
        assert sum(share == 1 for share in results["merged"]) == whole
        wanted = [
            f"task {i}: {100 * share:.0f} % of the update merged, which moves its own features by {far:.3f} deviations"
            for i, (share, far) in enumerate(zip(results["merged"], results["movement"], strict=True), 1)
        ]
        assert [line for line in caplog.messages if "of the update merged" in line] == (wanted if budget else [])


# moved along ---------------------------------------------------------------------------------------------------------
def test_drift_moves_statistics_towards_where_the_features_went(patterns, weights, tmp_path):
    """After the second task the means of the first are nearer to those of its images' present features."""
    distance = {}
    for drift in ("none", "ridge"):
        trainer = make_trainer(
            *(patterns, weights, tmp_path / drift),
            **{"method": "lora", "head": "linear", "epochs": 4, "lr": 2e-2, "drift": drift, "batch_size": 4},
        )
        learn_first(trainer, tasks=2)
        images, outputs = zip(*trainer.learner.clean_batches(trainer.train_images[0]), strict=True)
        with torch.no_grad():
            features = trainer.learner.model.eval().features(torch.cat(images))
        now = FeatureStatistics(features.shape[1])
        now.observe(features, torch.cat(outputs))
        kept = trainer.learner.method.known.statistics
        distance[drift] = float((kept.means()[:2] - now.means()).norm() / now.means().norm())
        prototypes = trainer.learner.method.prototypes.matrix[:2]
        unit = torch.nn.functional.normalize(kept.means()[:2], dim=1).float()
        assert torch.allclose(prototypes, unit, atol=TOLERANCE[torch.float32])
    assert distance["none"] > 0.05  # there is something to follow
    assert distance["ridge"] < distance["none"]


# beside it -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        {"drift": "ridge"},
        {"drift_budget": 0.03},
        {"merge_scale": 0.5},
        {"learn": "first"},
        {"learn": "none", "head": "linear"},
        {"head_width": 50},
    ],
)
def test_a_run_that_is_cut_off_ends_with_the_same_bits(patterns, weights, tmp_path, settings):
    settings = {"head": "lda"} | settings
    whole, results = trained(patterns, weights, tmp_path / "whole", **settings)
    part = make_trainer(patterns, weights, tmp_path / "part", epochs=2, **settings)

    class Cut(Exception):
        pass

    save = part._save

    def cut(index: int) -> None:
        save(index)
        if index == 1:
            raise Cut

    part._save = cut
    with pytest.raises(Cut):
        part.run()
    again = make_trainer(patterns, weights, tmp_path / "part", epochs=2, **settings)
    again.restore()
    resumed = again.run()
    for name in results.keys() - {"seconds"}:
        assert json.dumps(resumed[name]) == json.dumps(results[name]), name
    model, method = whole.learner.state()
    for wanted, found in zip((model, method), again.learner.state(), strict=True):
        assert wanted.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


def weights_of(trainer) -> dict[str, Tensor]:
    """The weights that updates are merged into."""
    state = trainer.learner.model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if name.endswith("qkv.linear.weight")}


def learn_first(trainer, tasks: int = 1) -> None:
    """Learns the first tasks, as far as they are not learned, without testing anything."""
    make_folder(trainer.run_on_disk.checkpoints)
    for index in range(len(trainer.reports), tasks):
        trainer._learn(index, Progress(make_bar(1, 0), 3, trainer.config.epochs), lambda *_: None)
