"""A model that goes on learning: made of a backbone and a method, as the trainer and `ContinualLearner` use it."""

from __future__ import annotations

import torch
from torch import nn

from janus_ext.backbone import load_backbone
from janus_ext.classifier import ContinualClassifier
from janus_ext.config import LearnConfig
from janus_ext.devices import AMP_DTYPES
from janus_ext.errors import ArgumentError
from janus_ext.methods import METHODS
from janus_ext.training.loop import Learner, derive_seed


def make_learner(config: LearnConfig, seed: int, planned: int, backbone: nn.Module | None = None) -> Learner:
    """The backbone (by default the configuration's), the model and the method, whose first factors follow the seed.

    ``config`` is resolved, its device and autocast chosen.

    Raises:
        ArgumentError: the method does not fit the backbone, whose name stands before the reason.
    """
    torch.manual_seed(derive_seed(seed, -1, -1, "backbone and first factors"))
    if backbone is None:
        backbone = load_backbone(config.backbone, config.weights, config.image_size)
    model = ContinualClassifier(backbone.to(config.device), AMP_DTYPES[config.amp], config.normalize)
    try:
        method = METHODS[config.method](model, config)
    except ArgumentError as error:
        raise ArgumentError(f"--backbone {config.backbone}: {error}") from error
    return Learner(config, model, method, seed, planned)
