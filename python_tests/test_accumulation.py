"""--accumulate: a batch computed in pieces gives the step of the whole batch."""
# ruff: noqa: F811 - the fixture that is imported and asked for

from typing import Any

import pytest
import torch
from conftest import relative_error
from test_trainer import benchmark, make_trainer  # noqa: F401
from torch import Tensor

from janus_ext.backbone import ContinualClassifier
from janus_ext.methods.base import Task, TaskReport

METHODS = {
    "lora": {"method": "lora"},
    "all parts, exact": {"rectify": "exact"},
    "all parts, tangent": {"rectify": "tangent"},
    "lora-gpm": {"method": "lora-gpm"},
}


@pytest.fixture(autouse=True)
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """All in float64, so that the only difference, rounding, stays far below what an error would make."""
    add_task = ContinualClassifier.add_task
    monkeypatch.setattr(ContinualClassifier, "add_task", lambda self, classes: add_task(self, classes).double())
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def learned(benchmark, weights, folder, **changes: Any) -> dict[str, Tensor]:
    """Weights after two tasks of 16 images in batches of 7, 7 and 2, and what the estimators saw in each."""
    with torch.device("cpu"):
        torch.set_default_dtype(torch.float64)
        try:
            trainer = make_trainer(benchmark, weights, folder, batch_size=7, epochs=2, optimizer="sgd", **changes)
            seen = {}
            close = trainer.method.close_task

            def close_task(task: Task) -> TaskReport:
                for name, estimator in getattr(trainer.method, "estimators", {}).items():
                    seen[f"{task.index}.{name}.rows"] = torch.tensor(estimator.rows)
                    seen[f"{task.index}.{name}.gram"] = estimator.statistics.gram.clone()
                return close(task)

            trainer.method.close_task = close_task
            results = trainer.run()
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(value.dtype != torch.float32 for value in trainer.model.state_dict().values())
    return trainer.model.state_dict() | seen


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_pieces_gives_the_same_weights(benchmark, weights, tmp_path, method):
    whole = learned(benchmark, weights, tmp_path / "1", **METHODS[method])
    for pieces in (2, 3, 7, 50):
        got = learned(benchmark, weights, tmp_path / str(pieces), accumulate=pieces, **METHODS[method])
        for key, want in whole.items():
            assert relative_error(got[key], want) < 1e-9, (key, pieces)
