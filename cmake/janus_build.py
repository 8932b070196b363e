"""The build backend of janus-ext (PEP 517): scikit-build-core, plus one decision - which torch to build against.

A compiled op works only with the torch it was built for. pip builds in a folder of its own and hides the torch that is
installed; listing torch as a build requirement would download a second one, perhaps of another version. So: the
interpreter is asked, outside pip's isolation, for a torch that fits; only where there is none does the build ask for
one. CMake puts the same question (``python cmake/janus_build.py FILE``), so both answers agree, and so does the wheel:
its metadata ask for that minor version (:class:`TorchPin`), lest an installer bring another one beside the built ops.

Object files stay in ``build/`` for the next time; of a checkout that cannot be written they go to a temporary folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement
from packaging.version import Version

try:
    from scikit_build_core import build as _skbuild
    from scikit_build_core.build import *  # noqa: F403 - the hooks of PEP 517
    from scikit_build_core.build import get_requires_for_build_editable as _requires_for_editable
    from scikit_build_core.build import get_requires_for_build_wheel as _requires_for_wheel
except ImportError:  # run by CMake alone, without a PEP 517 front end
    _skbuild = _requires_for_editable = _requires_for_wheel = None

ROOT = Path(__file__).resolve().parent.parent
# -E leaves PYTHONPATH, through which pip isolates a build, out of account. The second try is the build's own torch.
INTERPRETERS = ([sys.executable, "-E"], [sys.executable])

PROBE = """
import json, os, sys
sys.path[:] = [p for p in sys.path if p not in ("", os.getcwd())]
try:
    import torch
except ImportError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({
        "version": torch.__version__,
        "cuda": torch.version.cuda or "",
        "abi": int(torch.compiled_with_cxx11_abi()),
        "root": os.path.dirname(torch.__file__),
    }))
"""


def torch_requirement() -> Requirement:
    """The torch that pyproject.toml asks for: the one place where the range is written."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return Requirement(re.search(r'"(torch\s*[<>=~!][^"]*)"', text).group(1))


def probe(interpreter: list[str]) -> dict:
    """What `interpreter` says about its torch: version, CUDA version, C++ ABI and folder, or why there is none."""
    run = subprocess.run([*interpreter, "-c", PROBE], capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        last = run.stderr.strip().splitlines()[-1:] or ["no output"]
        return {"error": f"`import torch` ended with exit status {run.returncode}: {last[0]}"}
    return json.loads(lines[-1])


def find_torch() -> tuple[dict | None, str]:
    """The first torch in range, or None and a sentence about what was found instead."""
    wanted, found = torch_requirement(), []
    for interpreter in INTERPRETERS:
        torch = probe(interpreter)
        if "error" in torch:
            found.append(torch["error"])
        elif wanted.specifier.contains(torch["version"], prereleases=True):
            return torch, ""
        else:
            found.append(f"torch {torch['version']} in {torch['root']}")
    return None, (
        f"janus-ext builds against {wanted}, but {sys.executable} has: {'; '.join(dict.fromkeys(found))}. "
        f"Either `pip install '{wanted}'` first, or `pip install .` without --no-build-isolation, which brings one."
    )


def _with_torch(requires: list[str]) -> list[str]:
    return requires if find_torch()[0] else [*requires, str(torch_requirement())]


def get_requires_for_build_wheel(config_settings=None):
    """Build requirements; torch among them only where none in range is installed."""
    return _with_torch(_requires_for_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    """The same for `pip install -e`."""
    return _with_torch(_requires_for_editable(config_settings))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """scikit-build-core's, in a folder that can be written."""
    with _build_folder(config_settings) as settings:
        return _skbuild.build_wheel(wheel_directory, settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """The same for `pip install -e`."""
    with _build_folder(config_settings) as settings:
        return _skbuild.build_editable(wheel_directory, settings, metadata_directory)


class TorchPin:
    """What a wheel's metadata add to the range of pyproject.toml: the minor version of torch that it is built for.

    A provider of ``[[tool.dynamic-metadata]]``. A source distribution keeps the range and says that wheels may differ.
    """

    def build_state(self, build_state: str) -> None:
        """Called first, with "sdist", "wheel", "editable" or the metadata of one of those two."""
        self.is_source = build_state == "sdist"

    def dynamic_metadata(self, settings, project) -> dict[str, list[str]]:
        """The requirements to add; without a torch in range, an error that says what was found."""
        if self.is_source:
            return {"dependencies": []}
        torch, error = find_torch()
        if torch is None:
            raise SystemExit(error)
        major, minor = Version(torch["version"]).release[:2]
        return {"dependencies": [f"torch=={major}.{minor}.*"]}

    def dynamic_wheel(self, settings) -> dict[str, bool]:
        """The fields in which a wheel may differ from its source distribution."""
        return {"dependencies": True}


@contextmanager
def _build_folder(settings: dict | None) -> Iterator[dict]:
    """Settings of the build, with a temporary folder where the project's own cannot be written."""
    if wrong := sorted(set(str(ROOT)) & set('"\\;|')):
        raise SystemExit(f"janus-ext cannot be built in {ROOT}: CMake and Ninja take no {' '.join(wrong)} in a path")
    settings = dict(settings or {})
    asked = {"build-dir", "skbuild.build-dir"} & settings.keys() or os.environ.get("SKBUILD_BUILD_DIR")
    if asked or _is_writable(ROOT / "build"):
        yield settings
    else:
        with TemporaryDirectory(prefix="janus-ext-build-") as folder:
            print(f"{ROOT / 'build'} cannot be written: building in {folder}")
            yield settings | {"build-dir": folder}


def _is_writable(build: Path) -> bool:
    """Whether this user can write the folder and the builds in it, or make it."""
    if not build.exists():
        return os.access(build.parent, os.W_OK | os.X_OK)
    folders = [build, *(path for path in build.iterdir() if path.is_dir())]
    return all(os.access(folder, os.R_OK | os.W_OK | os.X_OK) for folder in folders)


def write_cmake(path: Path) -> None:
    """Writes the facts about torch as CMake variables JANUS_TORCH_*; JANUS_TORCH_ERROR is empty if there is one."""
    torch, error = find_torch()
    facts = {"ERROR": error, **{key.upper(): value for key, value in (torch or {}).items()}}
    path.write_text("".join(f"set(JANUS_TORCH_{key} [==[{value}]==])\n" for key, value in facts.items()))


if __name__ == "__main__":
    write_cmake(Path(sys.argv[1]))
