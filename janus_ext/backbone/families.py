"""What is known of timm's attention and MLP classes: the one table that `inject` asks, by way of `places`.

A fused projection is one matrix. Only where its rows are known to be q, k and v on top of each other do "k" and "v"
name slices of it: MaxViT's rows, for one, are ordered by head, and a third of them is a bit of everything. And only
where a class is known to call its projections does an adapter in their place do something. So a layer is adapted if the
class that computes it stands in the tables below, and refused by its name otherwise.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from janus_ext.arguments import called, shown
from janus_ext.errors import ArgumentError

PROJECTIONS = frozenset(  # a module with a child of such a name is taken for an attention layer
    "qkv q k v qk kv q_proj k_proj v_proj qkv_proj to_q to_k to_v to_kv to_qkv "
    "query key value wq wk wv qkvs in_proj".split()
)
SEPARATE = tuple(names.split() for names in ("q_proj k_proj v_proj", "q k v", "to_q to_k to_v", "query key value"))

Test = Callable[[nn.Module], str]  # of a layer: "" where its projections are what their names say, else what they are


def _as_named(layer: nn.Module) -> str:
    """A fused `qkv` has the rows of q, k and v on top of each other; separate ones are each what it is called."""
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
    "timm.layers.attention.Attention": _as_named,
    "timm.layers.attention.AttentionRope": _as_named,
    "timm.layers.diff_attention.DiffAttention": _as_named,
    "timm.models.beit.Attention": _as_named,
    "timm.models.cait.TalkingHeadAttn": _as_named,
    "timm.models.coat.FactorAttnConvRelPosEnc": _as_named,
    "timm.models.convit.MHSA": _as_named,
    "timm.models.davit.ChannelAttention": _query_is_value,
    "timm.models.davit.ChannelAttentionV2": _query_is_value,
    "timm.models.davit.WindowAttention": _as_named,
    "timm.models.edgenext.CrossCovarianceAttn": _as_named,
    "timm.models.efficientformer.Attention": _by_head,
    "timm.models.eva.EvaAttention": _as_named,
    "timm.models.fastvit.Attention": _as_named,
    "timm.models.gcvit.WindowAttentionGlobal": _global_query,
    "timm.models.hiera.MaskUnitAttention": _as_named,
    "timm.models.hieradet_sam2.MultiScaleAttention": _as_named,
    "timm.models.levit.Attention": _by_head,
    "timm.models.maxxvit.AttentionCl": _head_first,
    "timm.models.metaformer.Attention": _as_named,
    "timm.models.mvitv2.MultiScaleAttention": _as_named,
    "timm.models.nest.Attention": _as_named,
    "timm.models.nextvit.EfficientAttention": _as_named,
    "timm.models.swin_transformer.WindowAttention": _as_named,
    "timm.models.swin_transformer_v2.WindowAttention": _as_named,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": _as_named,
    "timm.models.tiny_vit.Attention": _by_head,
    "timm.models.twins.LocallyGroupedAttn": _as_named,
    "timm.models.vision_transformer.Attention": _as_named,  # where timm up to 1.0.19 has it
    "timm.models.vision_transformer_relpos.RelPosAttention": _as_named,
    "timm.models.vision_transformer_sam.Attention": _as_named,
    "timm.models.volo.Attention": _as_named,
    "timm.models.xcit.XCA": _as_named,
}
QUERY_APART = {"timm.models.nextvit.EfficientAttention"}  # q is made of all tokens, k and v of pooled ones

Maps = dict[str, tuple[str, ...]]  # the children of an MLP that are "fc1" and "fc2"; those of one target get one input
TWO_MAPS: Maps = {"fc1": ("fc1",), "fc2": ("fc2",)}
MLPS: dict[str, Maps] = {  # by the class whose `forward` runs, likewise tried
    "timm.layers.mlp.GluMlp": TWO_MAPS,  # fc1 is one map to value and gate
    "timm.layers.mlp.Mlp": TWO_MAPS,
    "timm.layers.mlp.SwiGLU": {"fc1": ("fc1_g", "fc1_x"), "fc2": ("fc2",)},
    "timm.models.pvt_v2.MlpWithDepthwiseConv": TWO_MAPS,
    "timm.models.tiny_vit.NormMlp": TWO_MAPS,
}


@called
def declare_stacked(attention: type[nn.Module]) -> type[nn.Module]:
    """Say of an attention class of your own that its `qkv` is called, and has q, k, v on top of each other.

    And that it calls its `proj`, if you want that adapted. Also a decorator. Classes that inherit its `forward` are
    covered.
    """
    _check_module("attention", attention)
    LAYOUTS[_name_of(attention)] = _as_named
    return attention


@called
def declare_separate(attention: type[nn.Module]) -> type[nn.Module]:
    """Say of an attention class of your own that it calls its projections to q, k and v, and all with one input.

    They are `q_proj`, `k_proj`, `v_proj`, or have other names of `SEPARATE`; `proj` as in `declare_stacked`.
    """
    return declare_stacked(attention)


@called
def declare_mlp(mlp: type[nn.Module]) -> type[nn.Module]:
    """Say of an MLP class of your own that it calls its `fc1` and its `fc2`. Also a decorator."""
    _check_module("mlp", mlp)
    MLPS[_name_of(mlp)] = TWO_MAPS
    return mlp


def _check_module(name: str, kind: Any) -> None:
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise ArgumentError(f"{name} must be a class that inherits nn.Module, got {shown(kind)}")


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every attention layer of a model by name: the modules with a child named as a projection to q, k or v."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or PROJECTIONS & {child for child, _ in module.named_children()}
    }


def mlp_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every MLP of a model's transformer blocks by name: modules with an `fc1` that have attention beside them."""
    blocks = {_block_of(model, name) for name in attention_layers(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if {"fc1", "fc1_g"} & {child for child, _ in module.named_children()} and _block_of(model, name) in blocks
    }


def _block_of(model: nn.Module, name: str) -> str:
    """The module that a layer is a part of, by name; lists and sequences are looked through."""
    block = name.rpartition(".")[0]
    while block and isinstance(model.get_submodule(block), (nn.ModuleList, nn.Sequential)):
        block = block.rpartition(".")[0]
    return block


def layout_of(layer: nn.Module) -> Test | None:
    """What LAYOUTS knows of the class whose `forward` an attention layer runs; None where that is nothing."""
    return LAYOUTS.get(_name_of(computing(layer)))


def has_query_apart(layer: nn.Module) -> bool:
    """Whether its separate q is known to get another input than k and v."""
    return _name_of(computing(layer)) in QUERY_APART


def maps_of(layer: nn.Module) -> Maps | None:
    """What MLPS knows of the class of an MLP; None where that is nothing."""
    return MLPS.get(_name_of(computing(layer)))


def computing(layer: nn.Module) -> type[nn.Module]:
    """The class whose `forward` a layer runs."""
    return next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
