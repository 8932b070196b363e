"""Files of a run: every write goes to a temporary file first and is then moved into place, so none is ever half there.

Tensors are safetensors and the rest is JSON (null, never NaN): reading a stranger's run executes no code. A file of
tensors carries the SHA-256 of what is in it, and so does a sealed JSON file, so that one which was altered is noticed.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_ext.errors import ArgumentError, CheckpointError

SHA256 = "janus_ext_sha256"  # of a file of tensors, in its metadata; of a JSON file, beside its other values
OWN = {"config.json", "checkpoints"}  # what is replaced in a folder even where the new one has none
MOST_BYTES = 230  # of a name, to which others are appended; 255 is the end of it
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux's

NUMBERS = re.compile(r"\[\n( *)([-+.\w,\s]+?)\n *\]")  # a list of numbers, indented; no JSON text holds a line feed
LINE, SHORT = 120, 90  # columns; those of a list that has a line with its key


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON, where NaN and infinity are null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, lists of numbers in lines; NaN and infinity become null."""
    text = NUMBERS.sub(_in_lines, to_json(value, indent=2)) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """The same of an object, with the SHA-256 of what it holds: `read_json` compares."""
    write_json(path, {**value, SHA256: _sha256_of_json(value)})


def _in_lines(numbers: re.Match[str]) -> str:
    """A list of numbers on one line, or filled lines where it is longer."""
    indent, text = numbers[1], " ".join(numbers[2].split())
    if len(text) <= SHORT:
        return f"[{text}]"
    return f"[\n{textwrap.fill(text, LINE, initial_indent=indent, subsequent_indent=indent)}\n{indent[2:]}]"


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run; CheckpointError when it is no JSON object, cannot be read, or was altered since its seal."""
    return read_sealed_json(path)[0]


def read_sealed_json(path: Path) -> tuple[dict[str, Any], str]:
    """The same, and the SHA-256 that it was sealed with, "" where it was not."""
    require_regular(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} cannot be read: it holds no object")
        seal = value.pop(SHA256, None)
        altered = seal is not None and seal != _sha256_of_json(value)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if altered:
        raise CheckpointError(f"{path} was altered: its SHA-256 is not the one that it was written with")
    return value, seal or ""


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(to_json(value).encode()).hexdigest()


def require_regular(path: Path) -> None:
    """CheckpointError where there is something that is no file: a pipe would be waited for, for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{path} cannot be read: it is no file")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that `append_json_line` wrote, without a last one that was cut off; none where there is no file."""
    require_regular(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        values = [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not all(isinstance(value, dict) for value in values):
        raise CheckpointError(f"{path} cannot be read: a line holds no object")
    return values


def write_json_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of such lines."""
    text = "".join(to_json(value) + "\n" for value in values)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Appends one line of JSON and flushes it to the disk."""
    try:
        is_new = not path.exists()
        with path.open("a", encoding="utf-8") as file:
            file.write(to_json(value) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Writes named tensors (any device; stored on the CPU, own memory each) as safetensors, and the SHA-256 of it all.

    Returns the SHA-256.
    """
    from safetensors.torch import save

    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    about = dict(metadata or {})
    about[SHA256] = _sha256(stored, about)
    # not save_file: it has a temporary file of its own, which a kill would leave behind for ever
    parts = _with_sorted_metadata(save(stored, about))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines(parts)

    replace_file(path, write)
    return about[SHA256]


def _with_sorted_metadata(data: bytes) -> tuple[bytes, memoryview]:
    """A safetensors file with its metadata in the order of their names, which the library leaves to chance, in parts.

    It is the length of a header in 8 bytes, the header in JSON, padded with spaces to whole 8 bytes, and the tensors.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, memoryview(data)[8 + length :]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(named CPU tensors, metadata) of a safetensors file.

    Raises:
        CheckpointError: it is missing or truncated, or it says its SHA-256 and has another.
    """
    from safetensors import SafetensorError, safe_open

    require_regular(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if SHA256 in about and about[SHA256] != _sha256(tensors, about):
        raise CheckpointError(f"{path} was altered: its SHA-256 is not the one that it was written with")
    return tensors, about


def _sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of names, types, shapes and bytes, and of the other metadata."""
    digest = hashlib.sha256(to_json({key: metadata[key] for key in sorted(metadata) if key != SHA256}).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    require_regular(Path(path))
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def remove(paths: Iterable[Path]) -> None:
    """Removes files, of which some may be missing."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be removed: {error}") from error


def make_folder(path: Path) -> Path:
    """Creates a folder and its parents, and flushes their names to the disk."""
    try:
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in new:
            sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(f"the folder {path} cannot be made: {error}") from error
    return path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a file beside ``path``, flushes it to the disk and moves it over ``path``."""
    temporary = _beside(path)
    try:
        temporary.unlink(missing_ok=True)  # a link there would lead elsewhere
        write(temporary)
        _sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):  # where nothing can be written nothing can be deleted
            temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, of this process; shortened where a file system would not take it."""
    name = path.name
    if len(os.fsencode(name)) > MOST_BYTES:
        name = os.fsencode(name)[:MOST_BYTES].decode("utf-8", "ignore")
    return path.with_name(f".{name}.{os.getpid()}.tmp")


def _sync_file(path: Path) -> None:
    """Flushes what is in a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """Flushes a folder, its files and folders to the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        else:
            _sync_file(path)


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, else a file moved there may be lost with the power."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # one may write in a folder that one may not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(handle)


def check_replaceable(folder: str | Path) -> Path:
    """The folder that ``folder`` stands for, links followed, in whose place `replace_folder` may put another.

    Raises:
        ArgumentError: it is a file, or the current folder, or one above that.
    """
    place = Path(os.path.realpath(folder))
    if os.path.lexists(place) and not place.is_dir():
        raise ArgumentError(f"{folder} is a file; wanted is a folder, or a name that is free")
    if Path.cwd().is_relative_to(place):
        raise ArgumentError(f"{str(folder)!r} is the current folder or one above it; name another folder")
    return place


def require_replaceable(folder: Path) -> None:
    """Puts a folder beside ``folder``, which is empty, in its place and back, as `replace_folder` will one day.

    Raises:
        CheckpointError: a mount point keeps its place, and beside a folder one may not write in there is none.
    """
    made = _beside(folder)
    try:
        make_folder(made)
        _exchange(made, folder)
        _exchange(made, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} is a folder that cannot be replaced as a whole: {error.strerror}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def replace_folder(folder: str | Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a new folder beside ``folder``, then puts it in that one's place, in one step.

    A link stays and what it leads to is replaced. Files that ``write`` does not make stay, but for what `OWN` names.
    After an error, and after Ctrl-C, the folder is as it was, unless the disk fails as it is told to keep the new one.

    Raises:
        ArgumentError: see `check_replaceable`.
        CheckpointError: it cannot be written.
    """
    place = check_replaceable(folder)
    made = _beside(place)
    shutil.rmtree(made, ignore_errors=True)  # of a process that was killed and had the same number
    try:
        make_folder(made)
        write(made)
        if place.exists():
            _copy_others(place, made)
            _exchange(made, place)
        else:
            os.replace(made, place)
        sync_folder(place.parent)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)  # what was in the folder before, or was to be


def _copy_others(folder: Path, made: Path) -> None:
    """Copies the files that somebody else has put into ``folder``."""
    ours = OWN | {path.name for path in made.iterdir()}
    shutil.copytree(
        folder,
        made,
        symlinks=True,
        copy_function=_copy_synced,
        ignore=lambda place, names: ours if Path(place) == folder else (),
        dirs_exist_ok=True,
    )


def _copy_synced(source: str, target: str) -> None:
    """The original is deleted soon, so that the copy has to be on the disk."""
    shutil.copy2(source, target)
    _sync_file(Path(target))


def _exchange(made: Path, place: Path) -> None:
    """Lets two folders change their names: at once, or where the system cannot do that, so that an error undoes it."""
    if _exchange_at_once(made, place):
        return
    old = made.with_name(f"{made.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        os.replace(place, old)
        os.replace(made, place)
    except BaseException:
        if not place.exists():
            os.replace(old, place)
        raise
    os.replace(old, made)


def _exchange_at_once(made: Path, place: Path) -> bool:
    """False where the C library or the file system cannot do it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(made), AT_FDCWD, os.fsencode(place), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(place))


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinite numbers replaced by None, containers rebuilt."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
