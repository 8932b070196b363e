"""Methods, benchmarks and heads from elsewhere: by an installed entry point's name, or as package.module:attribute.

What somebody typed, in a command or in Python, may be imported: `find`. What a file says may not: `loaded`. So a
stranger's run folder makes this program import no code, whatever it names.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from janus_ext.arguments import nearest, shown
from janus_ext.errors import ArgumentError


@dataclass(frozen=True)
class Kind:
    """What can come from elsewhere."""

    name: str
    """As the flag has it, and with an s the group of entry points."""
    ours: tuple[str, ...]
    """The names of those that are built in, which come first."""
    form: str
    """How others are spelled."""
    fault: Callable[[Any], str | None]
    """What keeps an object from being one of this kind; None where nothing does."""

    @property
    def group(self) -> str:
        """The group in which an installed package names its own."""
        return f"janus_ext.{self.name}s"


def find(kind: Kind, name: str) -> Any:
    """What ``name`` stands for, imported where it is not yet: of names that somebody typed, and none of ours.

    Raises:
        ArgumentError: there is no such name, module or attribute; the module's own code fails, whose error is the
            cause; what is there is of another kind.
    """
    module, attribute = _place(kind, name)
    names = vars(_imported(kind, name, module))
    if attribute not in names:
        raise ArgumentError(f"--{kind.name} {name}: module {module} has no {attribute}{nearest(attribute, names)}")
    return _checked(kind, name, names[attribute])


def loaded(kind: Kind, name: str) -> Any:
    """The same for a name that may be a stranger's: an installed entry point, or what this process has imported.

    Raises:
        ArgumentError: it is neither, or as in `find`.
    """
    module, attribute = _place(kind, name)
    if ":" not in name:  # installed by whoever runs this program
        return find(kind, name)
    names = getattr(sys.modules.get(module), "__dict__", {})  # no getattr of the module: that may import, too
    if attribute not in names:
        raise ArgumentError(
            f"the {kind.name} {name} is not loaded, and no file makes this program import code: if you trust it, say "
            f"--{kind.name} {name}, or import {module} before, in Python"
        )
    return _checked(kind, name, names[attribute])


def require_installed(kind: Kind, name: str) -> None:
    """ArgumentError unless ``name``, which a file has and nobody typed, is built in or an installed entry point.

    For kinds that are functions: of these any that is loaded might do, ``os.abort`` too.
    """
    if name not in kind.ours and _place(kind, name) and ":" in name:
        raise ArgumentError(
            f"--{kind.name} {name} was not said, and no file makes this program run code: say it if you trust it, "
            "else another"
        )


def name_of(kind: Kind, found: Any, ours: Mapping[str, Any]) -> str:
    """A name as it is, and of an object the one by which `find` finds it again; ArgumentError where there is none.

    ``ours`` are the objects that are built in, by name.
    """
    if isinstance(found, str):
        return found
    for name, built_in in ours.items():
        if built_in is found:
            return name
    module, attribute = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    names = getattr(sys.modules.get(module), "__dict__", {})
    if attribute is None or names.get(attribute) is not found:
        raise ArgumentError(
            f"{kind.name} must be a name, or stand at the top level of a module where it is found again, "
            f"got {shown(found)}"
        )
    return f"{module}:{attribute}"


def typed(name: str | None) -> str | None:
    """``name`` as a command was given it: its module may lie in the current folder, as with ``python -m``."""
    if name is not None and ":" in name and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return name


def _place(kind: Kind, name: str) -> tuple[str, str]:
    """(module, attribute) of a name."""
    if ":" not in name:
        entry = _entry_point(kind, name)
        module, attribute = entry.module, entry.attr
    else:
        module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ArgumentError(f"--{kind.name} must be {kind.form}, as in `import package.module`, got {name!r}")
    return module, attribute


def _entry_point(kind: Kind, name: str) -> EntryPoint:
    found = entry_points(group=kind.group)
    places = {entry.value: entry for entry in found if entry.name == name}
    if len(places) > 1:
        raise ArgumentError(f"--{kind.name} {name} is ambiguous, say which: {' or '.join(sorted(places))}")
    if not places:
        names = [*kind.ours, *sorted(found.names)]
        found = f"{name!r}{nearest(name, names)}"
        raise ArgumentError(f"--{kind.name} must be one of {', '.join(names)}, or {kind.form}, got {found}")
    return next(iter(places.values()))


def _imported(kind: Kind, name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever somebody's module does when it is run
        reason = f"importing {module} failed at {_where(error)}: {type(error).__name__}: {_first_line(error)}"
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            reason = (
                f"no module {error.name} is installed or in the current folder; wanted is {kind.form}, as in "
                "`import package.module`"
            )
        raise ArgumentError(f"--{kind.name} {name}: {reason}") from error


def _checked(kind: Kind, name: str, found: Any) -> Any:
    fault = kind.fault(found)
    if fault is not None:
        raise ArgumentError(f"--{kind.name} {name}: {fault}")
    return found


def _where(error: BaseException) -> str:
    """The line of somebody's module in which an error arose."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    return f"{frames[-1].filename}, line {frames[-1].lineno}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
