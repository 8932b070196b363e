"""Weight files: what PyTorch, safetensors and JAX wrote, and the network inside a training program's checkpoint.

All that can be wrong with them is said in one line.
"""

from __future__ import annotations

import argparse
import errno
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from janus_ext.errors import CheckpointError
from janus_ext.runs.checkpoint import read_tensors

TIMM_TAKES = ("state_dict_ema", "model_ema", "state_dict", "model")  # the keys that timm looks under, in its order
AVERAGED = {"ema", "teacher"}  # words in the names of averaged weights, which are meant to be used
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class WeightFile:
    """A file of weights and what the user wrote to name it; as text, the beginning of every message about it."""

    flag: str
    path: str

    def __str__(self) -> str:
        return f"{self.flag} {self.path}"


def read_checkpoint(file: WeightFile) -> Mapping[str, Any]:
    """What a safetensors file, or one of ``torch.save`` (tensors only, no code is run), holds: possibly nested."""
    if file.path.endswith(".safetensors"):
        try:
            return read_tensors(Path(file.path))[0]
        except CheckpointError as error:
            raise CheckpointError(f"{file.flag} {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's and MAE's checkpoints keep their options
            checkpoint = torch.load(file.path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in any way
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is of one that was cut off
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if re.search("GLOBAL|TorchScript", str(error)):  # PyTorch's words for a function or class, and for a program
            reason = "needs code to be loaded and is refused: it must hold tensors only, convert it to safetensors"
            raise CheckpointError(f"{file} {reason}") from error
        raise _no_checkpoint(file) from error
    if not isinstance(checkpoint, Mapping):
        raise _no_checkpoint(file)
    return checkpoint


def _no_checkpoint(file: WeightFile) -> CheckpointError:
    return CheckpointError(f"{file} is truncated or not a PyTorch checkpoint, and not .safetensors or .npz")


def as_timm_takes_it(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The named tensors where timm looks for them: under "state_dict" or "model", or bare; without "module."."""
    from timm.models import clean_state_dict

    inner = next((checkpoint[key] for key in TIMM_TAKES if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    return clean_state_dict({str(key): value for key, value in inner.items()})


def find_network(file: WeightFile, checkpoint: Mapping[str, Any], wanted: set[str]) -> dict[str, Tensor] | None:
    """The tensors in a training program's checkpoint that lie under the one prefix which leads to the ``wanted`` names.

    A prefix is whatever keys and parts of names stand before them ("model_state_dict", Lightning's "model.", DINO's
    "teacher" and "backbone."); it must lead to half of the names at least, and what lies elsewhere is no part of the
    network. None where there is no such prefix.

    Raises:
        CheckpointError: several prefixes lead to the same names, and not just one of them to averaged weights.
    """
    tensors = dict(_flatten(checkpoint))
    found = Counter(prefix for name in tensors for prefix, rest in _splits(name) if rest in wanted)
    most = max(found.values(), default=0)
    if 2 * most < len(wanted):
        return None
    prefixes = [prefix for prefix, count in found.items() if count == most]
    averaged = [prefix for prefix in prefixes if AVERAGED & set(re.split(r"[._]", prefix))]
    chosen = averaged or prefixes
    if len(chosen) > 1:
        raise CheckpointError(f"{file} holds several such networks: {_some(chosen)}; save the one you mean by itself")
    return {name.removeprefix(chosen[0]): tensor for name, tensor in tensors.items() if name.startswith(chosen[0])}


def _flatten(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dictionaries, the keys joined by dots; of one that is met again nothing."""
    waiting, met = [("", checkpoint)], set()
    while waiting:
        prefix, values = waiting.pop()
        if id(values) in met:
            continue
        met.add(id(values))
        yield from ((f"{prefix}{key}", value) for key, value in values.items() if isinstance(value, Tensor))
        inner = [(f"{prefix}{key}.", value) for key, value in values.items() if isinstance(value, Mapping)]
        waiting += reversed(inner)


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """All ways to divide a dotted name into a prefix, with its dot or empty, and the rest."""
    yield "", name
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()], name[dot.end() :]


def check_named_tensors(file: WeightFile, tensors: Mapping[str, Any]) -> None:
    """CheckpointError, with names, where something is no tensor, or none that `check_tensors` takes."""
    if strangers := [key for key, value in tensors.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{file} must hold named tensors only, but others are {_some(strangers)}")
    check_tensors(str(file), tensors.items())


def check_tensors(what: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """CheckpointError with the names of the tensors of ``what`` that no network takes, or that hold NaN or infinity."""
    tensors = list(tensors)
    if odd := [f"{name}, {oddity}" for name, tensor in tensors if (oddity := _oddity(tensor))]:
        raise CheckpointError(f"{what} must hold tensors of float32, float64, float16 or bfloat16, got {_some(odd)}")
    if broken := [name for name, tensor in tensors if tensor.is_floating_point() and not _is_finite(tensor)]:
        raise CheckpointError(f"{what} holds NaN or infinity in {_some(broken)}: the weights are damaged")


def _oddity(tensor: Tensor) -> str:
    """What keeps a tensor from being one of weights; "" where nothing does, integers of a network's own among them."""
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
        return "which is not dense"
    if tensor.is_meta:
        return "which has no numbers"
    if tensor.dtype not in (*FLOATS, *INTEGERS):
        return f"which is {str(tensor.dtype).removeprefix('torch.')}"
    room = tensor.untyped_storage().nbytes()
    return f"{list(tensor.shape)} in {room} bytes" if tensor.numel() * tensor.element_size() > room else ""


def _is_finite(tensor: Tensor) -> bool:
    """Also in float32, in which a network holds it."""
    return bool((tensor.float() if tensor.dtype is torch.float64 else tensor).isfinite().all())


def check_kinds(what: str, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """CheckpointError where the model has floating-point numbers and the file integers, which would become weights."""
    wanted = {name for name, parameter in model.state_dict().items() if parameter.is_floating_point()}
    whole = [name for name, tensor in tensors.items() if name in wanted and not tensor.is_floating_point()]
    if whole:
        raise CheckpointError(f"{what} must hold floating-point weights, got integers in {_some(whole)}")


def sizes_of_npz(file: WeightFile) -> tuple[int, ...] | None:
    """(blocks, width, heads) of the image encoder in a JAX checkpoint, None where there is none; reads every array."""
    try:
        with open(file.path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}  # all of it: timm's loader would stop half way
        if strangers := [key for key, value in arrays.items() if not isinstance(value, np.ndarray)]:
            raise ValueError(f"{_some(strangers)} in it is no array")
        floats = {key: torch.from_numpy(value) for key, value in arrays.items() if value.dtype.kind == "f"}
    except Exception as error:  # of the file system, NumPy, zipfile or zlib
        raise CheckpointError(f"{file} cannot be read as .npz: {first_line(error)}") from error
    check_tensors(str(file), floats.items())
    queries = [arrays[key].shape for key in arrays if re.search(r"Transformer/encoderblock.*/query/kernel$", key)]
    if not queries:
        return None
    if len(queries[0]) not in (3, 4):
        raise CheckpointError(f"{file} must have queries [width, heads, d], stacked or not, got {list(queries[0])}")
    *stacked, width, heads, _ = queries[0]
    return (*(stacked or [len(queries)]), width, heads)


def misfit(error: Exception, given: Iterable[str]) -> str:
    """In one line what PyTorch says in a page: why the ``given`` tensors do not fit a module; "" of other errors."""
    text, given = str(error), list(given)
    shapes = re.findall(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", text)
    lines = {kind: re.search(rf"{kind} key\(s\) in state_dict: (.*)", text) for kind in ("Missing", "Unexpected")}
    keys = {kind: re.findall(r'"(.*?)"', line[1]) if line else [] for kind, line in lines.items()}
    if given and len(keys["Unexpected"]) == len(given):
        wanted = f"{_some(keys['Missing'])} were wanted" if keys["Missing"] else "none was wanted"
        return f"not one of its {len(given)} tensors has a name that belongs there: found {_some(given)}; {wanted}"
    parts = {
        "wrong shapes": [f"{key} wanted {wanted} found {found}" for key, found, wanted in shapes],
        "missing": keys["Missing"],
        "unexpected": keys["Unexpected"],
    }
    return "; ".join(f"{kind}: {_some(names)}" for kind, names in parts.items() if names)


def first_line(error: Exception) -> str:
    """What an error says, without the rest of its page."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _some(names: list[str]) -> str:
    """At most three names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
