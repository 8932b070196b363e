"""Training end to end: the command, the run folder, repeatability, exactness, the ablation rows, and the errors."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import (
    KeepingTrainer,
    assert_protected_inputs_are_left_alone,
    make_trainer,
    weights_of,
    without_time,
)
from safetensors.torch import load_file
from torch import Tensor

from janus_ext.assembly import make_learner
from janus_ext.config import TrainConfig
from janus_ext.data import emoji
from janus_ext.errors import ArgumentError, TrainingError
from janus_ext.heads import HEADS
from janus_ext.methods import METHODS
from janus_ext.methods.base import Method, Step
from janus_ext.runs import checkpoint
from janus_ext.runs.run import Run

ABLATION = {  # the rows of docs/methods.md: rectify, estimator, margin weight
    "nothing": ("none", "none", 0.0),
    "DML": ("none", "none", 0.5),
    "OE": ("project", "gram", 0.0),
    "GR": ("tangent", "none", 0.0),
    "OE+GR": ("tangent", "gram", 0.0),
    "OE+DML": ("project", "gram", 0.5),
    "all": ("tangent", "gram", 0.5),
    "OE+GR exact": ("exact", "gram", 0.0),
    "all exact": ("exact", "gram", 0.5),
    "all exact, incremental SVD": ("exact", "isvd", 0.5),
}


# repeatability -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_the_same_seed_is_bit_identical_and_another_is_not(patterns, weights, tmp_path, amp):
    runs = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        trainer = make_trainer(patterns, weights, tmp_path / name, seed=(seed,), amp=amp)
        runs[name] = (without_time(trainer.run()), weights_of(trainer))
    assert runs["first"][0] == runs["again"][0]
    assert all(torch.equal(value, runs["again"][1][key]) for key, value in runs["first"][1].items())
    assert not torch.equal(runs["first"][1]["heads.0.weight"], runs["other"][1]["heads.0.weight"])


def test_the_past_of_the_random_generators_does_not_matter(patterns, weights, tmp_path):
    first = make_trainer(patterns, weights, tmp_path / "a")
    first.run()
    second = make_trainer(patterns, weights, tmp_path / "b")
    torch.rand(1000)
    second.run()
    assert all(torch.equal(value, weights_of(second)[key]) for key, value in weights_of(first).items())


def test_sequential_lora_is_janus_with_everything_off(patterns, weights, tmp_path):
    lora = make_trainer(patterns, weights, tmp_path / "a", method="lora")
    lora.run()
    off = {"rectify": "none", "estimator": "none", "margin_weight": 0.0}
    janus = make_trainer(patterns, weights, tmp_path / "b", **off)
    janus.run()
    assert all(torch.equal(value, weights_of(janus)[key]) for key, value in weights_of(lora).items())


# what a run must achieve ---------------------------------------------------------------------------------------------
def test_separable_classes_are_learned(patterns, weights, tmp_path):
    results = make_trainer(patterns, weights, tmp_path / "run", epochs=8, method="lora").run()
    assert results["plasticity"] >= 75.0


@pytest.mark.parametrize("row", ABLATION)
def test_every_row_of_the_ablation_runs(patterns, weights, tmp_path, row):
    rectify, estimator, weight = ABLATION[row]
    changes = {"rectify": rectify, "estimator": estimator, "margin_weight": weight}
    results = make_trainer(patterns, weights, tmp_path / "run", **changes).run()
    assert len(results["accuracy_matrix"]) == 3
    assert results["violation"][0] is None and results["danger"][2] is not None
    if estimator == "none":
        assert results["violation"] == [None] * 3 and results["basis_rank"] == [{}] * 3
    else:
        assert all(v <= 1e-5 for v in results["violation"][1:]) == (rectify == "exact")


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_exact_rectification_leaves_protected_inputs_alone(patterns, weights, tmp_path, optimizer, amp):
    changes = {"optimizer": optimizer, "amp": amp, "clip_norm": 1.0}
    trainer = make_trainer(patterns, weights, tmp_path / "run", KeepingTrainer, **changes)
    trainer.run()
    assert_protected_inputs_are_left_alone(trainer, tasks=3)


def test_exact_rectification_on_the_embedded_benchmark(tmp_path):
    config = TrainConfig(tasks=4, limit_per_class=1, epochs=2, energy_start=0.9, energy_end=0.95).resolved()
    learner = make_learner(replace(config, device="cpu", amp="bf16"), 0, 4)
    trainer = KeepingTrainer(config, emoji.load(config), learner, Run(tmp_path / "run"))
    results = trainer.run()
    assert_protected_inputs_are_left_alone(trainer, tasks=4)
    assert max(results["violation"][1:]) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        *({"method": method} for method in METHODS if method not in ("joint", "bilora")),
        {"method": "bilora", "frequencies": 100},
        {"scale": 2.0, "merge_scale": 0.5},
    ],
    ids=str,
)
def test_backbone_and_factors_give_the_final_weights_bit_for_bit(patterns, weights, tmp_path, changes):
    """The backbone's file and the factors of the tasks, all of them; the model of the last task is the only copy."""
    trainer = make_trainer(patterns, weights, tmp_path / "run", **changes)
    trainer.run()
    files = {path.name: checkpoint.read_tensors(path)[0] for path in (tmp_path / "run" / "checkpoints").iterdir()}
    frozen = set(trainer.learner.model.state_dict()) - set(trainer.learner.moving()[0])
    assert [name for name, tensors in files.items() if frozen & set(tensors)] == ["model.safetensors"]
    start = {name: tensor.float() for name, tensor in load_file(weights).items()}
    rebuilt = {name: tensor.clone() for name, tensor in start.items()}
    adapted = [f"blocks.{block}.attn.qkv" for block in range(len(trainer.learner.method.layers))]
    for task in range(3):
        factors, metadata = checkpoint.read_tensors(tmp_path / "run" / "checkpoints" / f"factors-{task}.safetensors")
        for name in adapted:
            weight = rebuilt[f"{name}.weight"][32:]  # q is not adapted
            update = update_of(factors, name, float(metadata["scale"])).reshape(64, 32)
            weight.copy_((weight.double() + update).float())
    final = trainer.learner.model.state_dict()
    for name, tensor in rebuilt.items():
        layer, _, kind = name.rpartition(".")
        assert torch.equal(final[f"backbone.{layer}.linear.{kind}" if layer in adapted else f"backbone.{name}"], tensor)
        assert torch.equal(tensor, start[name]) == (layer not in adapted or kind != "weight")


@pytest.mark.parametrize("rectify", ["exact", "project"])
def test_gradients_are_clipped_as_they_were_rectified(patterns, weights, tmp_path, monkeypatch, rectify):
    """Of the factors A nothing lies in the protected subspace when they are clipped, and there they are clipped."""
    trainer = make_trainer(patterns, weights, tmp_path / "run", rectify=rectify, clip_norm=0.01)
    clip, within, norms = torch.nn.utils.clip_grad_norm_, [], []

    def clipping(parameters, largest):
        for layer in trainer.learner.method.layers.values():
            if layer.basis is not None and layer.A.grad.any():
                within.append(float((layer.A.grad @ layer.basis).norm() / layer.A.grad.norm()))
        clip(parameters, largest)
        norms.append(float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
    trainer.run()
    assert within and max(within) < 1e-5
    assert len(norms) == 18 and max(norms) < 0.0101


def update_of(factors: dict[str, Tensor], name: str, scale: float) -> Tensor:
    """s B A [2, m, n]; of BiLoRA s Re(IFFT2(F)), computed in its own dtype."""
    if f"{name}.B" in factors:
        return scale * factors[f"{name}.B"].double() @ factors[f"{name}.A"]
    places, coefficients = factors[f"{name}.positions"], factors[f"{name}.coefficients"]
    spectrum = coefficients.new_zeros(2, 32 * 32).index_copy(1, places, coefficients)
    return (scale * torch.fft.ifft2(spectrum.view(2, 32, 32)).real).double()


def test_class_names_stand_beside_the_ids_whatever_bytes_they_are(patterns, weights, tmp_path):
    names = ("caf\udce9", "\u00fc", "\U0001f600", "a b", "d", "e\n")  # the first: a folder's name that is not UTF-8
    results = make_trainer(replace(patterns, class_names=names), weights, tmp_path / "run").run()
    checkpoint.write_json(tmp_path / "results.json", results)
    assert checkpoint.read_json(tmp_path / "results.json")["class_names"] == list(names)
    for name, key, value in (
        ("model", "tasks", [[names[c] for c in task] for task in patterns.tasks]),
        ("factors-1", "classes", list(patterns.tasks[1])),
    ):
        _, about = checkpoint.read_tensors(tmp_path / "run" / "checkpoints" / f"{name}.safetensors")
        assert json.loads(about["class_names"]) == list(names) and json.loads(about[key]) == value


def test_the_saved_model_is_the_evaluated_one(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", head="linear")
    results = trainer.run()
    tensors, _ = checkpoint.read_tensors(tmp_path / "run" / "checkpoints" / "model.safetensors")
    fresh = make_trainer(patterns, weights, tmp_path / "other", head="linear")
    for classes in patterns.tasks:
        fresh.learner.model.add_task(len(classes))
    fresh.learner.model.load_state_dict(tensors)
    assert fresh._evaluate(2)["linear"][0] == results["accuracy_matrix"][-1]
    state, _ = checkpoint.read_tensors(tmp_path / "run" / "checkpoints" / "method-2.safetensors")
    fresh.learner.method.load_state_dict(state)
    measured = {head: rows[0] for head, rows in fresh._evaluate(2).items()}
    assert measured == {head: result["accuracy_matrix"][-1] for head, result in results["heads"].items()}
    assert measured.keys() == {"linear", "ncm", "lda", "ridge"}
    assert torch.equal(fresh.learner.method.prototypes.matrix, trainer.learner.method.prototypes.matrix)
    assert all(
        torch.equal(e.basis, trainer.learner.method.estimators[k].basis)
        for k, e in fresh.learner.method.estimators.items()
    )


def test_only_factors_and_the_newest_head_move(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", KeepingTrainer, method="lora")
    trainer.run()
    first, last = trainer.history[0], trainer.history[-1]
    moved = {key for key in first if not torch.equal(first[key], last[key])}
    assert moved and all(".attn.qkv." in key for key in moved)


def test_factors_and_head_have_their_own_learning_rates(patterns, weights, tmp_path):
    make_trainer(patterns, weights, tmp_path / "run", lr=1e-3, head_lr=4e-2, epochs=2).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["lr"], line["head_lr"]) for line in lines[:2]] == [
        pytest.approx(x) for x in ((1e-3, 4e-2), (5e-4, 2e-2))
    ]


def test_inputs_are_observed_in_the_last_epoch_only(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", epochs=4)
    rows = []

    class Counted(type(trainer.learner.method)):
        def close_task(self, task):
            rows.append({estimator.rows for estimator in self.estimators.values()})
            return super().close_task(task)

    trainer.learner.method.__class__ = Counted
    trainer.run()
    assert rows == [{16 * 5}] * 3  # 16 images of 4 patches and a class token; no evaluation, no other epoch


def test_prototypes_know_the_models_outputs(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run")
    trainer.run()
    assert trainer.learner.method.prototypes.classes == [0, 1, 2, 3, 4, 5]


def test_accuracy_counts_all_seen_classes(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", head="linear")
    trainer.run()
    logits = trainer.learner.model(patterns.test.images)
    right = logits.argmax(-1) == patterns.positions[patterns.test.labels]
    expected = [100 * float(right[rows].float().mean()) for rows in (images.rows for images in trainer.test_images)]
    assert logits.shape == (24, 6) and trainer.matrix[-1] == pytest.approx(expected)


@pytest.mark.parametrize("head", HEADS)
def test_why_images_are_missed_is_measured_beside_it(patterns, weights, tmp_path, head):
    trainer = make_trainer(patterns, weights, tmp_path / "run", head=head, epochs=1)
    results = trainer.run()
    names = ("accuracy_matrix", "accuracy_matrix_task_known", "task_recognition_matrix")
    assert all([len(row) for row in results[name]] == [1, 2, 3] for name in names)
    with torch.no_grad():
        scores = trainer.learner.method.scores(patterns.test.images)
    labels, winners = patterns.positions[patterns.test.labels], scores.argmax(-1)
    own = torch.stack([scores[i, y - y % 2 : y - y % 2 + 2].argmax() for i, y in enumerate(labels)])
    cases = zip(names, (winners == labels, own == labels % 2, winners // 2 == labels // 2), strict=True)
    for name, right in cases:
        assert results[name][-1] == pytest.approx(
            [100 * float(right[rows].float().mean()) for rows in (images.rows for images in trainer.test_images)]
        )
    assert results["acc_task_known"] == pytest.approx(sum(results["accuracy_matrix_task_known"][-1]) / 3)
    assert results["task_recognition"] == pytest.approx(sum(results["task_recognition_matrix"][-1]) / 3)
    assert results["task_recognition_matrix"][0] == [100.0]
    for right, known, recognised in zip(*(sum(results[name], []) for name in names), strict=True):
        assert right <= min(known, recognised)


# errors --------------------------------------------------------------------------------------------------------------
class Diverging(METHODS["lora"]):
    """The loss is NaN in task 2, epoch 3, step 2."""

    steps = 0

    def loss(self, images: Tensor, targets: Tensor) -> Step:
        self.steps += 1
        step = super().loss(images, targets)
        return Step(step.loss * float("nan"), step.correct) if self.steps == 6 + 4 + 2 else step


def test_a_loss_that_is_not_finite_is_named_by_task_epoch_and_step(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", method="lora")
    trainer.learner.method.__class__ = Diverging
    with pytest.raises(TrainingError, match="loss is nan in task 2, epoch 3, step 2"):
        trainer.run()
    assert checkpoint.read_tensors(tmp_path / "run" / "checkpoints" / "model.safetensors")[1]["task"] == "0"


def test_a_method_is_abstract_until_it_trains_and_closes(patterns):
    with pytest.raises(TypeError, match="abstract"):
        Method(None, None)


def test_a_task_without_images_is_refused(patterns, weights, tmp_path):
    rows = (patterns.test.labels != 3).nonzero().flatten()
    rows = rows[patterns.test.labels[rows] != 2]
    with pytest.raises(ArgumentError, match="task 2 has 16 training and 0 test images"):
        make_trainer(replace(patterns, test=patterns.test.take(rows)), weights, tmp_path / "run")
