"""PEFT's LoRA layers: which a model has, and whether one computes W x + s B (A x) and trains nothing else.

They are known by their attributes (`lora_A`, `scaling`, ... by adapter name), so that PEFT need not be there.
"""

import math
from typing import Any

from torch import Tensor, nn

from janus_ext.adapter import Adapter
from janus_ext.arguments import first_of
from janus_ext.errors import ArgumentError, warn

# By class name, layers whose one input is not what their adapter is multiplied with.
OTHERWISE = {
    "Embedding": "its inputs are indices, which span no subspace",
    "MultiheadAttention": "queries, keys and values may be different inputs",
    "ParamWrapper": "it adapts parameters of another module, which gives them inputs of its own",
}
Factors = tuple[nn.Parameter, nn.Parameter, float, nn.Module]  # A, B, s and the layer


def is_lora_layer(module: nn.Module) -> bool:
    """Whether it is a layer of PEFT with LoRA adapters, of any kind."""
    return isinstance(getattr(module, "lora_A", None), (nn.ModuleDict, nn.ParameterDict)) and hasattr(module, "scaling")


def lora_factors(model: nn.Module, adapter: str | None = None) -> dict[str, Factors]:
    """A, B, scaling and layer of an adapter (None: of the one that is active) by the layer's name in the model.

    Empty where the model has no LoRA layer of PEFT. Modules that PEFT trains whole (`modules_to_save`) are not among
    them.

    What else is trained in the model is one warning: nothing keeps it from changing protected outputs.

    Raises:
        ArgumentError: there is no such adapter, or it is not active, or several are, or it is not trained; or a layer
            is of a kind that does not multiply its input by A, or shares its weight with another module.
    """
    layers = {name: module for name, module in model.named_modules() if is_lora_layer(module)}
    if not layers:
        return {}
    chosen = _chosen(layers, adapter)
    adapted = {name: layer for name, layer in layers.items() if chosen in _adapters(layer)}
    found = {name: _factors(name, layer, chosen) for name, layer in adapted.items()}
    _check_unshared(model, adapted)
    _check_trained(model, adapted, chosen)
    return found


def _check_unshared(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """A weight that serves two modules is changed in both by the merge into one."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():  # each once, whatever names it has
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        users = owners.get(id(getattr(base_layer(layer), "weight", None)), [])
        if len(users) > 1:
            raise ArgumentError(
                f"{name}: its weight must be its own, {' and '.join(users)} share one: a merge of the adapter would "
                "change them all; leave it out of target_modules, or untie them (tie_word_embeddings=False)"
            )


def _check_trained(model: nn.Module, layers: dict[str, nn.Module], adapter: str) -> None:
    """Refuses an adapter that is not trained; one warning of what is trained beside it."""
    factors = {id(p) for layer in layers.values() if adapter in layer.lora_B for p in _parameters(layer, adapter)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(id(p) in factors for p in trained.values()):
        raise ArgumentError(
            f"adapter {adapter} must be trained, and every factor of it is frozen: make it with inference_mode=False, "
            "load it with is_trainable=True"
        )
    known = factors | {id(p) for module in model.modules() if isinstance(module, Adapter) for p in module.parameters()}
    inside = tuple(f"{layer}." for layer in layers)  # what is trained there is refused by `check_adapter`
    beside = [
        name
        for name, p in trained.items()
        if id(p) not in known and "modules_to_save" not in name and not name.startswith(inside)
    ]
    if beside:
        warn(
            f"{first_of(beside)} trained beside the adapter: nothing keeps them from changing protected outputs; "
            "bias='none' and frozen norms and tokens do"
        )


def _chosen(layers: dict[str, nn.Module], adapter: str | None) -> str:
    known = {name for layer in layers.values() for name in _adapters(layer)}
    active = {name for layer in layers.values() for name in layer.active_adapters if name in known}
    there = ", ".join(sorted(known))
    if adapter is None and len(active) != 1:
        found = f"{', '.join(sorted(active))} are active" if active else "none is active"
        raise ArgumentError(f"adapter must name which of the model's adapters ({there}) is rectified: {found}")
    if adapter is not None and adapter not in known:
        raise ArgumentError(f"adapter must be one of the model's, {there}, got {adapter!r}")
    if adapter is not None and adapter not in active:
        raise ArgumentError(f"adapter must be active to be trained: call set_adapter({adapter!r}) first")
    return adapter if adapter is not None else active.pop()


def _adapters(layer: nn.Module) -> list[str]:
    return [*layer.lora_A, *getattr(layer, "lora_embedding_A", ())]


def _factors(name: str, layer: nn.Module, adapter: str) -> Factors:
    kind = type(layer).__name__
    reason = OTHERWISE.get(kind)
    if reason is None and getattr(getattr(layer.lora_A[adapter], "weight", layer.lora_A[adapter]), "ndim", 2) != 2:
        reason = "its input is convolved"
    if reason is not None:
        raise ArgumentError(
            f"{name}: the adapter must be of a linear map, got PEFT's {kind}: {reason}; leave it out of target_modules"
        )
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    return getattr(A, "weight", A), getattr(B, "weight", B), layer.scaling[adapter], layer


def check_adapter(name: str, A: Tensor, B: Tensor, scale: float, module: nn.Module) -> None:
    """ArgumentError where `module` is a layer of PEFT that computes something else with A and B, or trains more."""
    adapter = _adapter_of(A, module)
    if adapter is None:
        return
    variant = _variant(module, adapter)
    if variant is not None:
        cure = "make it with use_dora=False" if variant == "DoRA" else "make it as plain LoRA"
        raise ArgumentError(f"{name}: the adapter must compute W x + s B A x, but {variant} computes otherwise: {cure}")
    if getattr(module.lora_B[adapter], "bias", None) is not None:
        raise ArgumentError(f"{name}: B has a bias, which moves protected outputs: make it with lora_bias=False")
    trained = [key for key, p in base_layer(module).named_parameters(recurse=False) if p.requires_grad]
    if trained:
        raise ArgumentError(
            f"{name}: the layer's own {trained[0]} is trained, which moves protected outputs: make the adapter with "
            "bias='none' (lora_only and all train it), or freeze it"
        )
    scaling = module.scaling[adapter]
    if not math.isclose(scaling, scale, rel_tol=1e-6):
        raise ArgumentError(f"{name}: scale must be the adapter's scaling, {scaling:g}, got {scale:g}")
    if is_merged(A, module):
        raise ArgumentError(f"{name}: the adapter is merged, so that it is not trained: call unmerge_adapter() first")
    _check_others(name, module, adapter)


def _check_others(name: str, module: nn.Module, adapter: str) -> None:
    """Another adapter may be active beside this one, but not be trained: nothing keeps its update from old inputs."""
    for other in getattr(module, "active_adapters", ()):
        if other != adapter and other in module.lora_B and any(p.requires_grad for p in _parameters(module, other)):
            raise ArgumentError(
                f"{name}: adapter {other} is active and trained beside {adapter}, which moves protected outputs: "
                f"freeze it, or call set_adapter({adapter!r})"
            )


def _parameters(module: nn.Module, adapter: str) -> list[Any]:
    factors = (module.lora_A[adapter], module.lora_B[adapter])
    return [p for factor in factors for p in (factor.parameters() if isinstance(factor, nn.Module) else [factor])]


def is_lost(A: Tensor, module: nn.Module | None, successor: nn.Module | None) -> bool:
    """Whether PEFT's layer has another adapter now, and computes that of `A` neither merged nor beside it."""
    adapter = _adapter_of(A, module)
    return (
        adapter is not None
        and module is successor
        and not (adapter in module.merged_adapters or adapter in module.active_adapters)
    )


def is_merged(A: Tensor, module: nn.Module | None) -> bool:
    """Whether PEFT has added the adapter of `A` to the weight, and computes it no more."""
    return _adapter_of(A, module) in getattr(module, "merged_adapters", ())


def base_layer(module: nn.Module) -> nn.Module:
    """The module that holds W."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _adapter_of(A: Tensor, module: nn.Module | None) -> str | None:
    """Name of the adapter of a PEFT layer that has A as its factor."""
    adapters = getattr(module, "lora_A", None)
    if not isinstance(adapters, (nn.ModuleDict, nn.ParameterDict)):
        return None
    return next((name for name, factor in adapters.items() if getattr(factor, "weight", factor) is A), None)


def _variant(module: nn.Module, adapter: str) -> str | None:
    """What the adapter is instead of plain LoRA."""
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if getattr(module, "use_dora", {}).get(adapter) or adapter in getattr(module, "lora_magnitude_vector", ()):
        return "DoRA"
    if adapter in getattr(module, "lora_E", ()):
        return "AdaLoRA"
    return None if variant is None else getattr(variant, "__name__", type(variant).__name__)
