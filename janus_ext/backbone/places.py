"""Where adapters go: the linear maps of a model that targets name, known by their class or refused by its name."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from janus_ext.arguments import shown
from janus_ext.backbone.families import (
    PROJECTIONS,
    SEPARATE,
    TWO_MAPS,
    attention_layers,
    computing,
    has_query_apart,
    layout_of,
    maps_of,
    mlp_layers,
)
from janus_ext.errors import ArgumentError

QKV, MLP = ("q", "k", "v"), ("fc1", "fc2")
TARGETS = (*QKV, "proj", *MLP)
BIASES = ("q_bias", "k_bias", "v_bias")  # of BEiT, EVA-02 and Swin V2, which keep them beside a qkv without bias


@dataclass(frozen=True)
class Place:
    """One linear map of a model.

    Attributes:
        owner: the attention layer or the MLP that has it.
        name: of the map in the model, such as "blocks.0.attn.qkv".
        targets: what it computes of the targets asked for; of a fused qkv up to three, else one.
        source: maps of one source get the same input.
    """

    owner: nn.Module
    name: str
    targets: tuple[str, ...]
    source: str

    @property
    def linear(self) -> nn.Linear:
        return getattr(self.owner, self.child)

    @property
    def owner_name(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def child(self) -> str:
        """Its name in the owner."""
        return self.name.rpartition(".")[2]

    @property
    def is_fused(self) -> bool:
        return self.child == "qkv"


def places(model: nn.Module, targets: Sequence[str]) -> dict[str, Place]:
    """The maps that the targets name, by name in the model's order; nothing is changed.

    Attention layers without a `qkv` are passed over where their class is not known.

    Raises:
        ArgumentError: targets are no distinct names of q, k, v, proj, fc1, fc2; or one is in no layer, or in one that
            is no plain linear map, is adapted already, shares its weight, or belongs to a class that is not known.
    """
    check_targets(targets)
    found: list[Place] = []
    if slices := tuple(target for target in targets if target in QKV):
        found += _in_attention(model, "a fused `qkv`, or separate projections to q, k and v", partial(_qkv, slices))
    if "proj" in targets:
        found += _in_attention(model, "a projection `proj` of its output", _proj)
    for target in (target for target in targets if target in MLP):
        found += _in_mlps(model, target)
    order = {name: index for index, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    made = {place.name: place for place in sorted(found, key=lambda place: order[place.name])}
    _check_unshared(model, made)
    return made


def check_targets(targets: Sequence[str]) -> None:
    """ArgumentError unless these are one or more distinct names of what can be adapted."""
    listed = isinstance(targets, Sequence) and not isinstance(targets, str)
    known = listed and all(isinstance(target, str) and target in TARGETS for target in targets)
    if not known or not targets or len(set(targets)) != len(targets):
        raise ArgumentError(f"targets must be one or more distinct names of {', '.join(TARGETS)}, got {shown(targets)}")


def _in_attention(model: nn.Module, wanted: str, find: Callable[[str, nn.Module], Iterator[Place]]) -> list[Place]:
    """What `find` gives of the attention layers; ArgumentError where that is nothing at all."""
    layers = attention_layers(model)
    found = [place for name, layer in layers.items() for place in find(name, layer)]
    if found:
        return found
    reason = _others(layers) if layers else "it has no attention layer at all"
    raise ArgumentError(f"model must have attention with {wanted}, got {type(model).__name__}: {reason}")


def _others(layers: dict[str, nn.Module]) -> str:
    """What the attention layers have instead; and how to say that the projections of the first are separate ones."""
    name, layer = next(iter(layers.items()))
    kind, projections = type(layer).__name__, [getattr(layer, child) for child in _separate(layer)]
    others = f"its {len(layers)} attention layers have others, {name} ({kind}) has {projections_of(layer)}"
    if not projections:
        return others
    if not all(isinstance(projection, nn.Linear) for projection in projections):
        return f"{others}, and a {type(projections[0]).__name__} is no nn.Linear"
    return f"{others}; if it calls them, say so with janus_ext.backbone.families.declare_separate({kind})"


def _in_mlps(model: nn.Module, target: str) -> list[Place]:
    """The maps "fc1" or "fc2" of every MLP; ArgumentError where there is none."""
    found = [
        Place(layer, _joined(name, child), (target,), f"{name}, {target}")
        for name, layer in mlp_layers(model).items()
        for child in (maps_of(layer) or TWO_MAPS)[target]
    ]
    if not found:
        wanted = "an MLP with `fc1` and `fc2` beside its attention"
        raise ArgumentError(f"model must have {wanted}, got {type(model).__name__}: it has none")
    for place in found:
        _check(place)
    return found


def _qkv(targets: tuple[str, ...], name: str, layer: nn.Module) -> Iterator[Place]:
    """A fused `qkv`, or the separate projections of a known class."""
    if _is_fused(layer):
        yield _check(Place(layer, _joined(name, "qkv"), targets, name))
    elif layout_of(layer):
        for child, target in zip(_separate(layer), QKV, strict=False):
            if target in targets:
                apart = target == "q" and has_query_apart(layer)
                yield _check(Place(layer, _joined(name, child), (target,), f"{name}, q" if apart else name))


def _proj(name: str, layer: nn.Module) -> Iterator[Place]:
    """What maps the sum of values to the output, in every layer that `_qkv` does not pass over."""
    if _is_fused(layer) or layout_of(layer):
        yield _check(Place(layer, _joined(name, "proj"), ("proj",), f"{name}, proj"))


def _is_fused(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "qkv", None), nn.Module)


def _separate(layer: nn.Module) -> Sequence[str]:
    """The names of its three projections; none where it has others."""
    children = {child for child, _ in layer.named_children()}
    return next((names for names in SEPARATE if children.issuperset(names)), ())


def projections_of(layer: nn.Module) -> str:
    """The names of what an attention layer has for projections, in words."""
    return ", ".join(child for child, _ in layer.named_children() if child in PROJECTIONS) or "one of torch"


def _joined(owner: str, child: str) -> str:
    return f"{owner}.{child}".lstrip(".")


def _check(place: Place) -> Place:
    """The same; ArgumentError with the reason where its map cannot be adapted."""
    reason = _misfit(place)
    if reason:
        where = f"{place.owner_name} ({type(place.owner).__name__})"
        raise ArgumentError(f"model cannot be adapted at {where}: {reason}")
    return place


def _misfit(place: Place) -> str:
    """Why the map cannot be adapted; "" where it can."""
    owner, child, layout = place.owner, place.child, layout_of(place.owner)
    reason = layout(owner) if place.is_fused and layout else ""
    if reason:
        return reason
    linear = getattr(owner, child, None)
    if linear is None:
        return f"it has no {child}"
    if not isinstance(linear, nn.Linear):
        adapted = "an adapter has taken its place" if hasattr(linear, "merge") else "only an nn.Linear can be adapted"
        return f"its {child} is a {type(linear).__name__}, {adapted}"
    if not layout and not maps_of(owner):
        return _unknown(place, computing(owner).__name__)
    if place.is_fused and linear.out_features % 3:
        return f"its qkv must have 3 m outputs, it has {linear.out_features}"
    return ""


def _unknown(place: Place, kind: str) -> str:
    declare = "janus_ext.backbone.families.declare_"
    if place.is_fused:
        own = f"if they are and the layer calls its qkv, say so with {declare}stacked({kind})"
        return f"the rows of its qkv are not known to be q, k and v on top of each other; {own}"
    what = "mlp" if place.targets[0] in MLP else "stacked"
    return f"it is not known to call its {place.child}; if it does, say so with {declare}{what}({kind})"


def _check_unshared(model: nn.Module, found: dict[str, Place]) -> None:
    """A weight that serves two modules would be changed by the merge of either."""
    users: dict[int, dict[tuple[int, str], str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parent, _, child = name.rpartition(".")
        place = (id(model.get_submodule(parent)), child)  # of an MLP under two names it is one
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), {}).setdefault(place, name)
    for place in found.values():
        sharing = list(users.get(id(place.linear.weight), {}).values())  # none has a weight that is computed
        if len(sharing) > 1:
            where = " and ".join(sharing)
            raise ArgumentError(f"model cannot be adapted at {place.owner_name}: {where} share one weight")


def coverage(model: nn.Module, adapted: Collection[str]) -> tuple[str, str]:
    """Where the maps of these names lie, in words, and which attention layers were passed over, behind a semicolon.

    Such as ("2 of 12 attention layers and 12 MLPs", "; not adapted: blocks.0.attn (GPSA) with qk, v, and 9 more");
    the second is "" where none was, or no attention layer was to be adapted.
    """
    owners = {name.rpartition(".")[0] for name in adapted}
    attention = attention_layers(model)
    others = [name for name in attention if name not in owners]
    mlps = len(owners - set(attention))
    parts = [f"{mlps} MLP{'' if mlps == 1 else 's'}"] if mlps else []
    if len(others) == len(attention):
        return parts[0], ""
    parts.insert(0, f"{len(attention) - len(others)} of {len(attention)} attention layers")
    if not others:
        return " and ".join(parts), ""
    name, layer = others[0], attention[others[0]]
    more = f", and {len(others) - 1} more" if len(others) > 1 else ""
    return " and ".join(parts), f"; not adapted: {name} ({type(layer).__name__}) with {projections_of(layer)}{more}"


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


def replace(place: Place, adapter: nn.Module) -> None:
    """Put an adapter in the place of its map; of a qkv around `folded_qkv`, which has the parts of the bias beside."""
    setattr(place.owner, place.child, adapter)
    for part in BIASES if place.is_fused else ():
        if getattr(place.owner, part, None) is not None:
            setattr(place.owner, part, None)  # these classes then call their qkv as it is


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
