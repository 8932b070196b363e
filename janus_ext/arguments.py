"""Checks of what a caller hands in: ArgumentError names the argument, what was wanted and what was found."""

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from janus_ext.errors import ArgumentError, JanusError, on_one_line

P = ParamSpec("P")
T = TypeVar("T")
MOST_BITS = 256  # of an integer that is written out
WIDEST = 2**20  # a width or a number of classes beyond it is a slip, for which no memory is asked


def check_number(name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    """A real number for which `fits` holds, and that a float can hold; NaN is for `fits` to refuse.

    Truth values are no numbers.
    """
    _check(name, value, Real, "a number", lambda number: _is_within_floats(number) and fits(number), wanted)


def check_integer(name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    """An integer for which `fits` holds; truth values are no integers."""
    _check(name, value, Integral, "an integer", fits, wanted)


def check_flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} must be True or False, got {shown(value)}")


def check_text(name: str, value: Any, wanted: str) -> None:
    """A str, said to be `wanted`."""
    if not isinstance(value, str):
        raise ArgumentError(f"{name} must be {wanted}, got {shown(value)}")


def checked_path(name: str, value: Any) -> Path:
    """What names a file or folder, there or not, as a Path."""
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentError(f"{name} must be a path, got {shown(value)}")
    try:
        os.path.lexists(value) or os.lstat(value)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # too long for the file system, or with a null byte
        raise ArgumentError(f"{name} must be a path that there can be, got {shown(value)}") from error
    return Path(value)


def check_tensor(name: str, value: Any, wanted: str, fits: Callable[[Tensor], bool] = lambda tensor: True) -> None:
    """A torch.Tensor with values in memory for which `fits` holds; `wanted` says of which shape and dtype."""
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} must be a tensor {wanted}, got {shown(value)}")
    if value.layout != torch.strided or value.is_meta:
        found = "one on meta, which has no values" if value.is_meta else "a sparse or packed one"
        raise ArgumentError(f"{name} must be a dense tensor {wanted}, got {found}")
    if not fits(value):
        raise ArgumentError(f"{name} must be {wanted}, got {list(value.shape)} of {value.dtype}")


def check_floats(name: str, value: Any, shape: Sequence[int | str]) -> None:
    """A tensor of a floating dtype and this shape, in which letters stand for any size."""
    wanted = f"[{', '.join(map(str, shape))}]"
    check_tensor(name, value, wanted)
    sizes = tuple(size if isinstance(n, str) else n for n, size in zip(shape, value.shape, strict=False))
    if not are_floats(value) or value.dim() != len(shape) or value.shape != sizes:
        raise ArgumentError(f"{name} must be floating {wanted}, got {list(value.shape)} of {value.dtype}")


def are_floats(tensor: Tensor) -> bool:
    """Whether the dtype is one of real numbers with which torch computes: those of 8 bits and less only store them."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def are_integers(tensor: Tensor) -> bool:
    """Whether the dtype is one of integers with which torch computes: no truth values, unsigned ones of 8 bits only."""
    return tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_state(name: str, value: Any, names: Sequence[str]) -> None:
    """What a state_dict() gave: a mapping with a tensor of each name."""
    if not isinstance(value, Mapping) or not set(names) <= set(value):
        found = f"{', '.join(map(str, value)) or 'nothing'}" if isinstance(value, Mapping) else shown(value)
        raise ArgumentError(f"{name} must be what state_dict() gave, with {', '.join(names)}, got {found}")
    for key in names:
        check_tensor(f"{name}: {key}", value[key], "as state_dict() gave it", _are_real)


def check_device(name: str, value: Any) -> None:
    """A device that there is, as torch names it, or None."""
    try:
        torch.empty(0, device=value)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ArgumentError(f"{name} must be a device that there is, such as 'cpu', got {shown(value)}") from error


@contextmanager
def naming(who: str) -> Iterator[None]:
    """Within it, an error of ours begins with a name: of the function that was called, or of an argument of it."""
    try:
        yield
    except JanusError as error:
        error.args = (f"{who}: {error.text}",)
        raise


def called(function: Callable[P, T]) -> Callable[P, T]:
    """Errors of ours that leave ``function`` say its name; of several such, one within the other, the outermost's."""

    name = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> T:
        with _saying(name):
            result = function(*args, **kwargs)
        return _saying_of_each(name, result) if inspect.isgenerator(result) else result

    return named


@contextmanager
def _saying(function: str) -> Iterator[None]:
    try:
        yield
    except JanusError as error:
        error.function = function
        raise


def _saying_of_each(function: str, results: Iterator[T]) -> Iterator[T]:
    """The same of what computes as it is asked."""
    with _saying(function):
        yield from results


def methods_called(kind: type[T]) -> type[T]:
    """`called` for whatever of a class its users call: its constructor and its public methods."""
    for name, member in list(vars(kind).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, classmethod):
            setattr(kind, name, classmethod(called(member.__func__)))
        elif inspect.isfunction(member):
            setattr(kind, name, called(member))
    return kind


def shown(value: Any) -> str:
    """A value for a message of one line: itself where it is short for sure, else its type."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        return f"an integer of {value.bit_length():,} bits"  # Python refuses to write out the longest
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if isinstance(value, (list, tuple)) and len(value) <= 8:
        return f"[{', '.join(f'a {type(v).__name__}' if isinstance(v, (list, tuple)) else shown(v) for v in value)}]"
    return f"an object of type {type(value).__name__}"


def _check(name: str, value: Any, kind: type, noun: str, fits: Callable[[Any], bool], wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        found = f"{value!r}" if isinstance(value, float) else shown(value)
        raise ArgumentError(f"{name} must be {noun}, {wanted}, got {found}")
    if not fits(value):
        raise ArgumentError(f"{name} must be {wanted}, got {shown(value)}")


def _are_real(tensor: Tensor) -> bool:
    return are_floats(tensor) or are_integers(tensor)


def _is_within_floats(number: Real) -> bool:
    """Whether it is at most as large as floats are: integers and fractions know no bounds."""
    try:
        float(number)
    except OverflowError:
        return False
    return True


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is none of the known ones: those that may be meant, or nothing."""
    similar = difflib.get_close_matches(name, list(known), n=3)
    return f"; similar: {', '.join(map(on_one_line, similar))}" if similar else ""


def first_of(names: Sequence[str]) -> str:
    """The first of one or more names, and how many more there are: "blocks.0.attn.qkv and 11 more"."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
