"""Training end to end: the command, the run folder, repeatability, exactness, the ablation rows, and the errors."""

import importlib.metadata
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import (
    KeepingTrainer,
    assert_protected_inputs_are_left_alone,
    make_trainer,
    weights_of,
    without_time,
)
from torch import Tensor

from janus_ext import train
from janus_ext.assembly import make_learner
from janus_ext.config import TrainConfig
from janus_ext.data import emoji
from janus_ext.errors import ArgumentError, CheckpointError, TrainingError
from janus_ext.methods import METHODS
from janus_ext.methods.base import Method, Step
from janus_ext.reports import plots
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


# the command ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished_run(weights, tmp_path_factory) -> Path:
    """A run of the command on the embedded images: 4 tasks, one training image per class."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = f"--weights {weights} --tasks 4 --limit-per-class 1 --epochs 1 --batch-size 64 --output {folder}"
    flags += " --energy-start 0.9 --energy-end 0.97"  # the tiny backbone has room for these
    assert train.main(flags.split()) == 0
    return folder


def test_the_run_folder_is_complete(finished_run):
    expected = {"config.json", "metrics.jsonl", "results.json", "checkpoints", "plots", "log.txt"}
    assert {path.name for path in finished_run.iterdir()} == expected
    factors = {f"factors-{t}.safetensors" for t in range(4)}
    saved = {p.name for p in (finished_run / "checkpoints").iterdir()}
    assert saved == {"model.safetensors", "method-3.safetensors"} | factors
    assert {p.stem for p in (finished_run / "plots").iterdir()} == set(plots.PLOTS)
    assert len((finished_run / "metrics.jsonl").read_text().splitlines()) == 4
    assert "task 4/4" in (finished_run / "log.txt").read_text()


def test_the_results_file_has_every_promised_name_and_no_nan(finished_run):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in results.json")

    results = json.loads((finished_run / "results.json").read_text(), parse_constant=refuse)
    promised = """benchmark method seed class_order class_names split_sha256 accuracy_matrix acc maa bwt forgetting
        plasticity acc_sample_weighted maa_sample_weighted accuracy_matrix_task_known acc_task_known
        task_recognition_matrix task_recognition violation danger basis_rank seconds versions"""
    assert set(promised.split()) <= results.keys()
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3, 4]
    assert results["violation"][0] is None and all(v <= 1e-5 for v in results["violation"][1:])
    assert results["danger"][0] is None and all(0 < d <= 1 for d in results["danger"][1:])
    assert all(rank.keys() == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"} for rank in results["basis_rank"])
    assert sorted(results["class_order"]) == list(range(200)) and len(results["split_sha256"]) == 64
    assert results["versions"]["torch"] == importlib.metadata.version("torch")


def test_the_configuration_is_stored_resolved(finished_run):
    config = json.loads((finished_run / "config.json").read_text())
    results = json.loads((finished_run / "results.json").read_text())
    assert [config[key] for key in ("class_names", "split_sha256")] == [
        results[key] for key in ("class_names", "split_sha256")
    ]
    assert (config["rectify"], config["tasks"], config["epochs"], config["limit_per_class"]) == ("exact", 4, 1, 1)


def test_a_finished_run_is_not_overwritten(finished_run, capsys):
    before = (finished_run / "results.json").read_bytes()
    assert train.main(["--output", str(finished_run)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--output" in message and "finished" in message
    assert (finished_run / "results.json").read_bytes() == before


@pytest.mark.parametrize("flag", ["--output", "--weights"])
def test_names_too_long_for_the_file_system_are_one_line(flag, capsys):
    assert train.main([flag, "x" * 300]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and flag in message


def test_several_seeds_make_a_summary(weights, tmp_path, capsys):
    flags = f"--weights {weights} --method lora --tasks 2 --limit-per-class 1 --epochs 1 --batch-size 200 --no-plots"
    assert train.main([*flags.split(), "--seed", "3", "4", "--output", str(tmp_path / "many")]) == 0
    summary = json.loads((tmp_path / "many" / "summary.json").read_text())
    runs = [json.loads((tmp_path / "many" / f"seed-{s}" / "results.json").read_text()) for s in (3, 4)]
    assert summary["seeds"] == [3, 4] and summary["acc"]["values"] == [run["acc"] for run in runs]
    assert summary["acc"]["mean"] == pytest.approx(sum(run["acc"] for run in runs) / 2)
    assert not (tmp_path / "many" / "seed-3" / "plots").exists()
    assert "2 seeds" in capsys.readouterr().out


def test_several_seeds_go_on_where_they_were_cut_off(weights, tmp_path, capsys):
    flags = f"--weights {weights} --method lora --tasks 2 --limit-per-class 1 --epochs 1 --batch-size 200 --no-plots"
    call = [*flags.split(), "--seed", "3", "4", "--output", str(tmp_path / "many")]
    assert train.main(call) == 0
    whole = (tmp_path / "many" / "summary.json").read_bytes()
    first = (tmp_path / "many" / "seed-3" / "results.json").read_bytes()
    for lost in ("summary.json", "seed-4/results.json"):
        (tmp_path / "many" / lost).unlink()
    assert train.main([*call, "--lr", "0.5"]) == 2
    assert "seed-3 holds a run with other settings: --lr 0.0015 (asked: 0.5); choose" in capsys.readouterr().err
    assert train.main([*call, "--clip-norm", "1"]) == 2
    assert (
        "seed-3 holds a run with other settings: --clip-norm left out (asked: 1.0); choose" in capsys.readouterr().err
    )
    stored = tmp_path / "many" / "seed-3" / "config.json"
    stored.write_text(stored.read_text().replace('"clip_norm": null', '"clip_norm": 1.0'))
    assert train.main(call) == 2 and "--clip-norm 1.0 (asked: left out); choose" in capsys.readouterr().err
    stored.write_text(stored.read_text().replace('"clip_norm": 1.0', '"clip_norm": null'))
    assert train.main(call) == 0
    assert (tmp_path / "many" / "summary.json").read_bytes() == whole
    assert (tmp_path / "many" / "seed-3" / "results.json").read_bytes() == first
    assert train.main(call) == 2 and "holds a finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--rank", "0"], "--rank"),
        (["--weights", "nowhere.safetensors"], "--weights nowhere.safetensors"),
        (["--backbone", "vit_of_dreams"], "--backbone vit_of_dreams"),
        (["--backbone", "resnet18", "--weights", "none"], "--backbone resnet18"),
        (["--rank", "5000"], "rank must be from 1 to min(m, n) = 192, got 5000"),
        (["--tasks", "201"], "--tasks"),
        (["--device", "cuda:64"], "--device"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, part, tmp_path, capsys):
    assert train.main([*flags, "--output", str(tmp_path / "x")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("janus_ext.train: ") and message.count("\n") == 1 and part in message
    assert not (tmp_path / "x").exists()


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    words = set(re.findall(r"--[a-z-]+", text))
    assert {"--" + field.name.replace("_", "-") for field in fields(TrainConfig)} <= words


def test_importing_the_package_pulls_in_no_heavy_library():
    code = (
        "import sys, janus_ext; print(sorted({'timm', 'torchvision', 'PIL', 'matplotlib', 'tyro'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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


def test_the_factors_of_the_tasks_add_up_to_the_final_weights(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", scale=2.0)
    name = "blocks.1.attn.qkv"
    start = trainer.learner.model.state_dict()[f"backbone.{name}.linear.weight"].clone()
    trainer.run()
    update = torch.zeros(2, 32, 32, dtype=torch.float64)
    for task in range(3):
        factors, metadata = checkpoint.read_tensors(tmp_path / "run" / "checkpoints" / f"factors-{task}.safetensors")
        update += float(metadata["scale"]) * factors[f"{name}.B"].double() @ factors[f"{name}.A"].double()
    final = trainer.learner.model.state_dict()[f"backbone.{name}.linear.weight"]
    assert torch.equal(final[:32], start[:32])  # q is not adapted
    assert torch.allclose((final - start)[32:].double(), update.reshape(64, 32), atol=1e-6)


def test_class_names_stand_beside_the_ids_whatever_bytes_they_are(patterns, weights, tmp_path):
    names = ("caf\udce9", "\u00fc", "\U0001f600", "a b", "d", "e\n")  # the first: a folder's name that is not UTF-8
    results = make_trainer(replace(patterns, class_names=names), weights, tmp_path / "run").run()
    checkpoint.write_json(tmp_path / "results.json", results)
    assert checkpoint.read_json(tmp_path / "results.json")["class_names"] == list(names)
    for name in ("model", "factors-1"):
        _, about = checkpoint.read_tensors(tmp_path / "run" / "checkpoints" / f"{name}.safetensors")
        assert json.loads(about["class_names"]) == list(names)
    assert json.loads(about["tasks"]) == [[names[c] for c in task] for task in patterns.tasks[:2]]


def test_the_saved_model_is_the_evaluated_one(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run")
    results = trainer.run()
    tensors, _ = checkpoint.read_tensors(tmp_path / "run" / "checkpoints" / "model.safetensors")
    fresh = make_trainer(patterns, weights, tmp_path / "other")
    for classes in patterns.tasks:
        fresh.learner.model.add_task(len(classes))
    fresh.learner.model.load_state_dict(tensors)
    assert fresh._evaluate(2)[0] == results["accuracy_matrix"][-1]
    state, _ = checkpoint.read_tensors(tmp_path / "run" / "checkpoints" / "method-2.safetensors")
    fresh.learner.method.load_state_dict(state)
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
    trainer = make_trainer(patterns, weights, tmp_path / "run")
    trainer.run()
    logits = trainer.learner.model(patterns.test.images)
    right = logits.argmax(-1) == patterns.positions[patterns.test.labels]
    expected = [100 * float(right[rows].float().mean()) for rows in (images.rows for images in trainer.test_images)]
    assert logits.shape == (24, 6) and trainer.matrix[-1] == pytest.approx(expected)


@pytest.mark.parametrize("head", ["linear", "ncm"])
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


# files ---------------------------------------------------------------------------------------------------------------
def test_json_has_null_instead_of_nan(tmp_path):
    checkpoint.write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5, float("-inf")], "b": {"c": (1, None)}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5, None], "b": {"c": [1, None]}}


def test_json_has_a_list_of_numbers_on_one_line_or_on_full_ones(tmp_path):
    value = {
        "matrix": [[1.5], [2.0, None]],
        "ids": list(range(200)),
        "names": ["a [\n 1\n]", "caf\udce9", "[ 2 ]"],
        "nested": {"seed": [0], "none": [], "flags": [True, -1e-30]},
    }
    checkpoint.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="ascii")
    assert checkpoint.read_json(tmp_path / "x.json") == value
    for line in (
        "    [1.5],",
        "    [2.0, null]",
        '    "seed": [0],',
        '    "flags": [true, -1e-30]',
        "    0, 1, 2, 3, ",
    ):
        assert f"\n{line}" in text, line
    assert max(map(len, text.splitlines())) <= 120 and len(text.splitlines()) < 35


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"version": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match="x.json cannot be written: .*No space left"):
        checkpoint.write_json(path, {"version": 2})
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.write_tensors(tmp_path / "y.safetensors", {"t": torch.zeros(2)})
    assert json.loads(path.read_text()) == {"version": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_tensors_survive_a_round_trip_and_damage_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    shared = torch.arange(6.0)
    checkpoint.write_tensors(path, {"a": shared, "b": shared.view(2, 3).T, "empty": torch.zeros(4, 0)}, {"task": "3"})
    tensors, metadata = checkpoint.read_tensors(path)
    assert torch.equal(tensors["b"], shared.view(2, 3).T) and tensors["empty"].shape == (4, 0)
    assert metadata == {"task": "3", checkpoint.SHA256: metadata[checkpoint.SHA256]}
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="x.safetensors"):
        checkpoint.read_tensors(path)
    with pytest.raises(CheckpointError, match="nowhere"):
        checkpoint.read_tensors(tmp_path / "nowhere.safetensors")
