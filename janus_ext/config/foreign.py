"""Methods, benchmarks and heads from elsewhere, as far as settings go: what names stand for, what a method declares.

A method that is built in has its values in the presets; one from elsewhere says them in its class, see `Declared`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, ClassVar, get_args

from janus_ext import plugins
from janus_ext.arguments import nearest
from janus_ext.config.parts import (
    BenchmarkName,
    DataConfig,
    HeadName,
    MachineConfig,
    MethodConfig,
    MethodName,
    ModelConfig,
    OptimizationConfig,
    RunConfig,
    Settings,
)
from janus_ext.errors import ArgumentError

OURS: tuple[str, ...] = get_args(MethodName)
PARTS = (DataConfig, MethodConfig, ModelConfig, OptimizationConfig, MachineConfig, RunConfig)
SHARED = {field.name: field for part in PARTS for field in fields(part)}
TAKEN = {*SHARED, "own", "planned_tasks", "help"}  # names that a flag or an argument has already


class Declared:
    """What the class of a method says of itself to the configuration; the base of every method."""

    Own: ClassVar[type[Settings] | None] = None
    """A frozen dataclass of settings that no other method has; each field becomes a flag, its docstring the help."""
    like: ClassVar[str] = "lora"
    """The built-in method whose values, of all benchmarks, it takes where ``defaults`` say nothing."""
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Shared settings as it wants them where the user says nothing."""
    limits: ClassVar[Mapping[str, tuple[Any, ...]] | None] = None
    """The values that it takes of shared settings, all others are refused; None: as ``like``."""


def _fault_of_method(found: Any) -> str | None:
    if not isinstance(found, type) or not issubclass(found, Declared):
        return f"wanted is a class that inherits janus_ext.methods.base.Method, got {_shown(found)}"
    if inspect.isabstract(found):
        return f"the class leaves open what a method must have: {', '.join(sorted(found.__abstractmethods__))}"
    return _fault_of_own(found.Own) or _fault_of_values(found)


def _fault_of_own(own: Any) -> str | None:
    if own is None:
        return None
    if not isinstance(own, type) or not issubclass(own, Settings) or "__dataclass_fields__" not in vars(own):
        return f"Own must be a frozen dataclass that inherits janus_ext.config.Settings, got {_shown(own)}"
    taken = [field.name for field in fields(own) if field.name.removeprefix("no_") in TAKEN]
    names = [field.name for field in fields(own)]
    taken += [name for name in names if name.startswith("no_") and name.removeprefix("no_") in names]
    if taken:
        return f"Own must have names of its own, {', '.join(taken)} is taken"
    try:
        own()
    except Exception as error:  # no default; a default of another type; an annotation that has no rule, or no meaning
        return f"Own cannot be made of its defaults: {error}"
    return None


def _fault_of_values(found: type[Declared]) -> str | None:
    if found.like not in OURS:
        return f"like must be one of {', '.join(OURS)}, got {found.like!r}"
    if not isinstance(found.defaults, Mapping):
        return f"defaults must be values by name, got {_shown(found.defaults)}"
    if not isinstance(found.limits, (Mapping, type(None))) or not all(map(_is_choice, (found.limits or {}).values())):
        return f"limits must be tuples of one or more values by name, got {found.limits!r}"
    for name in found.defaults:  # other fields cannot tell what was typed from what was not
        if name not in SHARED or SHARED[name].default not in (None, "auto"):
            kind = "is no setting" if name not in SHARED else "always has a value that the user has chosen"
            return f"defaults may say what is left out or auto elsewhere, and {name} {kind}"
    unknown = [name for name in found.limits or () if name not in SHARED]
    return f"limits must name shared settings, {unknown[0]} is none" if unknown else None


def _is_choice(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) > 0


def _shown(found: Any) -> str:
    return f"class {found.__name__}" if isinstance(found, type) else f"an object of type {type(found).__name__}"


def _fault_of_benchmark(found: Any) -> str | None:
    return None if callable(found) else f"wanted is a function that gives a Benchmark, got {_shown(found)}"


def _fault_of_head(found: Any) -> str | None:
    if callable(found) and not isinstance(found, type):
        try:
            inspect.signature(found).bind(None)
        except TypeError:
            return f"wanted is a function of one argument, what is known, got one with {inspect.signature(found)}"
        except ValueError:  # of a built-in function that does not say what it takes
            return None
        return None
    return f"wanted is a function that gives a weight and a bias, got {_shown(found)}"


METHOD = plugins.Kind("method", OURS, "package.module:Class", _fault_of_method)
BENCHMARK = plugins.Kind("benchmark", get_args(BenchmarkName), "package.module:function", _fault_of_benchmark)
HEAD = plugins.Kind("head", get_args(HeadName), "package.module:function", _fault_of_head)


def find_method(name: str) -> type[Declared] | None:
    """The class of a method that somebody typed, imported where it is not yet; None of one that is built in."""
    return None if name in OURS else plugins.find(METHOD, name)


def loaded_method(name: str) -> type[Declared] | None:
    """The same without importing what is not installed: of a name that a file may have."""
    return None if name in OURS else plugins.loaded(METHOD, name)


def find_head(name: str) -> Callable[[Any], Any] | None:
    """The function of a head that somebody typed, imported where it is not yet; None of one that is built in."""
    return None if name in HEAD.ours else plugins.find(HEAD, name)


def loaded_head(name: str) -> Callable[[Any], Any] | None:
    """The same without importing what is not installed: of a name that was typed before."""
    return None if name in HEAD.ours else plugins.loaded(HEAD, name)


def own_settings(name: str, method: type[Declared] | None, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """All of the settings that only this method has, as JSON has them, with its defaults for what is not given.

    Raises:
        ArgumentError: it has no such setting, or the value is of another type.
    """
    known = [] if method is None or method.Own is None else [field.name for field in fields(method.Own)]
    for unknown in (given or {}).keys() - known:
        raise ArgumentError(f"--method {name} has no setting {unknown!r} of its own{nearest(unknown, known)}")
    return method.Own(**(given or {})).to_json() if known else None
