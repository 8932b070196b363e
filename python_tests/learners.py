"""Small learners of the tiny backbone, and what makes two of them the same."""

from pathlib import Path

import torch
import trees
from torch import Tensor

from janus_ext import ContinualLearner

SETTINGS = {"rank": 4, "epochs": 2, "batch_size": 8, "lr": 1e-2, "energy_start": 0.6, "energy_end": 0.6, "workers": 0}
SETTINGS |= {"amp": "off", "device": "cpu", "energy_power": 1}


def learner_of(weights: Path, **changes) -> ContinualLearner:
    return ContinualLearner("emoji", weights=str(weights), **(SETTINGS | changes))


FIRST, SECOND, THIRD = ([trees.wnid(c) for c in pair] for pair in ((0, 1), (2, 3), (4, 5)))


def state_of(learner: ContinualLearner) -> dict[str, Tensor]:
    """Copies of all tensors that make the learner what it is."""
    model, method = learner._core.state()
    return {name: tensor.clone() for name, tensor in (model | {f"method.{k}": v for k, v in method.items()}).items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def squares(size: int, **view):
    """uint8 [3, size, size] of a file, as `folder` prepares images for evaluation."""
    from janus_ext.data.images import View, read_image, transform

    return lambda path: transform(View(size, **view), False)(read_image(path)).numpy()
