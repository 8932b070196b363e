"""A method and a benchmark in files of somebody's own: through every command, resumed, saved, and by a stranger."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import trees
from conftest import make_trainer, weights_of, without_time
from learners import SETTINGS, assert_same, learner_of, state_of
from results import set_settings
from test_methods import CutOffLearner, comparable

from janus_ext import ContinualLearner, evaluate, export, learn, predict, report, train
from janus_ext.config import TrainConfig
from janus_ext.data import load_benchmark
from janus_ext.errors import ArgumentError, CheckpointError, DataError
from janus_ext.methods.base import Method, TaskReport
from janus_ext.methods.janus import Janus
from janus_ext.runs import checkpoint
from janus_ext.runs.choice import choose_folder
from janus_ext.runs.run import Run

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FLAGS = "--rank 4 --epochs 2 --batch-size 8 --lr 0.01 --amp off --device cpu --no-plots --backbone emoji"
METHOD = (EXAMPLES / "own_method.py").read_text(encoding="utf-8")
BENCHMARK = (EXAMPLES / "own_benchmark.py").read_text(encoding="utf-8")
OTHERS = """
from dataclasses import replace

import torch
from janus_ext.data.benchmark import MemorySplit
from shapes_here import shapes

def nothing(config):
    return None

def mislabelled(config):
    return replace(shapes(config), class_names=("a", "b"), tasks=((0, 1),))

def twice(config):
    return replace(shapes(config), tasks=((0, 1), (1, 2, 3, 4, 5)))

def wide(config):
    found = shapes(config)
    return replace(found, train=beside(found.train), test=beside(found.test))

def beside(split):
    images = torch.full((len(split), 3, 64, 192), 255, dtype=torch.uint8)
    for row, label in enumerate(split.labels.tolist()):  # at the edges, where the middle square has nothing
        images[row, :, :, (label % 2) * 128 :][..., :64] = split.images[row]
    return MemorySplit(images, split.labels, split.samples)

def single(config):
    return replace(shapes(config), tasks=((0,), (1, 2, 3, 4, 5)))
"""


def forget(*modules: str) -> None:
    """As in a new process."""
    for name in modules:
        sys.modules.pop(name, None)


@pytest.fixture
def here(tmp_path_factory, monkeypatch) -> Path:
    """The current folder of somebody with two files, as a console script finds it: not on Python's path."""
    place = tmp_path_factory.mktemp("here")
    (place / "soft_here.py").write_text(METHOD)
    (place / "shapes_here.py").write_text(BENCHMARK)
    (place / "others_here.py").write_text(OTHERS)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(place)
    yield place
    forget("soft_here", "shapes_here", "others_here")


# through the commands ------------------------------------------------------------------------------------------------
def run_of(weights, more: str, method: str = "soft_here:Soft --strength 0.3") -> int:
    call = f"--benchmark shapes_here:shapes --method {method} --weights {weights} --limit-per-class 4 {FLAGS} {more}"
    return train.main(call.split())


@pytest.fixture
def trained(here, weights) -> Path:
    """The run of a method and a benchmark of one's own, in the folder that it has by default."""
    assert run_of(weights, "") == 0
    forget("soft_here", "shapes_here")
    return here / "runs" / "shapes_here-shapes-soft_here-Soft-0"


def test_a_run_holds_what_was_typed(trained, here, weights, capsys):
    settings, results = Run(trained).settings(), Run(trained).results()
    assert (settings["method"], settings["own"]) == ("soft_here:Soft", {"strength": 0.3})
    assert (results["benchmark"], results["method"]) == ("shapes_here:shapes", "soft_here:Soft")
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3] and results["danger"][2] is not None
    assert run_of(weights, f"--resume --output {trained}") == 0
    assert "has finished before" in capsys.readouterr().out
    assert run_of(weights, f"--resume --output {trained}", "soft_here:Soft") == 2
    assert "with other settings: --strength 0.3 (asked: 1.0); choose" in capsys.readouterr().err
    assert report.main([str(trained), "--output", str(here / "page.html")]) == 0
    page = (here / "page.html").read_text(encoding="utf-8")
    assert "soft_here:Soft" in page and "shapes_here:shapes" in page


def test_every_command_takes_the_run_once_the_method_is_said(trained, here, capsys):
    trees.folders(here / "more", 2, 4)
    consent = ["--method", "soft_here:Soft"]
    assert predict.main([str(trained), str(here / "more"), *consent]) == 0
    assert capsys.readouterr().out.count("\n") == 8
    assert learn.main([str(trained), "--data-dir", str(here / "more"), "--output", str(here / "new"), *consent]) == 0
    assert "8 classes in 4 tasks" in capsys.readouterr().out
    learned = checkpoint.read_json(here / "new" / "config.json")
    assert (learned["method"], learned["own"]) == ("soft_here:Soft", {"strength": 0.3})
    assert export.main([str(trained), "--format", "timm", "--output", str(here / "timm"), *consent]) == 0
    card = (here / "timm" / "README.md").read_text(encoding="utf-8")
    assert "| strength | 0.3 |" in card and "| method | soft_here:Soft |" in card
    assert evaluate.main([str(trained), *consent, "--benchmark", "shapes_here:shapes"]) == 0
    assert "not those of the run" not in capsys.readouterr().err
    tasks = checkpoint.read_json(trained / "evaluation" / "evaluation.json")["tasks"]
    assert [task["accuracy"] for task in tasks] == pytest.approx(Run(trained).results()["accuracy_matrix"][-1])


def test_help_has_the_flags_of_ones_own_and_the_built_in_names(here, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "soft_here:Soft", "--help"])
    words = " ".join(re.sub(r"[│\s]+", " ", capsys.readouterr().out).split())
    assert stop.value.code == 0
    assert "--strength FLOAT How much a change of the answers to old inputs costs. (default: 1.0)" in words
    assert "lora-gpm" in words and "imagenet-100" in words
    assert train.main(["--method", "soft_here:Sft"]) == 2
    assert capsys.readouterr().err.endswith("module soft_here has no Sft; similar: Soft\n")


# a stranger's run ----------------------------------------------------------------------------------------------------
@pytest.fixture
def strange(trained, here) -> Path:
    """The same run where its modules, were they imported, would do something."""
    for name in ("soft_here", "shapes_here"):
        (here / f"{name}.py").write_text(f"open('{here}/{name}.trace', 'w')\n")
    sys.path.insert(0, str(here))  # not that they could not be found
    return trained


def calls(run: Path) -> list[tuple]:
    return [
        (predict, [str(run), str(run)]),
        (learn, [str(run), "--data-dir", str(run)]),
        (evaluate, [str(run)]),
        (evaluate, [str(run), "--data-dir", str(run)]),
        (export, [str(run), "--format", "timm", "--output", str(run.parent / "exported")]),
    ]


def test_no_command_imports_what_a_run_names(strange, here, capsys):
    (strange / "more").mkdir()
    for command, call in calls(strange):
        assert command.main(call) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "the method soft_here:Soft is not loaded" in err and "say --method soft_here:Soft, or import" in err
    with pytest.raises(CheckpointError, match="the method soft_here:Soft is not loaded"):
        ContinualLearner.load(strange)
    assert report.main([str(strange)]) == 0
    assert train.main(["--resume", "--output", str(strange)]) == 2
    assert not list(here.glob("*.trace")) and not {"soft_here", "shapes_here"} & sys.modules.keys()


def test_another_method_than_the_runs_is_no_consent(strange, here, capsys):
    for command, call in calls(strange):
        for name in ("os:Soft", "janus"):
            assert command.main([*call, "--method", name]) == 2
            assert f"--method {name} is not that of the run, which is soft_here:Soft" in capsys.readouterr().err
    assert not list(here.glob("*.trace"))


def test_no_function_is_called_that_a_run_names(here, weights, capsys):
    """Not even one that is loaded: any callable might do as a benchmark."""
    assert run_of(weights, f"--output {here}/run", "lora") == 0
    capsys.readouterr()
    for name in ("shapes_here:shapes", "os:abort"):
        set_settings(here / "run", {"benchmark": name})
        assert evaluate.main([str(here / "run")]) == 2
        err = capsys.readouterr().err
        assert (
            err.count("\n") == 1 and f"--benchmark {name} was not said, and no file makes this program run code" in err
        )


@pytest.mark.parametrize("own", [3, {"strength": "much"}, {"nothing": 1}, {"strength": None}])
def test_settings_that_cannot_be_are_named(trained, here, own):
    set_settings(trained, {"own": own})
    sys.path.insert(0, str(here))
    with pytest.raises(CheckpointError, match="config.json holds what cannot be: --"):
        ContinualLearner.load(trained, method="soft_here:Soft")


# the same bits -------------------------------------------------------------------------------------------------------
def whole_and_resumed(patterns, weights, tmp_path, changes):
    """The trainers of a run and of the same one, cut off and resumed, which has the same results."""
    first = make_trainer(patterns, weights, tmp_path / "first", **changes)
    results = first.run()
    again = make_trainer(patterns, weights, tmp_path / "again", CutOffLearner, **changes)
    with pytest.raises(KeyboardInterrupt):
        again.run()
    resumed = make_trainer(patterns, weights, tmp_path / "again", **changes)
    resumed.restore()
    assert without_time(resumed.run()) == without_time(results)
    return first, resumed


def test_a_run_that_was_cut_off_goes_on_with_the_same_bits(here, patterns, weights, tmp_path):
    sys.path.insert(0, str(here))
    changes = {"method": "soft_here:Soft", "own": {"strength": 3}, "epochs": 2}
    first, resumed = whole_and_resumed(patterns, weights, tmp_path, changes)
    assert comparable(resumed.reports[-1]) == comparable(first.reports[-1])
    assert_same(weights_of(resumed), weights_of(first))
    assert_same(resumed.learner.method.state_dict(), first.learner.method.state_dict())
    free = make_trainer(patterns, weights, tmp_path / "free", **(changes | {"own": {"strength": 0}}))
    free.run()
    assert not torch.equal(*(t.learner.method.layers["blocks.1.attn.qkv"].linear.weight for t in (free, first)))


def test_a_learner_takes_the_class_itself_and_goes_on_when_it_is_loaded(here, photos, weights, tmp_path):
    sys.path.insert(0, str(here))
    from soft_here import Soft

    learner = learner_of(weights, method=Soft, strength=3)
    assert learner.config.own == {"strength": 3.0} and repr(learner).startswith(
        "ContinualLearner(emoji, soft_here:Soft"
    )
    names = [[trees.wnid(c) for c in pair] for pair in ((0, 1), (2, 3), (4, 5))]
    for pair in names[:2]:
        learner.learn(photos, pair)
    learner.save(tmp_path / "saved")
    other = ContinualLearner.load(tmp_path / "saved")  # imported above
    assert_same(state_of(other), state_of(learner))
    for one in (learner, other):
        one.learn(photos, names[2])
    assert_same(state_of(other), state_of(learner))
    forget("soft_here")
    with pytest.raises(CheckpointError, match="the method soft_here:Soft is not loaded"):
        ContinualLearner.load(tmp_path / "saved")
    with pytest.raises(ArgumentError, match="--method janus is not that of the run, which is soft_here:Soft"):
        ContinualLearner.load(tmp_path / "saved", method=Janus)
    assert ContinualLearner.load(tmp_path / "saved", method="soft_here:Soft").config == learner.config


def test_a_learner_says_which_setting_there_is_not(weights):
    with pytest.raises(ArgumentError, match=re.escape("a learner has no setting 'own'")):
        learner_of(weights, own={"strength": 1})
    with pytest.raises(ArgumentError, match=re.escape("a learner has no setting 'strength'")):
        learner_of(weights, strength=1)
    assert learner_of(weights, method=Janus).config.method == "janus"


class Norm(Method):
    """As plain as a method can be: trains the backbone's last norm."""

    def __init__(self, model, config):
        super().__init__(model, config)
        model.backbone.requires_grad_(False)
        self.layers = {"norm": model.backbone.norm.requires_grad_(True)}
        self.start = []

    def open_task(self, task):
        self.start = [parameter.detach().clone() for parameter in self.trainable()]

    def trainable(self):
        return list(self.layers["norm"].parameters())

    def shrink_update(self, share):
        for parameter, start in zip(self.trainable(), self.start, strict=True):
            parameter.copy_(start + share * (parameter - start))

    def close_task(self, task):
        return TaskReport()


def test_a_plain_method_learns_is_undone_saved_and_exported(photos, weights, tmp_path, monkeypatch):
    plain = {name: value for name, value in SETTINGS.items() if not name.startswith("energy")}  # nothing is protected
    learner = ContinualLearner(weights=str(weights), method=Norm, merge_scale=0.5, **plain)
    first, second = ([trees.wnid(c) for c in pair] for pair in ((0, 1), (2, 3)))
    start = learner._core.model.backbone.norm.weight.clone()
    report = learner.learn(photos, first)
    assert report.merged == 0.5 and report.movement > 0
    before = state_of(learner)
    assert not torch.equal(before["backbone.norm.weight"], start)
    with monkeypatch.context() as patched:
        patched.setattr(Norm, "close_task", lambda self, task: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.learn(photos, second)
    assert_same(state_of(learner), before)
    learner.save(tmp_path / "saved")
    loaded = ContinualLearner.load(tmp_path / "saved")
    for one in (learner, loaded):
        one.learn(photos, second)
    assert_same(state_of(loaded), state_of(learner))
    assert export.main([str(tmp_path / "saved"), "--format", "timm", "--output", str(tmp_path / "timm")]) == 0


# a benchmark's flags -------------------------------------------------------------------------------------------------
def shapes(**changes):
    return load_benchmark(TrainConfig(**({"benchmark": "shapes_here:shapes"} | changes)).resolved())


def test_the_shared_flags_are_applied_to_what_a_function_gives(here):
    sys.path.insert(0, str(here))
    plain = shapes()
    assert (plain.name, plain.tasks) == ("shapes_here:shapes", ((0, 1), (2, 3), (4, 5)))
    assert shapes(tasks=2).tasks == ((0, 1, 2), (3, 4, 5)) and shapes(method="joint").tasks == ((0, 1, 2, 3, 4, 5),)
    drawn = shapes(shuffle_classes=True, seed=3)
    assert len(drawn.tasks) == 3 and drawn.tasks != plain.tasks and sorted(drawn.class_order) == list(range(6))
    assert len(shapes(limit_per_class=5).train) == 30
    held = shapes(validation=0.25)
    assert held.validation and (len(held.train), len(held.test)) == (144, 48)
    (here / "tasks.txt").write_text("bar\ndisc\n\nring\nplus\nsquare\ndiamond\n")
    assert shapes(task_list="tasks.txt").tasks == ((5, 0), (1, 4, 2, 3))
    assert shapes(cache_images=True, data_dir="x", workers=2).split_sha256 == plain.split_sha256
    assert shapes().at(32).train.images.dtype == torch.uint8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": ("real",)}, "--benchmark shapes_here:shapes has no --domains; it belongs to domainnet"),
        ({"split": "random"}, "--benchmark shapes_here:shapes has no --split"),
        ({"class_list": "first100"}, "--benchmark shapes_here:shapes has no --class-list"),
        ({"preset": "paper"}, "--benchmark shapes_here:shapes has none"),
        ({"tasks": 7}, "--tasks must lie in 1..6"),
        ({"tasks": 6, "head": "linear"}, "--tasks 6 of 6 classes makes tasks of one class"),
        ({"benchmark": "others_here:nothing"}, "--benchmark others_here:nothing must give a Benchmark, got an object"),
        (
            {"benchmark": "others_here:mislabelled"},
            "mislabelled: Benchmark: train must have labels of 2 classes, got 2",
        ),
        ({"benchmark": "others_here:twice"}, "twice: Benchmark: tasks must have each of the class ids 0 .. 5 once"),
        ({"benchmark": "others_here:single", "head": "linear"}, "others_here:single: task 1 has one class, from which"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(here, change, message):
    sys.path.insert(0, str(here))
    with pytest.raises((ArgumentError, DataError), match=re.escape(message)):
        shapes(**change)


def test_the_default_folder_has_a_plain_name():
    config = TrainConfig(benchmark="a.b:c", method="my method/2", seed=(5,))
    assert choose_folder(config) == Path("runs/a.b-c-my-method-2-5")


def test_images_that_are_no_squares_are_shown_later_as_they_were_learned(here, weights, tmp_path):
    call = f"--benchmark others_here:wide --backbone emoji --weights {weights} --limit-per-class 8 --tasks 2"
    assert train.main(f"{call} --learn none --device cpu --no-plots --output {tmp_path}/run".split()) == 0
    learner = ContinualLearner.load(tmp_path / "run")
    assert learner.view.crop_mode == "squash" and shapes().test.crop_mode == "center"
    test = shapes(benchmark="others_here:wide").test
    shown, wanted = learner.predict(list(test.images), top=1), learner.classify(test, top=1)
    same = [one[0][0] == other[0][0] for one, other in zip(shown, wanted, strict=True)]
    assert sum(same) > 0.9 * len(same), "Pillow rounds"


# in a package --------------------------------------------------------------------------------------------------------
def test_what_is_installed_needs_no_consent(here, weights, tmp_path, capsys):
    about = here / "soft_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: soft-package\nVersion: 1.0\n")
    groups = {"janus_ext.methods": "soft = soft_here:Soft", "janus_ext.benchmarks": "shapes = shapes_here:shapes"}
    (about / "entry_points.txt").write_text("\n".join(f"[{group}]\n{line}\n" for group, line in groups.items()))
    sys.path.insert(0, str(here))
    call = f"--benchmark shapes --method soft --strength 2 --weights {weights} --limit-per-class 4 --tasks 2 {FLAGS}"
    assert train.main(call.split()) == 0
    forget("soft_here", "shapes_here")
    run = here / "runs" / "shapes-soft-0"
    assert json.loads((run / "config.json").read_text())["own"] == {"strength": 2.0}
    assert evaluate.main([str(run)]) == 0
    assert train.main(["--method", "sft"]) == 2
    assert "joint, soft, or package.module:Class, got 'sft'; similar: soft" in capsys.readouterr().err
