"""Names of methods and benchmarks from elsewhere: what they stand for, what is refused, that no file imports code."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from janus_ext import plugins
from janus_ext.config import BenchmarkName, MethodName, Settings, TrainConfig
from janus_ext.config.foreign import METHOD, find_method, loaded_method
from janus_ext.errors import ArgumentError
from janus_ext.methods import METHODS, method_class, method_name
from janus_ext.methods.janus import Janus
from janus_ext.methods.lora import SequentialLoRA

SOURCE = """
from dataclasses import dataclass
from janus_ext.config import Settings
from janus_ext.methods.base import Method
from janus_ext.methods.janus import Janus
from janus_ext.methods.lora import SequentialLoRA

class Held(SequentialLoRA):
    @dataclass(frozen=True)
    class Own(Settings):
        strength: float = 0.1

class Open(Method):
    def trainable(self):
        return []

class Like(Janus):
    defaults = {"margin_weight": 0.25, "head": "lda"}
    limits = {"rectify": ("exact",)}

class Rapid(Janus):
    defaults = {"lr": 0.25, "drift_budget": 0.5}

def images(config):
    return 3

number = 7
"""


@pytest.fixture
def modules(tmp_path, monkeypatch) -> Path:
    """A folder whose modules can be imported, and are forgotten behind the test."""
    known = set(sys.modules)
    (tmp_path / "held.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in sys.modules.keys() - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def install(folder: Path, name: str, group: str, entries: str) -> None:
    """What an installed package leaves in ``folder`` for others to find."""
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{entries}\n")


# what a name stands for ----------------------------------------------------------------------------------------------
def test_built_in_names_are_the_built_in_methods():
    assert all(method_class(name) is METHODS[name] and find_method(name) is None for name in get_args(MethodName))
    assert {cls.like for cls in METHODS.values()} == set(METHODS)
    assert all(cls.like == name for name, cls in METHODS.items())


def test_a_class_is_found_by_its_module_and_name(modules):
    held = find_method("held:Held")
    assert held is sys.modules["held"].Held is method_class("held:Held") is loaded_method("held:Held")
    assert method_name(held) == method_name("held:Held") == "held:Held"


def test_a_built_in_class_has_its_built_in_name():
    assert method_name(Janus) == "janus"


def test_an_installed_package_gives_short_names(modules):
    install(modules, "others", "janus_ext.methods", "held = held:Held\njanus = held:Held")
    assert loaded_method("held") is sys.modules["held"].Held  # installed: a file may name it
    assert find_method("janus") is None and method_class("janus") is Janus
    assert TrainConfig(method="held", own={"strength": 2}).resolved().own == {"strength": 2.0}
    with pytest.raises(ArgumentError, match=r"must be one of .*, joint, held, janus, or .*'hled'; similar: held"):
        find_method("hled")
    install(modules, "more", "janus_ext.methods", "held = held:Like")
    with pytest.raises(ArgumentError, match="--method held is ambiguous, say which: held:Held or held:Like"):
        find_method("held")


def test_commands_look_in_the_current_folder_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(tmp_path)
    for name in (None, "janus"):
        assert plugins.typed(name) == name and str(tmp_path) not in sys.path
    assert plugins.typed("held:Held") == "held:Held" and sys.path[0] == str(tmp_path)


# what is refused -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jannus", f"--method must be one of {', '.join(get_args(MethodName))}, or package.module:Class, got 'jannus'"),
        ("jannus", "; similar: janus"),
        ("held.py:Held", "--method held.py:Held: no module held.py is installed or in the current folder"),
        (
            "nowhere.at.all:Held",
            "nowhere.at.all:Held: no module nowhere is installed or in the current folder",
        ),
        ("held:Hled", "--method held:Hled: module held has no Hled; similar: Held"),
        ("held:", "--method must be package.module:Class, as in `import package.module`, got 'held:'"),
        ("./held:Held", "--method must be package.module:Class"),
        ("held:Held:Own", "--method must be package.module:Class"),
        ("held:number", "wanted is a class that inherits janus_ext.methods.base.Method, got an object of type int"),
        ("held:Settings", "wanted is a class that inherits janus_ext.methods.base.Method, got class Settings"),
        ("held:Open", "the class leaves open what a method must have: close_task, shrink_update"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(modules, name, message):
    with pytest.raises(ArgumentError, match=re.escape(message)) as refusal:
        TrainConfig(method=name).resolved()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import torch\nimport nothing_like_it\n", "line 2: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("from torch import Tensr\n", "line 1: ImportError: cannot import name 'Tensr' from 'torch'"),
        ("x = 1\nx.y\n", "line 2: AttributeError: 'int' object has no attribute 'y'"),
        ("def f(:\n", "line 1: SyntaxError: "),
        ("import sys\n\nsys.exit(0)\n", "line 3: SystemExit: 0"),
    ],
)
def test_what_fails_in_the_module_itself_is_said_as_such(modules, source, message):
    (modules / "failing.py").write_text(source)
    where = f"--method failing:Held: importing failing failed at {modules}/failing.py, {message}"
    with pytest.raises(ArgumentError, match=re.escape(where)) as refusal:
        find_method("failing:Held")
    assert refusal.value.__cause__ is not None and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cifar10",
            f"--benchmark must be one of {', '.join(get_args(BenchmarkName))}, or package.module:function, got",
        ),
        ("cifar10", "similar: cifar100"),
        (
            "held:number",
            "--benchmark held:number: wanted is a function that gives a Benchmark, got an object of type int",
        ),
        ("gone:images", "--benchmark gone:images: no module gone is installed or in the current folder"),
    ],
)
def test_a_wrong_benchmark_says_what_is_wrong(modules, name, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        TrainConfig(benchmark=name).resolved()


def test_a_class_that_cannot_be_found_again_is_refused():
    class Local(SequentialLoRA):
        pass

    for strange in (Local, SequentialLoRA.trainable, 3):
        with pytest.raises(ArgumentError, match="method must be a name, or stand at the top level of a module"):
            method_name(strange)


# what a method declares ----------------------------------------------------------------------------------------------
def declaring(**attributes):
    return type("Declaring", (SequentialLoRA,), attributes)


@dataclass(frozen=True)
class Taken(Settings):
    rank: int = 3
    no_plots: bool = True


@dataclass(frozen=True)
class WithoutDefault(Settings):
    strength: float


@dataclass(frozen=True)
class OfNoRule(Settings):
    strength: "dict[str, int]" = None


class Forgotten(Settings):
    strength: float = 1.0


@dataclass(frozen=True)
class Misfit(Settings):
    strength: float = "much"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"Own": dict}, "Own must be a frozen dataclass that inherits janus_ext.config.Settings, got class dict"),
        ({"Own": Forgotten}, "Own must be a frozen dataclass that inherits janus_ext.config.Settings, got class Forg"),
        ({"Own": Taken}, "Own must have names of its own, rank, no_plots is taken"),
        ({"Own": WithoutDefault}, "Own cannot be made of its defaults: "),
        ({"Own": OfNoRule}, "Own cannot be made of its defaults: no rule for values annotated"),
        ({"Own": Misfit}, "Own cannot be made of its defaults: --strength must be a number, got 'much'"),
        ({"like": "janis"}, "like must be one of janus, lora, "),
        ({"defaults": {"strength": 1}}, "and strength is no setting"),
        ({"defaults": {"damping": 1.0}}, "and damping always has a value that the user has chosen"),
        ({"limits": {"strength": (1,)}}, "limits must name shared settings, strength is none"),
        ({"limits": {"rank": 8}}, "limits must be tuples of one or more values by name, got {'rank': 8}"),
        ({"limits": {"rank": ()}}, "limits must be tuples of one or more values by name"),
        ({"limits": {"rectify": ("none")}}, "limits must be tuples of one or more values by name"),  # no tuple
        ({"limits": ["rank"]}, "limits must be tuples of one or more values by name, got ['rank']"),
        ({"defaults": None}, "defaults must be values by name, got an object of type NoneType"),
        ({"defaults": {"rank"}}, "defaults must be values by name, got an object of type set"),
    ],
)
def test_what_a_class_may_not_declare(attributes, message):
    assert message in METHOD.fault(declaring(**attributes))


def test_a_class_that_declares_nothing_is_like_lora(modules):
    config, lora = TrainConfig(method="held:Held").resolved(), TrainConfig(method="lora").resolved()
    assert config.own == {"strength": 0.1} and lora.own is None
    differing = {"method", "own"}
    assert {k: v for k, v in config.to_json().items() if k not in differing} == {
        k: v for k, v in lora.to_json().items() if k not in differing
    }
    assert config.resolved() == config
    with pytest.raises(ArgumentError, match=re.escape("--method held:Held has no --rectify exact; it takes none")):
        TrainConfig(method="held:Held", rectify="exact").resolved()


def test_a_class_is_like_the_method_that_it_inherits_but_for_what_it_declares(modules):
    config = TrainConfig(method="held:Like", temperature=8.0).resolved()  # which it may read
    assert (config.rectify, config.estimator, config.margin, config.lr) == ("exact", "gram", 0.2, 4e-3)
    assert (config.margin_weight, config.head, config.drift_budget) == (0.25, "lda", 0.1)
    assert TrainConfig(method="held:Like", margin_weight=0.0).resolved().margin_weight == 0
    rapid = TrainConfig(method="held:Rapid").resolved()  # what a head brings along gives way to what is declared
    assert (rapid.lr, rapid.drift_budget, rapid.energy_start) == (0.25, 0.5, 0.999)
    with pytest.raises(ArgumentError, match=re.escape("--method held:Like has no --rectify tangent; it takes exact")):
        TrainConfig(method="held:Like", rectify="tangent").resolved()


@pytest.mark.parametrize(
    ("method", "own", "message"),
    [
        ("held:Held", {"strenth": 1}, "--method held:Held has no setting 'strenth' of its own; similar: strength"),
        ("held:Held", {"strength": "1"}, "--strength must be a number, got '1'"),
        ("janus", {"strength": 1}, "--method janus has no setting 'strength' of its own"),
    ],
)
def test_settings_of_a_methods_own_are_checked(modules, method, own, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        TrainConfig(method=method, own=own).resolved()


# what a file says ----------------------------------------------------------------------------------------------------
def test_a_name_from_a_file_imports_nothing(modules):
    message = "the method held:Held is not loaded, and no file makes this program import code: if you trust it, say "
    with pytest.raises(
        ArgumentError, match=re.escape(message + "--method held:Held, or import held before, in Python")
    ):
        method_class("held:Held")
    assert "held" not in sys.modules
    find_method("held:Held")
    assert method_class("held:Held").__name__ == "Held"


def test_a_module_that_imports_when_it_is_asked_is_not_asked(modules):
    (modules / "lazy.py").write_text("def __getattr__(name):\n    import held\n    return getattr(held, name)\n")
    import lazy  # noqa: F401

    with pytest.raises(ArgumentError, match="the method lazy:Held is not loaded"):
        loaded_method("lazy:Held")
    assert "held" not in sys.modules


@pytest.mark.parametrize("name", ["os:system", "janus_ext.methods.base:Method", "janus_ext.learner:ContinualLearner"])
def test_what_is_loaded_and_no_method_is_none(name):
    with pytest.raises(ArgumentError, match="wanted is a class|leaves open|is not loaded"):
        loaded_method(name)
