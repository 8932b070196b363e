"""The configuration: resolved defaults, and refusals that name the flag."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from janus_ext import ops
from janus_ext.backbone.places import TARGETS
from janus_ext.config import BenchmarkName, HeadName, MethodName, TrainConfig, foreign, parts
from janus_ext.data import BENCHMARKS
from janus_ext.devices import AMP_DTYPES, pick_amp, pick_device
from janus_ext.errors import ArgumentError
from janus_ext.heads import HEADS
from janus_ext.methods import METHODS
from janus_ext.runs.checkpoint import read_json, write_json
from janus_ext.runs.settings import settings_of
from janus_ext.training.optimization import schedule


def test_a_method_fills_in_its_own_defaults():
    janus = TrainConfig().resolved()
    assert (janus.rectify, janus.estimator) == ("exact", "gram") and janus.margin_weight > 0
    lora = TrainConfig(method="lora").resolved()
    assert (lora.rectify, lora.estimator, lora.margin_weight) == ("none", "none", 0.0)


def test_the_trainer_and_the_ops_share_their_defaults():
    assert (TrainConfig().damping, TrainConfig().share) == (ops.DAMPING, ops.SHARE)


def test_what_the_user_says_wins():
    config = TrainConfig(rectify="none", margin_weight=0.0).resolved()
    assert (config.rectify, config.estimator, config.margin_weight) == ("none", "gram", 0.0)


def test_choices_and_registries_agree():
    assert get_args(parts.Target) == TARGETS and TrainConfig().targets == ("k", "v")
    assert set(get_args(MethodName)) == set(METHODS)
    assert set(get_args(HeadName)) == set(HEADS)
    assert set(get_args(BenchmarkName)) == set(BENCHMARKS)


def test_the_resolved_configuration_is_json():
    config = TrainConfig(output=Path("runs/x"), seed=(1, 2)).resolved()
    stored = json.loads(json.dumps(config.to_json(), allow_nan=False))
    assert stored["output"] == "runs/x" and stored["seed"] == [1, 2]
    assert stored.keys() == {field.name for field in dataclasses.fields(TrainConfig)}


def test_the_configuration_of_paths_in_a_list_is_json(tmp_path, patterns):
    files = ("a.yaml", "sub/b.yaml")
    config = TrainConfig(benchmark="imagenet-r", data_dir="x", split="coda", split_files=files).resolved()
    write_json(tmp_path / "config.json", settings_of(config, patterns, None))
    assert read_json(tmp_path / "config.json")["split_files"] == list(files)


def test_every_field_is_explained_to_the_user():
    import inspect

    source = inspect.getsource(parts)
    for field in (field for part in foreign.PARTS for field in dataclasses.fields(part)):
        assert re.search(rf'\n    {field.name}: .*\n    """[^\n]+\."""\n', source), field.name


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"rank": 0}, "--rank"),
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": 0}, "--batch-size"),
        ({"accumulate": 0}, "--accumulate"),
        ({"tasks": 0}, "--tasks"),
        ({"limit_per_class": 0}, "--limit-per-class"),
        ({"validation": 0.0}, "--validation must lie between 0 and 1, got 0"),
        ({"validation": 1.0}, "--validation must lie between 0 and 1, got 1"),
        ({"validation": float("nan")}, "--validation"),
        ({"lr": 0.0}, "--lr"),
        ({"lr": float("nan")}, "--lr"),
        ({"head_lr": -1.0}, "--head-lr"),
        ({"damping": 0.0}, "--damping"),
        ({"share": 1.5}, "--share"),
        ({"energy_start": -0.1}, "--energy-start"),
        ({"energy_end": 1.1}, "--energy-end"),
        ({"energy_start": 0.9, "energy_end": 0.5}, "--energy-end"),
        ({"margin": 2.0}, "--margin"),
        ({"temperature": 0.0}, "--temperature"),
        ({"margin_weight": -1.0}, "--margin-weight"),
        ({"clip_norm": 0.0}, "--clip-norm"),
        ({"head_width": 100, "head": "ncm"}, "--head-width belongs to --head lda or ridge, got --head ncm"),
        ({"head_width": 0, "head": "ridge"}, "--head-width"),
        ({"head_width": 9, "head": "ridge", "drift": "ridge"}, "--drift moves statistics of features"),
        ({"merge_scale": 1.1}, "--merge-scale"),
        ({"drift_budget": -0.1}, "--drift-budget"),
        ({"learn": "none", "merge_scale": 0.5}, "--merge-scale would do nothing here: it needs a backbone that learns"),
        ({"learn": "none", "drift_budget": 0.5}, "--drift-budget would do nothing here"),
        ({"method": "joint", "drift": "ridge"}, "--drift would do nothing here"),
        ({"tasks": 1, "drift": "ridge"}, "--drift would do nothing here"),
        ({"learn": "none", "lr": 0.5}, "--lr would do nothing here: it needs a backbone that learns"),
        ({"learn": "none", "rank": 4}, "--rank would do nothing here: it needs a backbone that learns"),
        ({"learn": "first", "margin_weight": 0.9}, "--margin-weight would do nothing here: it needs a backbone that"),
        ({"learn": "first", "margin": 0.3}, "--margin would do nothing here: it needs a backbone that learns in"),
        ({"tasks": 1, "temperature": 0.3}, "--temperature would do nothing here: it needs a backbone that learns in"),
        ({"learn": "none", "head": "lda", "epochs": 3}, "--epochs would do nothing here: it needs --head linear or"),
        (
            {"learn": "first", "drift": "ridge"},
            "--drift would do nothing here: it needs a backbone that learns in several tasks: --learn all",
        ),
        ({"seed": ()}, "--seed"),
        ({"seed": (3, 3)}, "--seed"),
        ({"rectify": "project", "estimator": "none"}, "--rectify project"),
        ({"estimator_rank": 8}, "--estimator-rank belongs to --estimator isvd, got --estimator gram"),
        (
            {"estimator": "isvd", "energy_power": 2},
            "--energy-power 2 (InfLoRA's, in all presets but emoji's) needs the Gram matrix",
        ),
        ({"targets": ()}, "--targets must be one or more different names, got none"),
        ({"targets": ("k", "fc1", "k")}, "--targets must be one or more different names, got k fc1 k"),
        ({"targets": ("k", "mlp")}, "--targets must be a list, each item one of q, k, v, proj, fc1, fc2, got "),
        ({"method": "bilora", "targets": ("q", "v")}, "bilora learns frequencies of k and v alone, got --targets q v"),
        ({"learn": "none", "targets": ("q",)}, "--targets would do nothing here: it needs a backbone that learns"),
        ({"compile": True, "estimator": "isvd"}, "--compile makes a graph for every batch size"),
        ({"method": "lora", "rectify": "exact"}, "--rectify"),
        ({"method": "lora", "margin_weight": 0.5}, "--margin-weight"),
        ({"method": "inflora", "rectify": "exact"}, "--rectify exact; it takes none"),
        ({"method": "inflora", "estimator": "isvd"}, "--"),
        ({"method": "joint", "tasks": 10}, "--tasks 10; it takes 1"),
        ({"margin": 1.5}, "--margin is a cosine"),
        ({"method": "bilora", "frequencies": 0}, "--frequencies"),
        ({"gpm": "plain"}, "--gpm would do nothing here: it needs --method inflora"),
        ({"schedule": "step"}, "--milestones"),
        ({"milestones": (4,)}, "--milestones"),
        ({"schedule": "step", "milestones": (0, 4)}, "--milestones must be at least 1, got [0, 4]"),
        ({"method": "bilora", "rank": 4}, "--rank would do nothing here: it needs LoRA factors"),
        ({"frequencies": 100}, "--frequencies would do nothing here: it needs --method bilora"),
        ({"method": "lora", "energy_end": 0.995}, "--energy-end would do nothing here: it needs a method"),
        ({"estimator": "none", "energy_start": 0.5}, "--energy-start would do nothing here"),
        ({"method": "joint", "energy_power": 2}, "--energy-power would do nothing here"),
        ({"method": "lora-gpm", "damping": 1.0}, "--damping would do nothing here: it needs --rectify"),
        ({"method": "inflora", "share": 0.0}, "--share would do nothing here"),
        ({"rectify": "none", "balance": False}, "--balance would do nothing here"),
        ({"method": "lora", "margin": 0.5}, "--margin would do nothing here: it needs --method janus or lora-drs"),
        ({"margin_weight": 0.0, "margin": 0.5}, "--margin would do nothing here"),
        ({"method": "lora-drs", "temperature": 8.0}, "--temperature would do nothing here: it needs --method janus"),
        ({"schedule": "step", "milestones": (4, 12)}, "--milestones would do nothing here: it needs epochs"),
        ({"workers": 2}, "--benchmark emoji has no --workers"),
        ({"cache_images": True, "benchmark": "cifar100"}, "--benchmark cifar100 has no --cache-images"),
        (
            {"task_list": "tasks.txt", "shuffle_classes": True},
            "--task-list fixes the order of the classes, --shuffle-classes draws it: leave one out",
        ),
        ({"preset": "paper"}, "--preset paper is a published protocol, and --benchmark emoji has none"),
    ],
)
def test_a_refusal_names_the_flag(change, flag):
    with pytest.raises(ArgumentError, match=re.escape(flag)):
        TrainConfig(**change).resolved()


@pytest.mark.parametrize(
    ("name", "published"),
    [  # the table of the published protocol: InfLoRA's line
        ("cifar100", ("adam", 5e-4, 5e-4, "quarter", 20, 10, 0.95)),
        ("imagenet-r", ("adam", 5e-4, 5e-4, "quarter", 50, 10, 0.98)),
        ("domainnet", ("sgd", 5e-3, 1e-2, "step", 5, 30, 0.95)),
    ],
)
def test_the_paper_preset_is_the_published_protocol(name, published):
    c = TrainConfig(preset="paper", benchmark=name).resolved()
    assert (c.optimizer, c.lr, c.head_lr, c.schedule, c.epochs, c.rank, c.energy_start) == published
    assert (c.batch_size, c.energy_end, c.seed, c.normalize) == (128, 1.0, (0, 1, 2, 3, 4), "identity")
    assert (c.head, c.drift, c.drift_budget) == ("linear", "none", None)
    assert TrainConfig(benchmark=name).resolved().head == "lda"
    assert c.head_init == "default" and TrainConfig(benchmark=name).resolved().head_init == "small"
    assert (c.backbone, c.scale) == ("vit_base_patch16_224.augreg_in21k", 1.0)
    assert (c.milestones or ()) == ((4,) if name == "domainnet" else ())


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize(("field", "value"), [("epochs", 12), ("lr", 1.6e-2), ("seed", (0,)), ("normalize", "model")])
def test_what_the_user_types_wins_over_a_preset_even_where_it_is_another_presets_value(preset, field, value):
    config = TrainConfig(preset=preset, benchmark="cifar100", **{field: value}).resolved()
    assert getattr(config, field) == value


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("method", get_args(MethodName))
def test_what_a_preset_says_is_never_refused(method, preset):
    config = TrainConfig(method=method, preset=preset, benchmark="domainnet", epochs=1).resolved()
    assert config.resolved() == config  # nor in a configuration that is resolved already
    assert "milestones" in config.without_effect() and ("rank" in config.without_effect()) == (method == "bilora")


@pytest.mark.parametrize(
    ("asked", "budget"),
    [
        ({}, 0.1),
        ({"head": "linear"}, None),
        ({"head": "ncm"}, 0.1),
        ({"method": "lora-drs"}, 0.1),
        ({"head": "lda"}, 0.1),
        ({"head": "aligned", "method": "lora"}, 0.1),
        ({"head": "ridge", "drift_budget": 1e9}, 1e9),
        ({"head": "lda", "benchmark": "imagenet-r", "preset": "paper"}, None),
        ({"benchmark": "imagenet-r", "preset": "paper"}, None),
    ],
)
def test_fitted_heads_have_a_guard_that_no_paper_has(asked, budget):
    assert TrainConfig(**asked).resolved().drift_budget == budget


@pytest.mark.parametrize(
    ("asked", "rate", "energies"),
    [
        ({}, 4e-3, (0.999, 0.9999)),
        ({"head": "ridge", "benchmark": "folder", "backbone": "emoji"}, 4e-3, (0.999, 0.9999)),
        ({"lr": 1e-2, "energy_end": 1.0}, 1e-2, (0.999, 1.0)),
        ({"head": "linear"}, 1.6e-2, (0.97, 0.99)),
        ({"head": "ncm"}, 4e-3, (0.999, 0.9999)),
        ({"benchmark": "cifar100"}, 5e-4, (0.95, 1.0)),
    ],
)
def test_behind_the_embedded_backbone_fitted_heads_have_a_gentle_rate(asked, rate, energies):
    config = TrainConfig(**asked).resolved()
    assert (config.lr, (config.energy_start, config.energy_end)) == (rate, energies)


def test_the_embedded_backbone_has_its_own_values_where_no_protocol_is_published():
    emoji, cifar = TrainConfig().resolved(), TrainConfig(benchmark="cifar100").resolved()
    folder = TrainConfig(benchmark="folder", backbone="emoji").resolved()
    for name in ("lr", "epochs", "energy_start", "energy_power", "schedule", "rank"):
        assert getattr(folder, name) == getattr(emoji, name)
        assert getattr(TrainConfig(benchmark="cifar100", backbone="emoji").resolved(), name) == getattr(cifar, name)


def test_another_schedule_leaves_the_presets_milestones():
    config = TrainConfig(preset="paper", benchmark="domainnet", schedule="cosine").resolved()
    assert config.schedule == "cosine" and not config.milestones


@pytest.mark.parametrize("method", get_args(MethodName))
@pytest.mark.parametrize("name", get_args(BenchmarkName))
def test_every_method_has_values_on_every_benchmark(method, name):
    config = TrainConfig(method=method, benchmark=name).resolved()
    left_open = {field.name for field in dataclasses.fields(config) if getattr(config, field.name) in (None, "auto")}
    by_benchmark = {
        "own",
        "head_width",
        "drift_budget",
        "data_dir",
        "split",
        "tasks",
        "task_list",
        "class_list",
        "workers",
        "image_size",
    }
    assert left_open <= by_benchmark | {"estimator_rank", "limit_per_class", "milestones", "clip_norm", "device"} | {
        "validation",
        "amp",
        "output",
    }


def test_learning_rate_schedules():
    cosine = TrainConfig(epochs=4).resolved()
    assert [schedule(cosine, e) for e in range(4)] == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])
    quarter = TrainConfig(epochs=4, schedule="quarter").resolved()
    assert [schedule(quarter, e) for e in range(4)] == pytest.approx([1.0, 1.0, 0.8686315, 0.5090414])
    assert schedule(TrainConfig(epochs=1, schedule="quarter").resolved(), 0) == 1.0
    assert schedule(TrainConfig(epochs=4, schedule="constant").resolved(), 3) == 1.0
    step = TrainConfig(epochs=5, schedule="step", milestones=(2, 4)).resolved()
    assert [schedule(step, e) for e in range(5)] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])


class CosineSchedule:
    """What the public code of CODA-Prompt does with its class of this name, whose counter starts at -1."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.step(0)
        self.last_epoch = -1

    def step(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self.share = math.cos(99 * math.pi * self.last_epoch / (200 * (self.epochs - 1)))


@pytest.mark.parametrize("epochs", [2, 3, 20, 50])
def test_the_quarter_of_a_cosine_is_what_the_published_code_runs(epochs):
    config, theirs = TrainConfig(epochs=epochs, schedule="quarter").resolved(), CosineSchedule(epochs)
    for epoch in range(epochs):
        if epoch:  # as InfLoRA's loop does: behind every epoch
            theirs.step()
        assert schedule(config, epoch) == theirs.share


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu9", "cuda:99", "meta"):
        with pytest.raises(ArgumentError, match="--device"):
            pick_device(name)


def test_autocast_is_chosen_by_the_hardware_unless_said():
    cpu = torch.device("cpu")
    assert [pick_amp(name, cpu) for name in AMP_DTYPES] == ["off", "bf16", "fp16"]
    assert pick_amp("auto", cpu) in ("off", "bf16")
