"""--compile: the same run, from graphs that are made in the first task, under the same names."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import KeepingTrainer, assert_close, make_trainer, needs_inductor, without_time
from torch._dynamo.testing import CompileCounterWithBackend

from janus_ext import inject
from janus_ext.backbone import load_backbone
from janus_ext.classifier import ContinualClassifier
from janus_ext.errors import TrainingError
from janus_ext.runs.checkpoint import read_tensors

METHODS: dict[str, dict[str, Any]] = {
    "janus": {},
    "bf16": {"amp": "bf16"},
    "tangent": {"rectify": "tangent"},
    "pieces": {"accumulate": 2},
    "lora": {"method": "lora"},
    "lora-gpm": {"method": "lora-gpm"},
    "inflora": {"method": "inflora"},
    "lora-drs": {"method": "lora-drs"},
    "bilora": {"method": "bilora", "frequencies": 20},
}


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting(KeepingTrainer):
    """Notes the number of graphs after each task."""

    counter: CompileCounterWithBackend

    def _save(self, index: int) -> None:
        super()._save(index)
        self.graphs = [*getattr(self, "graphs", []), self.counter.frame_count]


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_run_is_the_same_run(patterns, weights, tmp_path, monkeypatch, method):
    """Batches of 5, 5, 5 and 1 images: sizes that a graph could be made for each."""
    settings = {"optimizer": "sgd", "batch_size": 5} | METHODS[method]
    eager = make_trainer(patterns, weights, tmp_path / "eager", **settings)
    want = without_time(eager.run())
    Counting.counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=Counting.counter))
    trainer = make_trainer(patterns, weights, tmp_path / "compiled", Counting, compile=True, **settings)
    got = without_time(trainer.run())
    assert got["accuracy_matrix"] == want["accuracy_matrix"] and got["basis_rank"] == want["basis_rank"]
    found, expected = (
        read_tensors(tmp_path / run / "checkpoints" / "model.safetensors")[0] for run in ("compiled", "eager")
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value, torch.bfloat16 if method == "bf16" else torch.float32)
    first = 1 if method == "lora-drs" else 0  # which has no old updates to subtract in its first task
    assert len(set(trainer.graphs[first:])) == 1 and trainer.graphs[-1] <= torch._dynamo.config.recompile_limit


@pytest.mark.cuda
@needs_inductor
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
def test_a_gpu_graph_gives_the_features_of_every_image(amp):
    """Of every pass: a wrong one was wrong for a few images, other ones each time."""
    torch.manual_seed(0)
    model = ContinualClassifier(load_backbone("emoji").cuda(), amp)
    inject(model.backbone, 4)
    model.train()
    images = torch.randint(256, (96, 3, 64, 64), dtype=torch.uint8, device="cuda")
    want, plain = model.features(images).detach(), model.features(images[:5]).detach()
    model.compile_backbone()
    for _ in range(8):
        for batch, features in ((images, want), (images[:5], plain)):
            got = model.features(batch)
            got.sum().backward()
            errors = (got - features).norm(dim=1) / features.norm(dim=1)
            assert errors.max() < (5e-2 if amp else 1e-4), errors


def test_passes_without_gradients_make_no_graph(monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    model = ContinualClassifier(load_backbone("emoji"))
    inject(model.backbone, 4)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    want = model.features(images).detach()
    model.compile_backbone()
    with torch.no_grad():
        assert torch.equal(model.features(images), want) and counter.frame_count == 0
    assert_close(model.features(images), want, torch.float32)
    assert counter.frame_count == 1


@needs_inductor
def test_inductor_trains(patterns, weights, tmp_path):
    runs = []
    for compile in (False, True):
        changes = {"optimizer": "sgd", "compile": compile, "epochs": 1}
        trainer = make_trainer(patterns, weights, tmp_path / str(compile), **changes)
        runs.append((trainer.run()["accuracy_matrix"], trainer.learner.model.state_dict()))
    assert runs[0][0] == runs[1][0] and runs[0][1].keys() == runs[1][1].keys()
    for key, want in runs[0][1].items():
        assert_close(runs[1][1][key], want, torch.float32, 10)


def test_a_missing_compiler_is_one_line(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", compile=True)
    nothing_cached = {"cpp.cxx": (None, "/nowhere/g++"), "fx_graph_cache": False}
    with torch._inductor.config.patch(nothing_cached), pytest.raises(TrainingError, match="--compile .*compiler") as e:
        trainer.run()
    assert "\n" not in str(e.value)
