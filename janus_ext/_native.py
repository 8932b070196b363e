"""Loads the compiled ops, once, and keeps the reason if it cannot.

``janus_ext/ops`` defines the op schemas with their plain-torch kernels inside :func:`loading`; the libraries put their
C++ and CUDA kernels over them. Without the libraries everything works, only slower, so a missing library is one
warning with the reason, and an error where ``JANUS_EXT_REQUIRE_NATIVE=1`` forbids the fallback (CI does).

The libraries lie beside this file in an installed package. When the package runs from a source checkout or is installed
in editable mode, they lie with the installed distribution, and are taken from there.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from janus_ext.errors import NativeError, warn

DISTRIBUTION = "janus-ext"
OPS, OPS_CUDA, RECORD = "libjanus_ops.so", "libjanus_ops_cuda.so", "_C"
REINSTALL = "pip install --force-reinstall --no-deps ."
PACKAGE = Path(__file__).resolve().parent


@dataclass
class _State:
    """What one attempt to load found; an empty reason means loaded."""

    reason: str = ""
    cuda_reason: str = ""
    record: dict = field(default_factory=dict)
    folder: Path | None = None


_state: _State | None = None


def load() -> None:
    """Loads the libraries at the first call; later calls only repeat the error, if there is one.

    Raises NativeError if they cannot be loaded and JANUS_EXT_REQUIRE_NATIVE=1, otherwise warns once with the reason.
    """
    first = _state is None
    state = _loaded()
    if _diagnosing():
        return
    if required():
        require()
    for note in _notes(state) if first else ():
        warn(note)


@contextmanager
def loading() -> Iterator[None]:
    """Loads the libraries, then runs the block, in which the op schemas are defined.

    In this order, a kernel that does not fit its schema (a library older than the checkout) is an error of the
    definition, raised as NativeError. A library loaded over such schemas would abort the process instead.
    """
    load()
    try:
        yield
    except RuntimeError as error:
        if not available() or "schema" not in str(error):
            raise
        raise NativeError(f"the library in {folder()} was built for other ops: {REINSTALL}\n{error}") from error


def available() -> bool:
    """Whether the compiled CPU ops are loaded."""
    return not _loaded().reason


def cuda_available() -> bool:
    """Whether the compiled CUDA ops are loaded; says nothing about a GPU being present."""
    state = _loaded()
    return not state.reason and not state.cuda_reason


def reason() -> str:
    """Why the compiled CPU ops are not loaded: one sentence with the way out; empty if they are."""
    return _loaded().reason


def cuda_reason() -> str:
    """Why the compiled CUDA ops are not loaded; empty if they are."""
    state = _loaded()
    return state.cuda_reason if not state.reason else "the compiled CPU ops are missing too"


def require() -> None:
    """Raises NativeError with the reason unless the compiled CPU ops are loaded."""
    if reason():
        raise NativeError(f"the compiled ops of janus_ext are asked for and not loaded: {reason()}")


def required() -> bool:
    """Whether the environment forbids the plain-torch fallback: JANUS_EXT_REQUIRE_NATIVE=1."""
    return os.environ.get("JANUS_EXT_REQUIRE_NATIVE", "") not in ("", "0")


def build_info() -> dict:
    """The build record: versions of janus_ext, torch, CUDA and Python built against, compilers, CUDA architectures.

    Empty if there is no library; present, for the report, if there is one that does not fit.
    """
    return dict(_loaded().record)


def folder() -> Path | None:
    """Where the libraries were found, or None."""
    return _loaded().folder


def _loaded() -> _State:
    global _state
    if _state is None:
        _state = _attempt()
    return _state


def _diagnosing() -> bool:
    """Whether this process is `janus_ext.info`: the one program that must start without the library, to say why."""
    return any(Path(argument).name == "janus_ext.info" for argument in sys.orig_argv)


def _attempt() -> _State:
    state = _State()
    state.folder = _find_folder()
    if state.folder is None:
        state.reason = _missing()
        return state
    state.record, state.reason = _read_record(state.folder)
    state.reason = state.reason or _mismatch(state.record, torch.__version__) or _load_library(state.folder / OPS)
    if not state.reason:
        state.cuda_reason = _load_cuda(state)
    return state


def _find_folder() -> Path | None:
    """The folder of the compiled libraries: beside this file, else with the installed distribution."""
    if (PACKAGE / OPS).exists():
        return PACKAGE
    try:
        files = importlib.metadata.distribution(DISTRIBUTION).files or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(file.locate()) for file in files if file.name == OPS)
    return next((path.resolve().parent for path in found if path.exists()), None)


def _missing() -> str:
    here = f"{OPS} is neither in {PACKAGE} nor in an installed {DISTRIBUTION}"
    return f"{here}: install the project with `pip install .` in its folder (a C++20 compiler is needed)."


def _read_record(where: Path) -> tuple[dict, str]:
    """The build record of the libraries in `where`, from the extension module there; it links no torch."""
    candidates = [where / (RECORD + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        version = ".".join(map(str, sys.version_info[:2]))
        return {}, f"the libraries in {where} were built for another Python than this {version}: {REINSTALL}"
    spec = importlib.util.spec_from_file_location(f"janus_ext.{RECORD}", path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return {}, f"{path} cannot be loaded ({error}): {REINSTALL}"
    sys.modules[spec.name] = module
    return module.build_info(), ""


def _minor(version: str) -> str:
    """'2.13' of '2.13.0+cpu': torch keeps its C++ interface within a minor version only."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _mismatch(record: dict, found: str) -> str:
    """Why libraries with this record cannot serve the torch that was found; empty if they can."""
    built, cuda = record["torch"], record["torch_cuda"]
    if _minor(built) != _minor(found):
        return f"built for torch {built}, you have {found}: {REINSTALL}"
    if record["cxx11_abi"] != torch.compiled_with_cxx11_abi():
        return f"built for torch {built} with another C++ ABI than your torch {found}: {REINSTALL}"
    if record["cuda_ops"] and torch.version.cuda and cuda.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"built for torch {built} with CUDA {cuda}, you have CUDA {torch.version.cuda}: {REINSTALL}"
    return ""


def _load_library(path: Path) -> str:
    """Loads one op library, which registers its kernels; the reason if that fails."""
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path} cannot be loaded ({str(error).splitlines()[0]}): {REINSTALL}"
    return ""


def _load_cuda(state: _State) -> str:
    """Loads the CUDA ops where there are any and torch has CUDA; the reason if not."""
    if not state.record["cuda_ops"]:
        return state.record["cuda_reason"]
    if torch.version.cuda is None:
        return f"built for a CUDA torch ({state.record['torch']}), and torch {torch.__version__} has no CUDA"
    return _load_library(state.folder / OPS_CUDA)


def _checkout_version() -> str:
    """The version in the pyproject.toml above this file, if the package runs from a source checkout; else empty."""
    project = PACKAGE.parent / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.exists() else ""
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    return found.group(1) if found and f'name = "{DISTRIBUTION}"' in text else ""


def _notes(state: _State) -> list[str]:
    """The warnings that this outcome deserves: none in the good case."""
    if state.reason:
        return [f"janus_ext runs its plain-torch kernels, which are slower: {state.reason}"]
    notes, checkout, installed = [], _checkout_version(), state.record["version"]
    if checkout and checkout != installed:
        notes.append(f"the compiled library is janus-ext {installed}, this checkout is {checkout}: {REINSTALL}")
    if state.cuda_reason and torch.version.cuda and torch.cuda.device_count():
        notes.append(f"janus_ext runs its plain-torch kernels on the GPU, which are slower: {state.cuda_reason}")
    return notes
