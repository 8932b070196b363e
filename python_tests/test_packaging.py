"""The installed package: finding and refusing the compiled library, the build record, `janus_ext.info`, the backend."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from janus_ext import _native, info, ops
from janus_ext.errors import NativeError

ROOT = Path(__file__).resolve().parents[1]
needs_native = pytest.mark.skipif(not _native.available(), reason=_native.reason())


def run(*arguments, cwd, **environment):
    """Runs this Python in a folder; the environment of the tests does not decide whether the library is required."""
    env = {key: value for key, value in os.environ.items() if key not in ("JANUS_EXT_REQUIRE_NATIVE", "PYTHONPATH")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=env | environment, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the Python sources without compiled libraries, as a clone would have them; version 9.9.9."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "assets")
    shutil.copytree(ROOT / "janus_ext", tmp_path / "janus_ext", ignore=ignore)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "janus-ext"\nversion = "9.9.9"\n')
    return tmp_path


@pytest.fixture
def bare_checkout(checkout):
    """The same where no library is installed: a distribution of the same name, found first, that holds no files."""
    metadata = checkout / "janus_ext-9.9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: janus-ext\nVersion: 9.9.9\n")
    (metadata / "RECORD").write_text("")
    return checkout


@pytest.fixture
def fresh_state(monkeypatch):
    """`_native` as it is before the first load; its present state comes back afterwards."""
    monkeypatch.setattr(_native, "_state", None)
    monkeypatch.setenv("JANUS_EXT_REQUIRE_NATIVE", "1")
    return monkeypatch


# -------------------------------------------------------------------------------------------------- finding the library


@needs_native
def test_the_build_record_is_complete_and_fits_this_torch():
    record = _native.build_info()
    assert record["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert record["torch_cuda"] == (torch.version.cuda or "")
    assert record["cplusplus"] >= 202002
    assert record["compiler"] and record["version"] and record["python"]
    assert record["cuda_ops"] != bool(record["cuda_reason"])
    assert bool(record["cuda_architectures"]) == record["cuda_ops"] == bool(record["nvcc"])


@needs_native
def test_every_op_has_a_compiled_cpu_kernel():
    assert {op: info.kernels(op)[0] for op in ops.OPS} == dict.fromkeys(ops.OPS, "compiled")


@needs_native
def test_the_libraries_have_no_cxx_library_of_their_own():
    """Linked in statically, it would write numbers into error messages with the locale of torch's, and crash."""
    libraries = [p for p in _native.folder().glob("*.so") if p.name.startswith(("libjanus", "_C."))]
    assert len(libraries) >= 2
    assert [p.name for p in libraries if b"\0libstdc++.so.6\0" not in p.read_bytes()] == []


@needs_native
def test_loading_twice_changes_nothing():
    before = _native.folder()
    _native.load()
    _native.require()
    assert _native.folder() == before


@needs_native
def test_a_checkout_uses_the_installed_library_and_says_when_its_version_differs(checkout):
    result = run("-m", "janus_ext.info", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert f"compiled CPU ops: loaded from {_native.folder()}" in result.stdout

    result = run("-c", "import janus_ext.ops; print(janus_ext.ops.__file__)", cwd=checkout)
    assert result.stdout.strip() == str(checkout / "janus_ext" / "ops" / "__init__.py")
    installed = _native.build_info()["version"]
    assert f"the compiled library is janus-ext {installed}, this checkout is 9.9.9: pip install" in result.stderr


@needs_native
def test_one_openmp_runtime_in_the_process(tmp_path):
    code = (
        "import torch; from janus_ext import ops; torch.ones(9).sum(); "
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rsplit('/', 1)[-1]})"
    )
    result = run("-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("libgomp") + result.stdout.count("libiomp") + result.stdout.count("libomp") == 1


# ------------------------------------------------------------------------------------------------- refusing the library


def test_a_missing_library_is_one_warning_with_the_way_out(bare_checkout):
    code = "from janus_ext import ops, _native; _native.load(); print(_native.available(), _native.cuda_available())"
    result = run("-c", code, cwd=bare_checkout)
    assert result.stdout.split() == ["False", "False"], result.stderr
    assert result.stderr.count("Warning") == 1
    assert "install the project with `pip install .`" in result.stderr


def test_a_required_library_that_is_missing_stops_the_import(bare_checkout):
    result = run("-c", "import janus_ext.ops", cwd=bare_checkout, JANUS_EXT_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "NativeError: the compiled ops of janus_ext are asked for and not loaded: libjanus_ops.so" in result.stderr


@needs_native
@pytest.mark.parametrize("found", ["2.10.1", "2.99.0+cu130"])
def test_another_torch_is_refused_with_both_versions(fresh_state, found):
    fresh_state.setattr(torch, "__version__", found)
    built = "built for torch [^,]+, you have " + found.replace(".", r"\.").replace("+", r"\+")
    with pytest.raises(NativeError, match=built + r": pip install --force-reinstall --no-deps \."):
        _native.load()
    assert not _native.available()


def record(**changes):
    abi = torch.compiled_with_cxx11_abi()
    return {"torch": "2.13.0", "torch_cuda": "", "cxx11_abi": abi, "cuda_ops": False, **changes}


def test_mismatch_compares_minor_versions_only():
    assert _native._mismatch(record(), "2.13.4+cpu") == ""
    assert _native._mismatch(record(), "2.12.1") == (
        "built for torch 2.13.0, you have 2.12.1: pip install --force-reinstall --no-deps ."
    )


def test_mismatch_of_abi_and_of_cuda(monkeypatch):
    other = record(cxx11_abi=not torch.compiled_with_cxx11_abi())
    assert "another C++ ABI than your torch 2.13.0" in _native._mismatch(other, "2.13.0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    wrong = record(cuda_ops=True, torch_cuda="13.0")
    assert "with CUDA 13.0, you have CUDA 12.8" in _native._mismatch(wrong, "2.13.0")


@needs_native
def test_a_library_of_another_python_is_refused(fresh_state):
    fresh_state.setattr(_native.importlib.machinery, "EXTENSION_SUFFIXES", [".cpython-399.so"])
    with pytest.raises(NativeError, match="were built for another Python than this 3"):
        _native.load()


@needs_native
def test_a_library_built_for_other_schemas_is_an_error_and_no_abort(tmp_path):
    code = (
        "import torch; from janus_ext import _native; library = torch.library.Library('janus_ext', 'DEF')\n"
        "with _native.loading(): library.define('margin_loss(Tensor features) -> Tensor')"
    )
    (tmp_path / "janus_ext").mkdir()
    (tmp_path / "janus_ext" / "__init__.py").touch()
    for name in ("_native.py", "errors.py"):
        shutil.copy(ROOT / "janus_ext" / name, tmp_path / "janus_ext" / name)
    result = run("-c", code, cwd=tmp_path)
    assert result.returncode == 1
    assert f"the library in {_native.folder()} was built for other ops: pip install" in result.stderr


def test_a_library_that_does_not_load_names_itself(tmp_path):
    broken = tmp_path / "libjanus_ops.so"
    broken.write_bytes(b"not a library")
    assert str(broken) in _native._load_library(broken)


# ------------------------------------------------------------------------------------------------------ janus_ext.info


def test_info_prints_every_op_and_ends_with_zero():
    result = run("-m", "janus_ext.info", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.split()]
    assert [row for row in rows if row in ops.OPS] == list(ops.OPS)
    for word in ("built with", "autograd", "compiled CPU ops:", "compiled CUDA ops:", "GPU:", torch.__version__):
        assert word in result.stdout


def test_info_still_reports_where_a_required_library_is_missing(bare_checkout):
    result = run("-m", "janus_ext.info", cwd=bare_checkout, JANUS_EXT_REQUIRE_NATIVE="1")
    assert result.returncode == 1, result.stderr
    assert "reference" in result.stdout and "install the project with `pip install .`" in result.stdout
    assert run("-m", "janus_ext.info", cwd=bare_checkout).returncode == 0


def test_every_op_has_a_fake_kernel():
    assert {op: info.kernels(op)[2] for op in ops.OPS} == dict.fromkeys(ops.OPS, "yes")


# --------------------------------------------------------------------------------------------------- the build backend


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("packaging")
    spec = importlib.util.spec_from_file_location("janus_build", ROOT / "cmake" / "janus_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_requires_for_wheel", lambda settings: ["ninja"], raising=False)
    return module


@pytest.mark.parametrize(
    ("answer", "asks"),
    [
        ({"version": "2.13.0+cpu", "root": "/t"}, False),
        ({"version": "2.10.0", "root": "/t"}, True),
        ({"version": "2.16.0.dev1", "root": "/t"}, True),
        ({"error": "No module named 'torch'"}, True),
    ],
)
def test_the_build_asks_for_torch_only_where_none_fits(backend, monkeypatch, answer, asks):
    monkeypatch.setattr(backend, "probe", lambda interpreter: answer)
    requires = backend.get_requires_for_build_wheel()
    assert ("torch" in " ".join(requires)) == asks
    assert requires[0] == "ninja"


def test_a_torch_out_of_range_is_named_with_the_range_and_the_way_out(backend, monkeypatch):
    monkeypatch.setattr(backend, "probe", lambda interpreter: {"version": "2.10.0", "root": "/t"})
    torch_found, error = backend.find_torch()
    assert torch_found is None
    assert "torch<2.16,>=2.11" in error and "torch 2.10.0 in /t" in error and "without --no-build-isolation" in error


@pytest.mark.parametrize(("version", "pin"), [("2.13.0+cpu", "torch==2.13.*"), ("2.15.1.post2", "torch==2.15.*")])
@pytest.mark.parametrize("state", ["wheel", "editable", "metadata_wheel", "metadata_editable"])
def test_a_wheel_asks_for_the_minor_version_of_torch_that_it_was_built_for(backend, monkeypatch, version, pin, state):
    monkeypatch.setattr(backend, "probe", lambda interpreter: {"version": version, "root": "/t"})
    provider = backend.TorchPin()
    provider.build_state(state)
    assert provider.dynamic_metadata({}, {}) == {"dependencies": [pin]}
    assert provider.dynamic_wheel({}) == {"dependencies": True}


def test_a_source_distribution_keeps_the_range_and_needs_no_torch(backend, monkeypatch):
    monkeypatch.setattr(backend, "probe", lambda interpreter: {"error": "No module named 'torch'"})
    provider = backend.TorchPin()
    provider.build_state("sdist")
    assert provider.dynamic_metadata({}, {}) == {"dependencies": []}
    provider.build_state("metadata_wheel")
    with pytest.raises(SystemExit, match="builds against torch<2.16,>=2.11, but .* No module named 'torch'"):
        provider.dynamic_metadata({}, {})


@needs_native
def test_the_installed_metadata_ask_for_the_torch_of_the_ops():
    asked = [line for line in importlib.metadata.requires("janus-ext") if line.startswith("torch==")]
    assert asked == [f"torch=={_native._minor(_native.build_info()['torch'])}.*"]


def test_cmake_is_told_the_running_torch(backend, tmp_path):
    backend.write_cmake(tmp_path / "facts.cmake")
    facts = (tmp_path / "facts.cmake").read_text()
    assert f"set(JANUS_TORCH_VERSION [==[{torch.__version__}]==])" in facts
    assert "set(JANUS_TORCH_ERROR [==[]==])" in facts


@pytest.fixture
def built(backend, monkeypatch, tmp_path):
    """Builds with a recorded scikit-build-core in a made-up checkout; returns the settings that it was given."""

    class Recorder:
        def build_wheel(self, wheel_directory, settings, metadata_directory):
            self.settings = settings | {"existed": Path(settings.get("build-dir", tmp_path)).is_dir()}
            return "janus_ext.whl"

        build_editable = build_wheel

    def build(hook, root, settings=None):
        monkeypatch.setattr(backend, "ROOT", root)
        monkeypatch.setattr(backend, "_skbuild", Recorder())
        assert getattr(backend, hook)("wheels", settings) == "janus_ext.whl"
        return backend._skbuild.settings

    return build


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
@pytest.mark.parametrize("locked", [".", "build", "build/cp311"])
def test_a_checkout_that_cannot_be_written_is_built_in_a_temporary_folder(built, monkeypatch, tmp_path, hook, locked):
    if locked != ".":
        (tmp_path / "build" / "cp311").mkdir(parents=True)
    assert "build-dir" not in built(hook, tmp_path)
    allowed = os.access
    closed = tmp_path / locked  # by hand: root may write everything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and allowed(path, mode))
    settings = built(hook, tmp_path, {"cmake.define.JANUS_CUDA": "OFF"})
    assert settings["existed"] and not Path(settings["build-dir"]).exists()
    assert settings["cmake.define.JANUS_CUDA"] == "OFF"
    assert not Path(settings["build-dir"]).is_relative_to(tmp_path)
    assert built(hook, tmp_path, {"build-dir": "mine"})["build-dir"] == "mine"


@pytest.mark.parametrize("name", ['a"b', "a;b", "a|b", "a\\b"])
def test_a_folder_name_that_no_build_tool_takes_is_refused_at_once(built, tmp_path, name):
    with pytest.raises(SystemExit, match="janus-ext cannot be built in .*: CMake and Ninja take no . in a path"):
        built("build_wheel", tmp_path / name)
    assert built("build_wheel", tmp_path / "it's janus (1) [é] & more")["existed"]


def test_the_installed_package_has_every_file_of_the_source():
    """A pattern that keeps something out of the sources' archive may keep a room of the package out of the wheel."""
    installed = importlib.metadata.files("janus-ext") or []
    if not any(str(path) == "janus_ext/__init__.py" for path in installed):
        pytest.skip("an editable installation has no files of its own")
    root = Path(__file__).resolve().parents[1]
    wanted = {path.relative_to(root).as_posix() for path in (root / "janus_ext").rglob("*") if path.is_file()}
    wanted = {path for path in wanted if "__pycache__" not in path and not path.endswith(".so")}
    missing = sorted(wanted - {path.as_posix() for path in installed})
    assert not missing, f"not installed: {missing[:5]}; is the installation older than the source?"
