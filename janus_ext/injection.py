"""LoRA into every attention layer of a Vision Transformer, in one call."""

from collections.abc import Sequence

from torch import nn

from janus_ext import ops
from janus_ext.errors import ArgumentError
from janus_ext.families import attention_layers, folded_qkv, freeze, fused_attention, replace_qkv
from janus_ext.lora import LoRAQKV, check_linear, check_rank


class Injection(dict[str, LoRAQKV]):
    """The layers that `inject` made, by the name of the module whose place they took, in the model's order.

    Attributes:
        targets: what they adapt of each attention layer.
        left_out: the attention layers that have no fused `qkv` and stay as they are, by name with their class's name.
        model_parameters: number of values in the model, heads included, adapters not.
    """

    def __init__(self, layers: dict[str, LoRAQKV], targets: Sequence[str], left_out: dict[str, str], size: int) -> None:
        super().__init__(layers)
        self.targets, self.left_out, self.model_parameters = tuple(targets), left_out, size

    @property
    def parameters(self) -> int:
        """Number of values in the factors."""
        return sum(factor.numel() for layer in self.values() for factor in (layer.A, layer.B))

    def summary(self) -> str:
        """In a line: what is adapted of how much, and which attention layers are not."""
        total = len(self) + len(self.left_out)
        line = (
            f"LoRA on {', '.join(self.targets)} of {len(self)} of {total} attention layers, "
            f"{self.parameters:,} parameters beside {self.model_parameters:,}"
        )
        if not self.left_out:
            return line
        name, kind = next(iter(self.left_out.items()))
        others = f" and {len(self.left_out) - 1} more" if len(self.left_out) > 1 else ""
        return f"{line}; not adapted, for they have no fused qkv: {name} ({kind}){others}"


def inject(
    model: nn.Module,
    rank: int,
    targets: Sequence[str] = ("k", "v"),
    scale: float = 1.0,
    rectify: str = "exact",
    rectify_in: str = "backward",
    *,
    damping: float = ops.DAMPING,
    share: float = ops.SHARE,
    balance: bool = True,
) -> Injection:
    """Put LoRA on the fused qkv of every attention layer of a timm ViT, in place, and freeze everything else.

    Frozen normalisation with running statistics (BatchNorm) stays in evaluation mode from now on, whatever
    `model.train()` says: it would move the features of old classes. Dropout and stochastic depth stay as the model has
    them. A bias that the model keeps beside its qkv (BEiT, EVA-02, Swin V2) becomes the bias of the adapted layer.

    Args:
        model: has attention layers whose `qkv` is an nn.Linear with the rows of q, k and v on top of each other, as
            timm's VisionTransformer and most of its relatives; `janus_ext.families` knows which.
        rank, targets, scale, rectify, rectify_in, damping, share, balance: see `LoRAQKV`.

    Returns:
        The layers by the name of the module they took the place of, e.g. "blocks.0.attn.qkv", in the model's order; a
        dictionary that also says how many attention layers were adapted (`summary()`, `left_out`).

    Raises:
        ArgumentError: the model has no such layer, one of another layout, or LoRA layers already; nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"inject: model must be an nn.Module, got {type(model).__name__}")
    owners = fused_attention(model)
    left_out = {name: type(layer).__name__ for name, layer in attention_layers(model).items() if name not in owners}
    for name, owner in owners.items():  # all of them, before the first is touched
        check_linear(f"inject: {name}.qkv", owner.qkv)
        check_rank(owner.qkv, rank)
    size = sum(parameter.numel() for parameter in model.parameters())
    options = {"rectify": rectify, "rectify_in": rectify_in, "damping": damping, "share": share, "balance": balance}
    made = {name: LoRAQKV(folded_qkv(owner), rank, targets, scale, **options) for name, owner in owners.items()}
    freeze(model)
    for name, owner in owners.items():
        replace_qkv(owner, made[name])
    layers = {f"{name}.qkv" if name else "qkv": layer for name, layer in made.items()}
    return Injection(layers, targets, left_out, size)
