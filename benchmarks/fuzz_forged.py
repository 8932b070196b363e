"""Files as a stranger could write them: wild values in the right places, under a SHA-256 that is right."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_ext.runs.checkpoint import (
    SHA256,
    read_json,
    read_json_lines,
    read_sealed_json,
    read_tensors,
    write_json_lines,
    write_sealed_json,
    write_tensors,
)

WILD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 2**31, 10**30, 0.5, -1e308, float("inf"), "", "x", "os:system", "../../x", "\x1b[2J\n"),
    *([], [[]], [None], {}, {"a": {"b": []}}, "9" * 5000, ["x"] * 50),
)
DTYPES = (torch.int8, torch.bool, torch.float16, torch.float64, torch.int64, torch.complex64, torch.float8_e4m3fn)


def forge(path: Path, rng: random.Random) -> str:
    """Puts something wild into a file; returns what and where."""
    if path.suffix == ".safetensors":
        how = _forge_tensors(path, rng)
    elif path.suffix == ".jsonl":
        forged, how = _with_wild(read_json_lines(path), rng)
        write_json_lines(path, [line if isinstance(line, dict) else {"x": line} for line in forged])
    else:
        value, how = _with_wild(read_json(path), rng)
        write_sealed_json(path, value)
    folder = path.parent.parent if path.suffix == ".safetensors" else path.parent
    _bind(folder)
    return how


def _bind(folder: Path) -> None:
    """Lets all files of a run say that they belong together."""
    seal = {"config": read_sealed_json(folder / "config.json")[1]}
    states = [_write_again(path, seal) for path in sorted((folder / "checkpoints").glob("method-*"))]
    for path in (folder / "checkpoints").glob("factors-*"):
        _write_again(path, seal)
    behind, model = seal["config"], folder / "checkpoints" / "model.safetensors"
    if model.exists():
        behind = _write_again(model, seal | {"state": states[-1]})
    within = folder / "checkpoints" / "within.safetensors"
    if within.exists():
        _write_again(within, {"behind": behind})


def _write_again(path: Path, changes: dict[str, str]) -> str:
    tensors, about = read_tensors(path)
    return write_tensors(path, tensors, about | changes)


def _forge_tensors(path: Path, rng: random.Random) -> str:
    tensors, about = read_tensors(path)
    about = {key: value for key, value in about.items() if key != SHA256}
    if rng.random() < 0.5 and about:
        key = rng.choice(sorted(about))
        about[key], how = _forged_text(about[key], rng)
        how = f"{key}: {how}"
    else:
        name = rng.choice(sorted(tensors))
        tensors[name], how = _forged_tensor(tensors[name], rng)
        how = f"{name}: {how}"
    write_tensors(path, tensors, about)
    return how


def _forged_text(text: str, rng: random.Random) -> tuple[str, str]:
    """A value of metadata, which is often JSON."""
    try:
        value, how = _with_wild(json.loads(text), rng)
    except ValueError:
        value = rng.choice(WILD)
        return (value, f"{value!r:.60}") if isinstance(value, str) else (json.dumps(value), f"{value!r:.60}")
    return json.dumps(value), how


def _forged_tensor(tensor: Tensor, rng: random.Random) -> tuple[Tensor, str]:
    kind = rng.choice(("dtype", "flat", "empty", "longer", "nan", "zero", "scalar"))
    if kind == "dtype":
        dtype = rng.choice(DTYPES)
        return tensor.to(dtype), f"as {dtype}"
    made = {
        "flat": lambda: tensor.reshape(-1),
        "empty": lambda: tensor.new_zeros(0),
        "longer": lambda: torch.cat([tensor.reshape(-1), tensor.reshape(-1)]),
        "nan": lambda: tensor.float() * float("nan"),
        "zero": lambda: torch.zeros_like(tensor),
        "scalar": lambda: tensor.new_zeros(()),
    }
    return made[kind](), kind


def _with_wild(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy of a value of JSON with one of its parts replaced, or left out."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        wild = rng.choice(WILD)
        return wild, f"{wild!r:.60}"
    holder, key = rng.choice(places)
    if isinstance(holder, dict) and rng.random() < 0.1:
        del holder[key]
        return value, f"without {key}"
    holder[key] = rng.choice(WILD)
    return value, f"{key} = {holder[key]!r:.60}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
