"""What every method owes: runs that end, repeat bit for bit and can be taken up again from the saved state."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_trainer, weights_of, without_time

from janus_ext.backbone.places import TARGETS
from janus_ext.config import TrainConfig
from janus_ext.data import emoji
from janus_ext.methods import METHODS
from janus_ext.methods.base import Task
from janus_ext.training.loop import Learner
from janus_ext.training.trainer import Trainer

CASES = {
    "janus": {},
    "janus, linear heads": {"head": "linear"},
    "janus, nearest class mean": {"method": "janus", "head": "ncm"},
    "janus, isvd and tangent": {"method": "janus", "estimator": "isvd", "rectify": "tangent"},
    "lora": {},
    "lora-gpm": {},
    "lora-gpm, tangent": {"method": "lora-gpm", "rectify": "tangent"},
    "lora-gpm, exact": {"method": "lora-gpm", "rectify": "exact"},
    "inflora": {},
    "lora-drs": {},
    "lora-drs, tangent": {"method": "lora-drs", "rectify": "tangent"},
    "lora-drs, exact": {"method": "lora-drs", "rectify": "exact"},
    "bilora": {"frequencies": 100},
} | {
    f"{method}, all targets": {"method": method, "targets": TARGETS}
    for method in ("janus", "lora", "lora-gpm", "inflora", "lora-drs")
}


def trainer_of(case: str, benchmark, weights, folder, cls=Trainer, **more):
    """At 1e-2 every method learns something of the patterns in two epochs; energies leave room beside the bases."""
    changes = {"method": case.split(",")[0], "epochs": 2} | CASES[case] | more
    return make_trainer(benchmark, weights, folder, cls, **changes)


def comparable(report) -> tuple:
    factors = {name: tensor.tolist() for name, tensor in report.factors.items()}
    return (report.violation, report.basis_rank, report.danger, report.similarity_own, report.similarity_old, factors)


class CutOffLearner(Learner):
    """Stops for good in the last epoch of the third task, when all that a method keeps is in use."""

    def _train_epoch(self, task: Task, epoch: int, *rest) -> dict:
        record = super()._train_epoch(task, epoch, *rest)
        if (task.index, epoch) == (2, self.config.epochs - 1):
            raise KeyboardInterrupt
        return record


def test_every_method_is_a_case():
    assert {case.split(",")[0] for case in CASES} == set(METHODS) - {"joint"}


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_repeats_itself_and_is_taken_up_again(patterns, weights, tmp_path, case):
    first = trainer_of(case, patterns, weights, tmp_path / "first")
    results = first.run()
    check_results(results)
    again = trainer_of(case, patterns, weights, tmp_path / "again", CutOffLearner)
    with pytest.raises(KeyboardInterrupt):
        again.run()
    assert again.matrix == results["accuracy_matrix"][:2]
    resumed = trainer_of(case, patterns, weights, tmp_path / "again")
    resumed.restore()
    assert without_time(resumed.run()) == without_time(results)
    assert comparable(resumed.reports[-1]) == comparable(first.reports[-1])
    assert all(torch.equal(value, weights_of(resumed)[key]) for key, value in weights_of(first).items())
    states = resumed.learner.method.state_dict(), first.learner.method.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[0][key]) for key, value in states[1].items())


def check_results(results: dict) -> None:
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3]
    assert all(0 <= value <= 100 for row in results["accuracy_matrix"] for value in row)
    assert json.loads(json.dumps(results, allow_nan=False)) == results


@pytest.mark.parametrize("case", ["lora-gpm, exact", "lora-drs, exact"])
def test_exact_rectification_is_exact_in_every_method(patterns, weights, tmp_path, case):
    violation = trainer_of(case, patterns, weights, tmp_path / "run").run()["violation"]
    assert violation[0] is None and max(violation[1:]) <= 1e-5


def test_lora_gpm_and_janus_differ_in_what_they_observe(patterns, weights, tmp_path):
    """Same rectification, no margin loss: a pass after the task sees other inputs than the last epoch."""
    changes = {"rectify": "exact", "margin_weight": 0.0, "head": "linear"}
    janus, gpm = (make_trainer(patterns, weights, tmp_path / m, method=m, **changes) for m in ("janus", "lora-gpm"))
    results = [trainer.run() for trainer in (janus, gpm)]
    first = [r["accuracy_matrix"][0] for r in results]
    assert first[0] == first[1]
    bases = [trainer.learner.method.layers["blocks.1.attn.qkv"].basis for trainer in (janus, gpm)]
    assert bases[0].shape != bases[1].shape or not torch.allclose(bases[0], bases[1], atol=1e-4)


# the nearest class mean ----------------------------------------------------------------------------------------------
def test_the_nearest_class_mean_takes_prototypes_in_place_of_heads(patterns, weights, tmp_path):
    trainer = trainer_of("janus, nearest class mean", patterns, weights, tmp_path / "run")
    matrix = trainer.run()["accuracy_matrix"]
    features = trainer.learner.model.eval().features(patterns.test.images).detach()
    directions = torch.nn.functional.normalize(features, dim=1)
    nearest = torch.cdist(directions, trainer.learner.method.prototypes.matrix).argmin(1)
    right = (nearest == patterns.positions[patterns.test.labels]).float()
    assert matrix[-1] == pytest.approx(
        [100 * float(right[rows].mean()) for rows in (images.rows for images in trainer.test_images)]
    )
    with torch.no_grad():
        for head in trainer.learner.model.heads:
            head.weight.zero_()
    assert trainer._evaluate(2)["ncm"][0] == matrix[-1]  # heads take no part in it
    prototypes = trainer.learner.method.prototypes
    trainer.learner.method.load_state_dict(
        trainer.learner.method.state_dict() | {"prototypes.matrix": prototypes.matrix.roll(1, 0)}
    )
    assert trainer._evaluate(2)["ncm"][0] != matrix[-1]


def test_training_does_not_depend_on_the_classifier_of_the_test(patterns, weights, tmp_path):
    """But for the guard that comes with it."""
    cases = list(CASES)[1:3]
    linear, ncm = (trainer_of(case, patterns, weights, tmp_path / case, drift_budget=1e9) for case in cases)
    for trainer in (linear, ncm):
        trainer.run()
    assert all(torch.equal(value, weights_of(ncm)[key]) for key, value in weights_of(linear).items())


def test_a_class_without_training_images_does_not_shift_the_others(patterns, weights, tmp_path):
    kept = (patterns.train.labels != 4).nonzero().flatten()  # the second output of the first task
    lacking = replace(patterns, train=patterns.train.take(kept))
    trainer = trainer_of("janus, nearest class mean", lacking, weights, tmp_path / "run")
    trainer.run()
    assert trainer.learner.method.prototypes.classes == [0, 2, 3, 4, 5]
    with torch.no_grad():
        scores = trainer.learner.method.scores(patterns.test.images)
        cosines = trainer.learner.method.prototypes.cosines(trainer.learner.model.features(patterns.test.images))
    assert scores.shape == (24, 6) and torch.allclose(scores[:, [0, 2, 3, 4, 5]], 16 * cosines, atol=1e-5)
    assert not (scores.argmax(-1) == 1).any()


# joint ---------------------------------------------------------------------------------------------------------------
def test_joint_training_is_one_task_with_all_classes(tmp_path):
    config = TrainConfig(method="joint", limit_per_class=1).resolved()
    assert len(emoji.load(config).tasks) == 1
    assert sorted(emoji.load(config).tasks[0]) == list(range(200))


def test_joint_training_is_plain_lora_on_everything(patterns, weights, tmp_path):
    single = replace(patterns, tasks=(patterns.class_order,))
    runs = [make_trainer(single, weights, tmp_path / method, method=method) for method in ("joint", "lora")]
    results = [without_time(trainer.run()) | {"method": None} for trainer in runs]
    assert results[0] == results[1] and len(runs[0].learner.model.heads) == 1
    assert all(torch.equal(value, weights_of(runs[1])[key]) for key, value in weights_of(runs[0]).items())
