"""Which attention layers a model has, and whose fused `qkv` can be adapted: the one table that `inject` asks.

A fused projection is one matrix. Only where its rows are known to be q, k and v on top of each other do "k" and "v"
name slices of it: MaxViT's rows, for one, are ordered by head, and a third of them is a bit of everything. So a layer
is adapted if the class that computes it stands in the table below, and refused by its name otherwise.
"""

from collections.abc import Callable, Collection
from functools import cache

import torch
from torch import nn

from janus_ext.errors import ArgumentError

PROJECTIONS = frozenset(  # a module with a child of such a name is taken for an attention layer
    "qkv q k v qk kv q_proj k_proj v_proj qkv_proj to_q to_k to_v to_kv to_qkv "
    "query key value wq wk wv qkvs in_proj".split()
)
BIASES = ("q_bias", "k_bias", "v_bias")  # of BEiT, EVA-02 and Swin V2, which keep them beside a qkv without bias

Test = Callable[[nn.Module], str]  # of a layer: "" where its rows are q, k, v on top of each other, else what they are


def _stacked(layer: nn.Module) -> str:
    return ""


def _by_head(layer: nn.Module) -> str:
    return "its qkv rows are ordered by head"


def _head_first(layer: nn.Module) -> str:
    return _by_head(layer) if layer.head_first else ""


def _global_query(layer: nn.Module) -> str:
    return "its qkv holds k and v only, q comes from another layer" if layer.use_global else ""


def _query_is_value(layer: nn.Module) -> str:
    return "it averages its q rows by k and v, which the names do not tell"


LAYOUTS: dict[str, Test] = {  # by the class whose `forward` runs; python_tests/test_families.py tries each on a model
    "timm.layers.attention.Attention": _stacked,
    "timm.layers.attention.AttentionRope": _stacked,
    "timm.layers.diff_attention.DiffAttention": _stacked,
    "timm.models.beit.Attention": _stacked,
    "timm.models.cait.TalkingHeadAttn": _stacked,
    "timm.models.coat.FactorAttnConvRelPosEnc": _stacked,
    "timm.models.convit.MHSA": _stacked,
    "timm.models.davit.ChannelAttention": _query_is_value,
    "timm.models.davit.ChannelAttentionV2": _query_is_value,
    "timm.models.davit.WindowAttention": _stacked,
    "timm.models.edgenext.CrossCovarianceAttn": _stacked,
    "timm.models.efficientformer.Attention": _by_head,
    "timm.models.eva.EvaAttention": _stacked,
    "timm.models.fastvit.Attention": _stacked,
    "timm.models.gcvit.WindowAttentionGlobal": _global_query,
    "timm.models.hiera.MaskUnitAttention": _stacked,
    "timm.models.hieradet_sam2.MultiScaleAttention": _stacked,
    "timm.models.levit.Attention": _by_head,
    "timm.models.maxxvit.AttentionCl": _head_first,
    "timm.models.metaformer.Attention": _stacked,
    "timm.models.mvitv2.MultiScaleAttention": _stacked,
    "timm.models.nest.Attention": _stacked,
    "timm.models.swin_transformer.WindowAttention": _stacked,
    "timm.models.swin_transformer_v2.WindowAttention": _stacked,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": _stacked,
    "timm.models.tiny_vit.Attention": _by_head,
    "timm.models.twins.LocallyGroupedAttn": _stacked,
    "timm.models.vision_transformer.Attention": _stacked,  # where timm up to 1.0.19 has it
    "timm.models.vision_transformer_relpos.RelPosAttention": _stacked,
    "timm.models.vision_transformer_sam.Attention": _stacked,
    "timm.models.volo.Attention": _stacked,
    "timm.models.xcit.XCA": _stacked,
}


def declare_stacked(attention: type[nn.Module]) -> type[nn.Module]:
    """Say of an attention class of your own that its `qkv` is called, and has q, k, v on top of each other.

    Also a decorator. Classes that inherit its `forward` are covered.
    """
    LAYOUTS[_name_of(attention)] = _stacked
    return attention


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every attention layer of a model by name: the modules with a child named as a projection to q, k or v."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or PROJECTIONS & {child for child, _ in module.named_children()}
    }


def fused_attention(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers whose fused `qkv` can be adapted, by name in the model's order; nothing is changed.

    Layers without a `qkv` are passed over.

    Raises:
        ArgumentError: there is none, or one has a `qkv` that is no plain linear map, is adapted already, or whose rows
            are not known to be q, k and v on top of each other.
    """
    layers = attention_layers(model)
    fused = {name: layer for name, layer in layers.items() if isinstance(getattr(layer, "qkv", None), nn.Module)}
    if not fused:
        kind, found = type(model).__name__, "it has no attention layer at all"
        if layers:
            name, layer = next(iter(layers.items()))
            children = ", ".join(child for child, _ in layer.named_children() if child in PROJECTIONS) or "one of torch"
            found = f"its {len(layers)} attention layers have others, {name} ({type(layer).__name__}) has {children}"
        raise ArgumentError(f"model must have attention with a fused `qkv` projection, got {kind}: {found}")
    for name, layer in fused.items():
        reason = _misfit(layer)
        if reason:
            raise ArgumentError(f"model cannot be adapted at {name} ({type(layer).__name__}): {reason}")
    _check_unshared(model, fused)
    return fused


def left_out(model: nn.Module, adapted: Collection[str]) -> str:
    """The attention layers whose `qkv` is not among `adapted`, in words behind a semicolon; "" where there is none."""
    layers = attention_layers(model).items()
    others = [(name, type(layer).__name__) for name, layer in layers if f"{name}.qkv".lstrip(".") not in adapted]
    if not others:
        return ""
    (name, kind), more = others[0], f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f"; not adapted, for they have no fused qkv: {name} ({kind}){more}"


def _misfit(layer: nn.Module) -> str:
    """Why the fused `qkv` of an attention layer cannot be adapted; "" where it can."""
    computing = next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))
    test = LAYOUTS.get(_name_of(computing))
    reason = test(layer) if test else ""
    if reason:
        return reason
    if not isinstance(layer.qkv, nn.Linear):
        kind = type(layer.qkv)
        adapted = "an adapter has taken its place" if hasattr(kind, "merge") else "only an nn.Linear can be adapted"
        return f"its qkv is a {kind.__name__}, {adapted}"
    if test is None:
        own = "if they are and the layer calls its qkv, say so with janus_ext.backbone.families.declare_stacked"
        return f"the rows of its qkv are not known to be q, k and v on top of each other; {own}({computing.__name__})"
    if layer.qkv.out_features % 3:
        return f"its qkv must have 3 m outputs, it has {layer.qkv.out_features}"
    return ""


def _check_unshared(model: nn.Module, fused: dict[str, nn.Module]) -> None:
    """A weight that serves two modules would be changed by the merge of either."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    for name, layer in fused.items():
        sharing = users.get(id(layer.qkv.weight), [])  # none has a weight that is computed
        if len(sharing) > 1:
            raise ArgumentError(f"model cannot be adapted at {name}: {' and '.join(sharing)} share one weight")


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def folded_qkv(layer: nn.Module) -> nn.Linear:
    """The layer's `qkv`; one with all of the bias where the layer keeps its parts beside it. The layer is not changed.

    The new nn.Linear has the old one's weight parameter, so a merge into it changes that.
    """
    if getattr(layer, "q_bias", None) is None:
        return layer.qkv
    weight = layer.qkv.weight
    folded = _Folded(weight.shape[1], weight.shape[0], device="meta")
    folded.had_bias = layer.qkv.bias is not None
    bias = torch.cat([getattr(layer, part).detach() for part in BIASES])
    if layer.qkv.bias is not None:
        bias = bias + layer.qkv.bias.detach()
    folded.weight, folded.bias = weight, nn.Parameter(bias, requires_grad=False)
    return folded.train(layer.training)


class _Folded(nn.Linear):
    """A qkv with the parts of the bias that its layer kept beside it; ``had_bias``: and with a bias of its own."""

    had_bias: bool


def replace_qkv(layer: nn.Module, adapter: nn.Module) -> None:
    """Put an adapter around `folded_qkv(layer)` in the place of its `qkv`; parts of the bias beside it are in there."""
    layer.qkv = adapter
    for part in BIASES:
        if getattr(layer, part, None) is not None:
            setattr(layer, part, None)  # these classes then call their qkv as it is


@torch.no_grad()
def unfold_qkv(layer: nn.Module) -> None:
    """Take the parts of the bias out again once `folded_qkv(layer)` itself is the `qkv`; other layers stay as they are.

    A qkv that had a bias of its own gets zeros: what was in it is in the parts, and the layer computes the same.
    """
    folded = getattr(layer, "qkv", None)
    if not isinstance(folded, _Folded):
        return
    for part, values in zip(BIASES, folded.bias.chunk(3), strict=True):
        is_parameter = part in layer._parameters  # or else a buffer, such as the zeros that K has for a bias
        setattr(layer, part, nn.Parameter(values.clone()) if is_parameter else values.clone())
    folded.bias = nn.Parameter(torch.zeros_like(folded.bias)) if folded.had_bias else None
    del folded.had_bias
    folded.__class__ = nn.Linear


def freeze(model: nn.Module) -> None:
    """No parameter needs a gradient any more, and normalisation with running statistics stays in evaluation mode.

    A frozen BatchNorm in training mode would go on changing: every forward pass moves its statistics, and with them the
    features of old classes. Dropout and stochastic depth stay as the model has them.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False)):
            _keep_in_evaluation(module)


def unfreeze(model: nn.Module) -> None:
    """The inverse of `freeze`: every parameter needs a gradient, and normalisation is in the model's mode again."""
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, _InEvaluation):
            module.__class__ = type(module).__mro__[2]  # behind the made class and _InEvaluation
            module.train(model.training)


def _keep_in_evaluation(module: nn.Module) -> None:
    if not isinstance(module, _InEvaluation):
        module.eval()
        module.__class__ = _in_evaluation(type(module))


class _InEvaluation:
    """Mixed into a class of modules: `train()` leaves it in evaluation mode, in copies and pickles, too."""

    def train(self, mode: bool = True) -> "_InEvaluation":
        return super().train(False)

    def __reduce_ex__(self, protocol: int) -> tuple[object, ...]:
        kind = type(self).__mro__[2]  # behind the made class and this one
        return _unpickled, (kind,), self.__dict__


@cache
def _in_evaluation(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Frozen{kind.__name__}", (_InEvaluation, kind), {})


def _unpickled(kind: type[nn.Module]) -> nn.Module:
    made = _in_evaluation(kind)
    return made.__new__(made)
