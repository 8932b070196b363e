"""Checks of what a caller hands in: ArgumentError names the argument, what was wanted and what was found."""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from janus_ext.errors import ArgumentError

MOST_BITS = 256


def check_number(name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    """A real number for which `fits` holds; NaN is for `fits` to refuse, truth values are no numbers."""
    _check(name, value, Real, "a number", fits, wanted)


def check_integer(name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    """An integer for which `fits` holds; truth values are no integers."""
    _check(name, value, Integral, "an integer", fits, wanted)


def check_flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} must be True or False, got {shown(value)}")


def check_tensor(name: str, value: Any, wanted: str) -> None:
    """A torch.Tensor, said to be `wanted`."""
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} must be a tensor {wanted}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value for a message of one line: itself where it is short for sure, else its type."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        return f"an integer of {value.bit_length():,} bits"  # Python refuses to write out the longest
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    return f"an object of type {type(value).__name__}"


def _check(name: str, value: Any, kind: type, noun: str, fits: Callable[[Any], bool], wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        found = f"{value!r}" if isinstance(value, float) else shown(value)
        raise ArgumentError(f"{name} must be {noun}, {wanted}, got {found}")
    if not fits(value):
        raise ArgumentError(f"{name} must be {wanted}, got {shown(value)}")


def first_of(names: Sequence[str]) -> str:
    """The first of one or more names, and how many more there are: "blocks.0.attn.qkv and 11 more"."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
