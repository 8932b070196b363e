"""Who may know whom: the imports of each module, the includes and sources of the C++ side."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "janus_ext"
CSRC = ROOT / "csrc"

# A name stands for the module and, if it is a folder, all in it. All may know `errors`; entry points know everything.
ALLOWED = {
    "errors": set(),
    "_native": set(),
    "adapter": set(),
    "arguments": set(),
    "rectification": {"arguments"},
    "reference": {"rectification", "reference"},
    "processes": {"arguments"},
    "versions": {"processes"},
    "devices": {"arguments"},
    "terminal": {"arguments", "processes"},
    "ops": {"_native", "arguments", "ops", "rectification", "reference"},
    "protection": {"ops"},
    "statistics": {"ops", "processes"},
    "estimator": {"arguments", "ops", "processes", "protection", "statistics"},
    "margin": {"arguments", "ops"},
    "named_tensors": set(),
    "overflow": {"processes"},
    "heads": {"arguments", "heads", "margin", "named_tensors", "ops", "processes"},
    "peft_layers": {"adapter", "arguments"},
    "pairs": {"arguments", "ops", "lora_arguments", "peft_layers"},
    "rectified": {"arguments", "ops", "lora", "pairs", "peft_layers", "protection", "rectification"},
    "shared_inputs": {"estimator", "processes"},
    "rectifier": {"arguments", "estimator", "pairs", "processes", "rectification", "rectified", "shared_inputs"},
    "lora_arguments": {"arguments"},
    "lora": {"adapter", "arguments", "ops", "lora_arguments", "protection", "rectification"},
    "injection": {
        "adapter",
        "arguments",
        "backbone.families",
        "backbone.freezing",
        "backbone.places",
        "lora",
        "lora_arguments",
        "rectification",
    },
    "classifier": {"reference"},
    "torchvision_shim": {"backbone"},
    "plugins": {"arguments"},
    "config": {"arguments", "config", "plugins"},
    "backbone": {"arguments", "backbone", "runs.checkpoint"},
    # atomic files; the guard around torchvision's import
    "data": {"arguments", "backbone", "config", "data", "devices", "plugins", "processes", "runs.checkpoint"},
    "methods": {
        "adapter",
        "backbone.freezing",
        "backbone.places",
        "config.foreign",
        "estimator",
        "heads",
        "injection",
        "lora",
        "margin",
        "methods",
        "named_tensors",
        "overflow",
        "plugins",
        "processes",
        "protection",
        "rectification",
        "rectified",
    },
    "exports": {
        "adapter",
        "backbone",
        "classifier",
        "config",
        "data.images",
        "exports",
        "heads.base",
        "heads.expansion",
        "injection",
        "ops",
        "runs.checkpoint",
        "runs.metrics",
        "runs.settings",
        "versions",
    },
    "runs": {"arguments", "config", "processes", "runs"},
    "calibration": {"arguments"},
    "assembly": {
        "arguments",
        "backbone",
        "classifier",
        "config",
        "data.images",
        "devices",
        "heads",
        "methods",
        "plugins",
        "training.loop",
    },
    "past": {"data.images", "runs"},
    "learner": {
        "arguments",
        "assembly",
        "backbone",
        "calibration",
        "classifier",
        "data",
        "devices",
        "exports",
        "past",
        "processes",
        "reports",
        "runs",
        "training",
    },
    "reports": {"arguments", "config", "data.names", "reports", "runs"},
    "training": {
        "training",
        "arguments",
        "backbone.places",
        "config",
        "data.benchmark",
        "devices",
        "methods.base",
        "named_tensors",
        "overflow",
        "processes",
        "runs",
        "versions",
    },
}
ENTRY_POINTS = {"__init__", "train", "learn", "evaluate", "predict", "export", "info", "report"}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def runtime_imports(path: Path) -> set[str]:
    """Modules of ours that a file imports when it runs; imports for type checkers only do not count."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full here"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name for name in submodules if name.removeprefix("janus_ext.") in MODULES}
            found.update(known or {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name.removeprefix("janus_ext.") for name in found if name.startswith("janus_ext.")}


def covers(rule: str, module: str) -> bool:
    return module == rule or module.startswith(rule + ".")


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_it_may_know(module):
    if module in ENTRY_POINTS:
        return
    room = module.split(".")[0]
    assert room in ALLOWED, f"janus_ext/{module}: new here? Say in ALLOWED what it may know."
    allowed = ALLOWED[room] | {"errors"}
    strangers = {name for name in runtime_imports(MODULES[module]) if not any(covers(rule, name) for rule in allowed)}
    assert not strangers, f"{module} may know {sorted(allowed)}, but it imports {sorted(strangers)}"


def test_the_import_reader_sees_an_import(tmp_path):
    source = tmp_path / "m.py"
    source.write_text("from janus_ext import margin, ops\ndef f():\n    from janus_ext.methods.janus import Janus\n")
    assert runtime_imports(source) == {"margin", "ops", "methods.janus"}


def test_there_is_no_utils_module():
    assert not list(PACKAGE.rglob("util*.py"))


def sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in CSRC.rglob(pattern))


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)


def test_cmake_lists_exactly_the_sources_that_exist():
    listed = re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in sources("*.cpp", "*.cu"))


@pytest.mark.parametrize("path", sources("*.h", "*.cpp", "*.cu"), ids=lambda path: str(path.relative_to(CSRC)))
def test_includes(path):
    found = includes(path)
    assert "torch/extension.h" not in found, "torch/extension.h takes half a minute a file and brings Python along"
    assert "torch/torch.h" not in found and "torch/all.h" not in found, "include the headers of the ops that are used"
    if path.name != "bindings.cpp":
        assert not [name for name in found if name.startswith("pybind11/") or name == "Python.h"]
    if path.parent.name == "kernels":
        assert not [name for name in found if name.startswith(("ATen/", "c10/", "torch/"))], "kernels are torch-free"


# ------------------------------------------------------------------------------------------------------------ lengths

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60
OWN_FILES = [  # CI's copy of the checkout has no git to ask
    str(path.relative_to(ROOT))
    for folder in ("benchmarks", "cmake", "csrc", "examples", "janus_ext", "python_tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")
]


def function_lengths(source: str) -> dict[str, int]:
    """Lines of each function of a Python file, decorators not counted."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return {f"{f.name}, line {f.lineno}": f.end_lineno - f.lineno + 1 for f in found}


@pytest.mark.parametrize("name", OWN_FILES)
def test_no_file_and_no_function_is_too_long(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MOST_LINES, f"{name} has {lines} lines: cut it along a seam"
    lengths = function_lengths(text) if name.endswith(".py") else {}
    long = {function: n for function, n in lengths.items() if n > MOST_LINES_OF_A_FUNCTION}
    assert not long, f"{name}: functions of more than {MOST_LINES_OF_A_FUNCTION} lines: {long}"


def test_the_measure_counts_signature_and_body():
    assert function_lengths("@d\ndef f(\n    a,\n):\n    async def g():\n        a\n") == {
        "f, line 2": 5,
        "g, line 5": 2,
    }


PLUGINS = {"benchmark", "benchmark_weave", "worker_id", "testrun_uid"}  # fixtures of pytest-benchmark and pytest-xdist


@pytest.mark.parametrize("path", sorted((ROOT / "python_tests").glob("*.py")), ids=lambda path: path.stem)
def test_no_fixture_has_the_name_of_a_common_plugins(path):
    functions = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    fixtures = {f.name for f in functions if any("fixture" in ast.unparse(d) for d in f.decorator_list)}
    used = {a.arg for f in functions if f.name.startswith("test_") or f.name in fixtures for a in f.args.args}
    assert not (fixtures | used) & PLUGINS
