"""The plain timm model of what was learned, with a classifier of its own, and that model from pixels to scores."""

from __future__ import annotations

import warnings
from copy import deepcopy

import torch
from torch import Tensor, nn

from janus_ext.adapter import Adapter
from janus_ext.backbone.files import first_line
from janus_ext.classifier import ContinualClassifier
from janus_ext.errors import ArgumentError
from janus_ext.exports.contents import Contents
from janus_ext.exports.folder import random_images
from janus_ext.heads.base import LOWEST, Decision
from janus_ext.heads.expansion import Expansion
from janus_ext.injection import uninject


class Classifier(nn.Module):
    """A head's decision as a module: features [b, d] -> scores [b, C], all of them finite."""

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.unit, self.expands = decision.unit, decision.expansion is not None
        tensors = {"weight": decision.weight, "bias": decision.bias.clamp_min(LOWEST)}
        for name, tensor in (tensors | (decision.expansion._asdict() if self.expands else {})).items():
            self.register_buffer(name, tensor.cpu().clone())

    def forward(self, features: Tensor) -> Tensor:
        expansion = Expansion(self.mean, self.root, self.projection) if self.expands else None
        return Decision(self.weight, self.bias, self.unit, expansion).scores(features)


class Scorer(nn.Module):
    """Pixels [b, 3, s, s] from 0 to 255, uint8 or float32 -> float32 [b, C]: softmax over the classes.

    Colours are normalised as they were in training; nothing is resized. The scores are those of
    `ContinualLearner.predict`: of ``model``'s outputs, or of what a head that is no linear classifier decides.
    """

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor, decision: Decision | None = None) -> None:
        super().__init__()
        self.model = model
        self.classifier = None if decision is None else Classifier(decision)
        for name, buffer in {"mean": mean, "std": std}.items():
            self.register_buffer(name, buffer.cpu().clone())

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.float() - self.mean) / self.std
        if self.classifier is None:
            return self.model(pixels).softmax(-1)
        features = self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)
        return self.classifier(features).softmax(-1)


def scorer(contents: Contents) -> Scorer:
    """`Scorer` of the plain model, on the CPU, in evaluation mode."""
    decision, model = contents.decision, contents.model
    if decision.is_linear:
        return Scorer(plain_model(model, *decision.rows()), model.mean, model.std).eval()
    return Scorer(merged_backbone(model), model.mean, model.std, decision).eval()


def program_of(module: Scorer, images: Tensor) -> torch.export.ExportedProgram:
    """What torch.export makes of it, for any number of images like these uint8 [b, 3, s, s].

    Raises:
        ArgumentError: the network has something that torch.export cannot follow.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        try:
            return torch.export.export(module, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
        except Exception as error:  # it fails in any way
            reason = first_line(error)
            raise ArgumentError(f"torch.export cannot follow this {type(module.model).__name__}: {reason}") from error


def merged_backbone(classifier: ContinualClassifier) -> nn.Module:
    """A copy of the backbone without adapters, see `uninject`; float32, on the CPU, in evaluation mode.

    Random numbers that others draw stay what they were.
    """
    with torch.random.fork_rng(devices=[]):
        copied = deepcopy(classifier.backbone).float().cpu()
        if any(getattr(module, "grad_checkpointing", False) for module in copied.modules()):  # it saved memory
            copied.set_grad_checkpointing(False)
        adapted = any(isinstance(module, Adapter) for module in copied.modules())  # not by every method from elsewhere
        return (uninject(copied) if adapted else copied).eval()


@torch.no_grad()
def plain_model(classifier: ContinualClassifier, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy of the backbone without adapters, whose own classifier has the rows ``weight`` [C, d] and ``bias`` [C].

    It takes normalised pixels and gives scores [b, C], float32.

    Raises:
        ArgumentError: the network has no linear classifier on its features, as timm's have.
    """
    model = merged_backbone(classifier)
    pixels = (random_images(classifier.input_size) - classifier.mean.cpu()) / classifier.std.cpu()
    features = model.forward_head(model.forward_features(pixels), pre_logits=True)
    weight, bias = weight.detach().float().cpu(), bias.detach().float().cpu()
    with torch.random.fork_rng(devices=[]):
        model.reset_classifier(len(weight))
    for layer in _classifiers(model):
        layer.weight.copy_(weight.view_as(layer.weight))
        layer.bias.copy_(bias)
    wanted = (features @ weight.T + bias).softmax(-1)
    if not torch.allclose(model.eval()(pixels).softmax(-1), wanted, atol=1e-4):
        raise ArgumentError(f"{type(model).__name__} has a classifier that is no linear map of its features")
    return model


def _classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """What `reset_classifier` made: one linear layer, or one for each of the tokens that distilled networks have."""
    found = model.get_classifier()
    layers = found if isinstance(found, tuple) else (found,)
    if not all(isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.bias is not None for layer in layers):
        kinds = ", ".join(type(layer).__name__ for layer in layers)
        raise ArgumentError(f"{type(model).__name__} must have a linear classifier with a bias, got {kinds}")
    return layers
