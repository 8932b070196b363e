"""--accumulate: a batch computed in pieces gives the step of the whole batch.

docs/method.md, property 4.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_trainer, relative_error
from torch import Tensor

from janus_ext import OnlineEstimator
from janus_ext.data.benchmark import Benchmark
from janus_ext.methods import lora
from janus_ext.methods.base import Step, Task
from janus_ext.training.loop import Learner

METHODS = {
    "lora": {"method": "lora"},
    "lora-gpm": {"method": "lora-gpm"},
    "all parts, exact": {"rectify": "exact"},
    "all parts, tangent": {"rectify": "tangent"},
}


@pytest.fixture
def _float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything in float64: what differs is rounding, far below anything that a mistake would do."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(lora, "OnlineEstimator", partial(OnlineEstimator, dtype=torch.float64))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Watched(Learner):
    """Keeps what was observed in each task, and the loss and count of every step."""

    def _train_epoch(self, task: Task, epoch: int, *rest: Any) -> dict[str, Any]:
        record = super()._train_epoch(task, epoch, *rest)
        for name, estimator in getattr(self.method, "estimators", {}).items():
            self.seen[f"{task.index}.{name}"] = estimator.statistics.gram.clone()
            self.seen[f"{task.index}.{name}.rows"] = torch.tensor(estimator.rows)
        return record

    def _step(self, *args: Any) -> Step:
        step = super()._step(*args)
        self.seen[f"step {len(self.seen)}"] = torch.stack([step.loss, step.correct.to(step.loss)])
        return step


def learned(benchmark: Benchmark, weights: Path, folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Weights after three tasks of 16 images in batches of 7, 7 and 2, and all that was seen on the way."""
    trainer = make_trainer(benchmark, weights, folder, Watched, batch_size=7, epochs=2, optimizer="sgd", **changes)
    seen = trainer.learner.seen = {}
    trainer.run()
    assert sum(key.startswith("step") for key in seen) == 3 * 2 * 3
    return trainer.learner.model.state_dict() | seen


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_pieces_gives_the_same_weights(patterns, weights, tmp_path, method, _float64):
    whole = learned(patterns, weights, tmp_path / "1", **METHODS[method])
    assert all(value.dtype in (torch.float64, torch.int64) for value in whole.values())
    for pieces in (2, 3, 7, 50):
        got = learned(patterns, weights, tmp_path / str(pieces), accumulate=pieces, **METHODS[method])
        assert got.keys() == whole.keys()
        for key, want in whole.items():
            assert relative_error(got[key], want) < 1e-9, (key, pieces)


@pytest.mark.parametrize(("batch", "pieces", "sizes"), [(8, 3, [3, 3, 2]), (8, 2, [4, 4]), (20, 3, [7, 7, 2])])
def test_pieces_are_no_larger_than_the_batch_size_allows(patterns, weights, tmp_path, batch, pieces, sizes):
    trainer = make_trainer(patterns, weights, tmp_path / "run", batch_size=batch, accumulate=pieces, method="lora")
    seen, loss = [], trainer.learner.method.loss
    trainer.learner.method.loss = lambda images, targets: (seen.append(len(images)), loss(images, targets))[1]
    trainer.run()
    assert seen[: len(sizes)] == sizes


def test_float16_takes_pieces_too(patterns, weights, tmp_path):
    results = make_trainer(patterns, weights, tmp_path / "run", amp="fp16", accumulate=3, clip_norm=1.0).run()
    assert all(v <= 1e-5 for v in results["violation"][1:])
