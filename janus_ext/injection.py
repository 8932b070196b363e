"""LoRA into every attention layer of a Vision Transformer, in one call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from janus_ext.adapter import Adapter
from janus_ext.arguments import naming
from janus_ext.backbone.families import attention_layers
from janus_ext.backbone.freezing import freeze, unfreeze
from janus_ext.backbone.places import Place, coverage, folded_qkv, places, replace, unfold_qkv
from janus_ext.errors import ArgumentError
from janus_ext.lora import LoRALayer, LoRALinear, LoRAQKV
from janus_ext.lora_arguments import check_linear, check_rank
from janus_ext.rectification import Rectification, rectification_of


class Injection(dict[str, LoRALayer]):
    """The layers that `inject` made, by the name of the module whose place they took, in the model's order.

    Attributes:
        targets: what was to be adapted.
        inputs: of every layer the one that stands for its input: the first of those that certainly get the same, such
            as separate projections to k and v. One estimator and one basis serve all of them.
        attention_layers: how many the model has; those whose projections are not known stay as they are.
        model_parameters: number of values in the model, adapters not counted.
    """

    def __init__(self, layers: dict[str, LoRALayer], model: nn.Module, found: dict[str, Place], targets: Sequence[str]):
        super().__init__(layers)
        self.targets = tuple(targets)
        first = {place.source: name for name, place in reversed(found.items())}
        self.inputs = {name: first[place.source] for name, place in found.items()}
        self.attention_layers = len(attention_layers(model))
        self.model_parameters = sum(p.numel() for p in model.parameters()) - self.parameters
        self._coverage = coverage(model, layers)

    @property
    def parameters(self) -> int:
        """Number of values in the factors."""
        return sum(factor.numel() for layer in self.values() for factor in (layer.A, layer.B))

    def summary(self) -> str:
        """In a line: what is adapted of how much, and which attention layers are not."""
        where, others = self._coverage
        layers = f"{', '.join(self.targets)} of {where}"
        return f"LoRA on {layers}, {self.parameters:,} parameters beside {self.model_parameters:,}{others}"


def inject(
    model: nn.Module,
    rank: int,
    targets: Sequence[str] = ("k", "v"),
    scale: float = 1.0,
    rectify: str | Rectification = "exact",
    rectify_in: str = "backward",
    **options: Any,
) -> Injection:
    """Put LoRA on linear maps of every block of a timm ViT, in place, and freeze everything else.

    Frozen normalisation with running statistics (BatchNorm) stays in evaluation mode from now on, whatever
    `model.train()` says: it would move the features of old classes (torch's conversion to SyncBatchNorm makes new
    modules: convert first). Dropout and stochastic depth stay as the model has them. A bias that the model keeps beside
    its qkv (BEiT, EVA-02, Swin V2) becomes the bias of the adapted layer.

    Args:
        model: has attention whose class is known: with an nn.Linear `qkv`, the rows of q, k and v on top of each other,
            or with separate ones. docs/backbones.md has the families of timm; `janus_ext.backbone.families` knows why.
        targets: distinct names of "q", "k", "v", "proj" (attention's output), "fc1" and "fc2" (the block's MLP). Of a
            fused qkv one `LoRAQKV` adapts q, k and v; each other map gets a `LoRALinear`.
        rank, scale, rectify, rectify_in, options: see `LoRALinear`.

    Returns:
        The layers by the name of the module they took the place of, e.g. "blocks.0.attn.qkv", in the model's order; a
        dictionary that also says how many attention layers of how many were adapted (`summary()`).

    Raises:
        ArgumentError: the model lacks a target, or has it in a class that is not known or of another layout, or has
            LoRA layers already; nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"inject: model must be an nn.Module, got {type(model).__name__}")
    how = rectification_of("inject", rectify, options)
    with naming("inject"):
        found = places(model, targets)
    before = [name for name, module in model.named_modules() if isinstance(module, Adapter)]
    if before:
        raise ArgumentError(f"inject: model must be a plain one, got an adapter at {before[0]}: uninject() comes first")
    for name, place in found.items():  # all of them, before the first is touched
        check_linear(f"inject: {name}", place.linear)
        check_rank("inject", place.linear, rank)
    made = {name: _adapter(place, rank, scale, how, rectify_in) for name, place in found.items()}
    freeze(model)
    for name, place in found.items():
        replace(place, made[name])
    return Injection(made, model, found, targets)


def _adapter(place: Place, rank: int, *settings: Any) -> LoRALayer:
    if place.is_fused:
        return LoRAQKV(folded_qkv(place.owner), rank, place.targets, *settings)
    return LoRALinear(place.linear, rank, *settings)


def uninject(model: nn.Module) -> nn.Module:
    """Merge every adapter of a model, and make it the plain one that it was before `inject`, in place.

    What is in the factors is added first (W + s B A_s, in float64, rounded once); then the plain nn.Linear takes its
    place again, and a bias that was folded into it goes back beside it. Modules, names of parameters and buffers, and
    their dtypes are those of the model that `inject` was given: its state loads into a fresh one. It can be trained as
    a whole: every parameter needs a gradient (whatever it did before `inject`), and frozen normalisation follows
    `train()` again. Layers that were put in place by hand (`LoRALinear`) are undone, too; bases are forgotten.

    Args:
        model: was given to `inject`, or holds such a model, or is a copy of one.

    Returns:
        The same model.

    Raises:
        ArgumentError: it has no adapter, or the weight of one is computed from others by now; nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"uninject: model must be an nn.Module, got {type(model).__name__}")
    adapted = [
        (owner, name, module)
        for owner in model.modules()
        for name, module in owner.named_children()
        if isinstance(module, Adapter)
    ]
    if not adapted:
        raise ArgumentError(f"uninject: model must hold LoRA layers, as inject makes them, got {type(model).__name__}")
    for _, name, adapter in adapted:  # all of them, before the first is touched
        check_linear(f"uninject: {name}", adapter.linear)
    dtype = _dtype_outside(model, [adapter for _, _, adapter in adapted])
    for owner, name, adapter in adapted:
        adapter.merge()
        setattr(owner, name, _in_the_dtype_of(owner, adapter, dtype))
        unfold_qkv(owner)
    unfreeze(model)
    return model


def _in_the_dtype_of(owner: nn.Module, adapter: Adapter, outside: torch.dtype | None) -> nn.Linear:
    """The adapter's plain map; master weights are rounded to the dtype of linear maps beside it, or else `outside`."""
    beside = (child.weight.dtype for child in owner.children() if isinstance(child, nn.Linear))
    dtype = next(beside, outside)
    return adapter.linear if dtype is None or not adapter.has_master else adapter.linear.to(dtype)


def _dtype_outside(model: nn.Module, adapters: Sequence[Adapter]) -> torch.dtype | None:
    """The dtype of the model's other parameters, to which master weights are rounded; None where it has none."""
    inside = {id(p) for adapter in adapters for p in adapter.parameters()}
    return next((p.dtype for p in model.parameters() if id(p) not in inside), None)
