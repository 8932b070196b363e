"""LoRA into every attention layer of a Vision Transformer, in one call."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from janus_ext.adapter import Adapter
from janus_ext.backbone.families import (
    attention_layers,
    folded_qkv,
    freeze,
    fused_attention,
    left_out,
    replace_qkv,
    unfold_qkv,
    unfreeze,
)
from janus_ext.errors import ArgumentError
from janus_ext.lora import LoRAQKV
from janus_ext.lora_arguments import check_linear, check_rank
from janus_ext.rectification import Rectification


class Injection(dict[str, LoRAQKV]):
    """The layers that `inject` made, by the name of the module whose place they took, in the model's order.

    Attributes:
        targets: what they adapt of each attention layer.
        attention_layers: how many the model has; those without a fused `qkv` stay as they are.
        model_parameters: number of values in the model, adapters not counted.
    """

    def __init__(self, layers: dict[str, LoRAQKV], model: nn.Module, targets: Sequence[str]) -> None:
        super().__init__(layers)
        self.targets = tuple(targets)
        self.attention_layers = len(attention_layers(model))
        self.model_parameters = sum(p.numel() for p in model.parameters()) - self.parameters
        self._left_out = left_out(model, layers)

    @property
    def parameters(self) -> int:
        """Number of values in the factors."""
        return sum(factor.numel() for layer in self.values() for factor in (layer.A, layer.B))

    def summary(self) -> str:
        """In a line: what is adapted of how much, and which attention layers are not."""
        layers = f"{', '.join(self.targets)} of {len(self)} of {self.attention_layers} attention layers"
        return f"LoRA on {layers}, {self.parameters:,} parameters beside {self.model_parameters:,}{self._left_out}"


def inject(
    model: nn.Module,
    rank: int,
    targets: Sequence[str] = ("k", "v"),
    scale: float = 1.0,
    rectify: str | Rectification = "exact",
    rectify_in: str = "backward",
    **options: Any,
) -> Injection:
    """Put LoRA on the fused qkv of every attention layer of a timm ViT, in place, and freeze everything else.

    Frozen normalisation with running statistics (BatchNorm) stays in evaluation mode from now on, whatever
    `model.train()` says: it would move the features of old classes (torch's conversion to SyncBatchNorm makes new
    modules: convert first). Dropout and stochastic depth stay as the model has them. A bias that the model keeps beside
    its qkv (BEiT, EVA-02, Swin V2) becomes the bias of the adapted layer.

    Args:
        model: has attention layers whose `qkv` is an nn.Linear with the rows of q, k and v on top of each other, as
            timm's VisionTransformer and most of its relatives; `janus_ext.backbone.families` knows which.
        rank, targets, scale, rectify, rectify_in, options: see `LoRAQKV`.

    Returns:
        The layers by the name of the module they took the place of, e.g. "blocks.0.attn.qkv", in the model's order; a
        dictionary that also says how many attention layers of how many were adapted (`summary()`).

    Raises:
        ArgumentError: the model has no such layer, one of another layout, or LoRA layers already; nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"inject: model must be an nn.Module, got {type(model).__name__}")
    how = Rectification.of("inject", rectify, options)
    owners = fused_attention(model)
    for name, owner in owners.items():  # all of them, before the first is touched
        check_linear(f"inject: {name}.qkv", owner.qkv)
        check_rank(owner.qkv, rank)
    settings = (rank, targets, scale, how, rectify_in)
    made = {name: LoRAQKV(folded_qkv(owner), *settings) for name, owner in owners.items()}
    freeze(model)
    for name, owner in owners.items():
        replace_qkv(owner, made[name])
    return Injection({f"{name}.qkv" if name else "qkv": layer for name, layer in made.items()}, model, targets)


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
    places = [
        (owner, name, module)
        for owner in model.modules()
        for name, module in owner.named_children()
        if isinstance(module, Adapter)
    ]
    if not places:
        raise ArgumentError(f"uninject: model must hold LoRA layers, as inject makes them, got {type(model).__name__}")
    for _, name, adapter in places:  # all of them, before the first is touched
        check_linear(f"uninject: {name}", adapter.linear)
    for owner, name, adapter in places:
        adapter.merge()
        setattr(owner, name, _in_the_dtype_of(owner, adapter))
        unfold_qkv(owner)
    unfreeze(model)
    return model


def _in_the_dtype_of(owner: nn.Module, adapter: Adapter) -> nn.Linear:
    """The adapter's plain map; master weights are rounded to the dtype of the linear maps beside it."""
    beside = [child.weight.dtype for child in owner.children() if isinstance(child, nn.Linear)]
    return adapter.linear.to(beside[0]) if adapter.has_master and beside else adapter.linear
