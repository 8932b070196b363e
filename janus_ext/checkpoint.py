"""Files of a run: every write goes to a temporary file first and is then moved into place, so none is ever half there.

Tensors are safetensors and the rest is JSON (null, never NaN): reading a stranger's run executes no code.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from janus_ext.errors import CheckpointError


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON, where NaN and infinity are null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON; NaN and infinity become null."""
    text = to_json(value, indent=2) + "\n"
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run; CheckpointError when it is no JSON object, or cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no object")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that `append_json_line` wrote, without a last one that was cut off; none where there is no file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def write_json_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of such lines."""
    text = "".join(to_json(value) + "\n" for value in values)
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Appends one line of JSON and flushes it."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(to_json(value) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes named tensors (any device; stored on the CPU, own memory each) as safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        _replace(path, lambda temporary: save_file(stored, str(temporary), dict(metadata or {})))
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(named CPU tensors, metadata) of a safetensors file; CheckpointError if it is missing, truncated or altered."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def remove(paths: Iterable[Path]) -> None:
    """Removes files, of which some may be missing."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be removed: {error}") from error


def make_folder(path: Path) -> Path:
    """Creates a folder and its parents."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder {path} cannot be made: {error}") from error
    return path


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a file beside ``path``, flushes it to the disk and moves it over ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinite numbers replaced by None, containers rebuilt."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
