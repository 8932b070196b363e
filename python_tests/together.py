"""Runs of several processes, and what makes them one with the run of a single process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import make_trainer, relative_error, subspace, weights_of, without_time
from torch import Tensor

from janus_ext.data.benchmark import Benchmark
from janus_ext.training.trainer import Trainer

Outcome = dict[str, Any]
Matrix = list[list[float]]


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return (images.int() + torch.randint(9, images.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def trainer_of(benchmark: Benchmark, weights: Path, folder: Path, **changes: Any) -> Trainer:
    """Batches of 5 of 16 images: of the last one there is an image for the first process alone."""
    train = benchmark.train.take(torch.arange(len(benchmark.train)))
    train.augmentation = noisy
    benchmark = replace(benchmark, train=train)
    if changes.get("method") == "joint":
        benchmark = replace(benchmark, tasks=(benchmark.class_order,))
    return make_trainer(benchmark, weights, folder, **{"batch_size": 5, "epochs": 2} | changes)


def outcome_of(trainer: Trainer) -> Outcome:
    results = without_time(trainer.run())
    method = {name: tensor.clone() for name, tensor in trainer.learner.method.state_dict().items()}
    return {"results": results, "weights": weights_of(trainer), "method": method}


def copied(folder: Path, other: Path) -> None:
    shutil.copytree(folder, other)


def matrices_of(results: dict[str, Any]) -> dict[str, Matrix]:
    """By name: accuracies of the run's own head, with the task known, and of all heads."""
    own = {name: results[name] for name in ("accuracy_matrix", "accuracy_matrix_task_known")}
    return own | {f"of {name}": head["accuracy_matrix"] for name, head in results["heads"].items()}


def assert_unsaturated(results: dict[str, Any]) -> None:
    """Every head is right and wrong now and then: no matrix is the same whatever the weights."""
    for name, matrix in matrices_of(results).items():
        assert any(0 < value < 100 for row in matrix for value in row), name


def assert_as_one(together: Outcome, alone: Outcome, rounding: float = 1e-3) -> None:
    """At most one test image a task and head apart; projectors to 1e-4, and weights as near as rounding leaves."""
    _assert_same_images(together["results"], alone["results"])
    for name, wanted in alone["method"].items():
        found = together["method"][name]
        if name.startswith("known.") and wanted.is_floating_point():
            assert relative_error(found, wanted) < 10 * rounding, name
        elif not wanted.is_floating_point():
            assert torch.equal(found, wanted), name
    for name, found, wanted in _bases(together, alone):  # whose signs are arbitrary
        assert found.shape == wanted.shape, name
        assert float((subspace(found) - subspace(wanted)).abs().max()) < rounding / 10, name
    for name, wanted in alone["weights"].items():
        if not name.endswith(".basis"):
            assert relative_error(together["weights"][name], wanted) < rounding, name


def _assert_same_images(together: dict[str, Any], alone: dict[str, Any]) -> None:
    found, wanted = matrices_of(together), matrices_of(alone)
    assert found.keys() == wanted.keys()
    for name, matrix in wanted.items():
        for one, other in zip(found[name], matrix, strict=True):
            for share, expected, images in zip(one, other, alone["test_sizes"], strict=False):
                assert abs(share - expected) <= 100 / images + 1e-9, name


def _bases(together: Outcome, alone: Outcome) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Those that the method keeps, and those that layers hold in the model."""
    for part in ("method", "weights"):
        for name, wanted in alone[part].items():
            if name.endswith(".basis"):
                yield f"{part} {name}", together[part][name], wanted


def assert_same(one: Outcome, other: Outcome) -> None:
    assert one["results"] == other["results"]
    for part in ("weights", "method"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(tensor, other[part][name]) for name, tensor in one[part].items())
