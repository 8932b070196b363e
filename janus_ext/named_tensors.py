"""State dictionaries of parts, as one of the whole: "<part>.<tensor>"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def prefixed(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``state`` under "<part>.<name>"."""
    return {f"{part}.{name}": tensor for name, tensor in state.items()}


def below(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `prefixed`: what of ``state`` belongs to the part."""
    start = f"{part}."
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}


def states(group: str, parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of all ``parts``' state dictionaries, as "<group>.<part>.<tensor>"."""
    named = [prefixed(f"{group}.{name}", part.state_dict()) for name, part in parts.items()]
    return {name: tensor for state in named for name, tensor in state.items()}


def load_states(group: str, parts: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Gives every part back what ``states`` took from it."""
    for name, part in parts.items():
        part.load_state_dict(below(f"{group}.{name}", state))
