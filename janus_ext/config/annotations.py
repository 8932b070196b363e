"""Values brought to the types that a dataclass's annotations ask for, as a command line's parser does, for Python."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from janus_ext.arguments import nearest, shown


class _Unfit(Exception):
    """The value is none of that type, and it is not clear which one was meant."""


def fit(hint: Any, value: Any) -> Any:
    """``value`` as the annotation ``hint`` has it, where its meaning is clear.

    ``hint`` is bool, int, float, str, Path, Mapping (of names), a Literal, tuple[X, ...] of these, or one of them or
    None. An int is a float, too; what names a file is text and a path; a list is a tuple, and so is an X alone. Nothing
    is rounded and no text is read as a number.

    Raises:
        TypeError: the value is of another type, or no choice of the Literal; the message says what was wanted.
    """
    try:
        return _fit(hint, value)
    except _Unfit as error:
        raise TypeError(f"must be {_in_words(hint)}, got {shown(value)}{_nearest(hint, value)}") from error


def _fit(hint: Any, value: Any) -> Any:
    if hint in SCALARS:
        return SCALARS[hint][1](value)
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return _choice(parts, value)
    if kind is tuple:
        items = value if isinstance(value, (list, tuple, range)) else (value,)
        return tuple(_fit(parts[0], item) for item in items)
    if kind not in (Union, types.UnionType):
        raise NotImplementedError(f"no rule for values annotated {hint}")
    return None if value is None else _fit(_but_none(parts), value)


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    for choice in choices:
        kind = Integral if isinstance(choice, int) else type(choice)
        if isinstance(value, kind) and not isinstance(value, bool) and value == choice:
            return choice
    raise _Unfit


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise _Unfit


def _whole_number(value: Any) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    raise _Unfit


def _number(value: Any) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise _Unfit from error
    raise _Unfit


def _text(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    raise _Unfit


def _path(value: Any) -> Path:
    return Path(_text(value))


def _named(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return dict(value)
    raise _Unfit


SCALARS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    bool: ("True or False", _flag),
    int: ("a whole number", _whole_number),
    float: ("a number", _number),
    str: ("text", _text),
    Path: ("a path", _path),
    Mapping: ("values by name", _named),
}


def _in_words(hint: Any) -> str:
    if hint in SCALARS:
        return SCALARS[hint][0]
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind is tuple:
        return f"a list, each item {_in_words(parts[0])}"
    return f"{_in_words(_but_none(parts))}, or None"


def _nearest(hint: Any, value: Any) -> str:
    """Of a text, or the first in a list, that is none of the choices: those that may be meant."""
    choices = [choice for choice in _choices(hint) if isinstance(choice, str)]
    texts = [text for text in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(text, str)]
    return next((nearest(text, choices) for text in texts if text not in choices), "")


def _choices(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _but_none(parts: tuple[Any, ...]) -> Any:
    """The one type beside None."""
    [part] = (part for part in parts if part is not type(None))
    return part
