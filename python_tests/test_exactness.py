"""On a real run: the embedded images and backbone, several tasks, whole blocks, the trainer's own path.

docs/method.md, properties 2 and 3.
"""

from pathlib import Path

import pytest
import torch
from conftest import relative_error
from torch import Tensor

from janus_ext.backbone import load_backbone, prepare_torchvision
from janus_ext.config import TrainConfig
from janus_ext.runs.checkpoint import read_tensors
from janus_ext.train import train

prepare_torchvision()
pytestmark = pytest.mark.xdist_group("exactness")
TASKS = 3


@pytest.fixture(scope="module", params=["off", "bf16"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short run over all 200 concepts; Adam, clipping, autocast as asked."""
    folder = tmp_path_factory.mktemp("run") / request.param
    options = {"tasks": TASKS, "limit_per_class": 2, "epochs": 2, "clip_norm": 1.0, "plots": False}
    train(TrainConfig(amp=request.param, output=folder, **options))
    return folder


def factors(run: Path, task: int) -> dict[str, dict[str, Tensor]]:
    """Per layer A_s [g, r, n], B [g, m, r] and the basis V [n, k] in force during the task, float64."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(run / "checkpoints" / f"factors-{task}.safetensors")[0].items():
        layer, _, key = name.rpartition(".")
        layers.setdefault(layer, {})[key] = tensor.double()
    return layers


def test_every_update_leaves_the_protected_subspace_alone(run: Path) -> None:
    for task in range(1, TASKS):
        for name, layer in factors(run, task).items():
            update = layer["B"] @ layer["A"]
            assert layer["basis"].shape[1] > 0
            assert update.norm() > 0, f"{name} did not move in task {task}"
            assert (update @ layer["basis"]).norm() <= 1e-5 * update.norm(), name


def test_the_first_task_is_free_and_would_have_violated(run: Path) -> None:
    first, second = factors(run, 0), factors(run, 1)
    for name in first:
        assert first[name]["basis"].shape[1] == 0
        update, V = first[name]["B"] @ first[name]["A"], second[name]["basis"]
        assert (update @ V).norm() > 1e-2 * update.norm(), "the basis would protect nothing that training moves"


def test_the_model_is_the_backbone_plus_the_merged_updates_bit_for_bit(run: Path) -> None:
    model = read_tensors(run / "checkpoints" / "model.safetensors")[0]
    start = load_backbone().state_dict()
    updates = [factors(run, task) for task in range(TASKS)]
    for name in updates[0]:
        (key,) = [k for k in model if k.endswith(f"{name}.linear.weight")]
        weight = start[f"{name}.weight"]
        width = len(weight) // 3
        for task in range(TASKS):
            layer = updates[task][name]
            weight[width:] = (weight[width:].double() + (layer["B"] @ layer["A"]).flatten(0, 1)).to(weight.dtype)
        assert torch.equal(model[key], weight), name


def test_protected_inputs_keep_their_keys_and_values_to_the_end(run: Path) -> None:
    model = read_tensors(run / "checkpoints" / "model.safetensors")[0]
    start = load_backbone().state_dict()
    for name, layer in factors(run, 1).items():
        V, first = layer["basis"], factors(run, 0)[name]
        weight = start[f"{name}.weight"].double()
        width = weight.shape[0] // 3
        weight[width:] += (first["B"] @ first["A"]).flatten(0, 1)
        (key,) = [k for k in model if k.endswith(f"{name}.linear.weight")]
        assert relative_error(model[key].double() @ V, weight @ V) <= 1e-5
