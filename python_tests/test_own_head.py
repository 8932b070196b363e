"""A head in a file of somebody's own: through every command, resumed, saved, and by a stranger."""

import copy
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trees
from conftest import weights_of
from learners import FIRST, SECOND, THIRD, assert_same, learner_of, state_of
from results import set_settings
from test_extending import forget, whole_and_resumed
from test_plugins import install

from janus_ext import ContinualLearner, evaluate, export, learn, predict, report, train
from janus_ext.config import TrainConfig
from janus_ext.config.foreign import Declared
from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.heads import HEADS, elsewhere, lda
from janus_ext.runs.checkpoint import read_json
from janus_ext.runs.run import Run

SOURCE = (Path(__file__).resolve().parents[1] / "examples" / "own_head.py").read_text(encoding="utf-8")
NAME = "slda_here:slda"
pytestmark = pytest.mark.xdist_group("own head")


def same(known):
    """As `lda`, under another name."""
    return lda.rule(known.statistics)


def traced(known):
    """The same as parameters that autograd follows."""
    with torch.enable_grad():
        return tuple(torch.nn.Parameter(part) * 1 for part in same(known))


def of_two_classes(known):
    """The same while there are no more."""
    return same(known) if known.classes == 2 else 1 / 0


@pytest.fixture
def here(tmp_path_factory, monkeypatch) -> Path:
    """The current folder of somebody with a file, as a console script finds it: not on Python's path."""
    place = tmp_path_factory.mktemp("here")
    (place / "slda_here.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(place)
    yield place
    forget("slda_here")


@pytest.fixture(scope="module")
def original(tmp_path_factory, weights) -> Path:
    """A run of three tasks, by somebody whose process has ended."""
    place = tmp_path_factory.mktemp("original")
    (place / "slda_here.py").write_text(SOURCE)
    trees.folders(place / "photos", 6, 5)
    data = f"--benchmark folder --data-dir {place / 'photos'} --tasks 3 --backbone emoji --weights {weights}"
    call = f"{data} --head {NAME} --rank 4 --epochs 1 --batch-size 8 --amp off --device cpu --no-plots --output run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path[:])
        patch.chdir(place)
        assert train.main(call.split()) == 0
    forget("slda_here")
    return place / "run"


@pytest.fixture
def trained(here, original) -> Path:
    """A copy of it in the current folder."""
    return Path(shutil.copytree(original, here / "run"))


# through the commands -------------------------------------------------------------------------------------------------
def test_a_run_holds_what_was_typed_and_measures_it_beside_the_others(trained, here):
    settings, results = Run(trained).settings(), Run(trained).results()
    assert settings["head"] == results["head"] == NAME and settings["drift_budget"] == 0.1
    assert results["heads"].keys() == {NAME, "linear", "ncm", "lda", "ridge"}
    assert results["heads"][NAME]["acc"] == results["acc"]
    assert report.main([str(trained), "--output", str(here / "page.html")]) == 0
    assert NAME in (here / "page.html").read_text(encoding="utf-8")


def test_every_command_takes_the_run_once_the_head_is_said(trained, photos, here, capsys):
    consent = ["--head", NAME]
    assert predict.main([str(trained), str(photos), *consent]) == 0
    assert capsys.readouterr().out.count("\n") == 30
    assert evaluate.main([str(trained), *consent]) == 0
    found = read_json(trained / "evaluation" / "evaluation.json")["tasks"]
    assert [task["accuracy"] for task in found] == pytest.approx(Run(trained).results()["accuracy_matrix"][-1])
    assert export.main([str(trained), "--format", "timm", "--output", str(here / "timm"), *consent]) == 0
    assert f"| head | {NAME} |" in (here / "timm" / "README.md").read_text(encoding="utf-8")
    trees.folders(here / "more", 2, 4, lambda c: trees.wnid(c + 6))
    assert learn.main([str(trained), "--data-dir", str(here / "more"), "--output", str(here / "new"), *consent]) == 0
    assert read_json(here / "new" / "config.json")["head"] == NAME
    assert predict.main([str(trained), str(photos), "--head", "lda"]) == 0  # another head needs no consent
    assert learn.main([str(trained), "--data-dir", str(here / "more"), "--head", "ridge"]) == 0
    assert read_json(here / "run-learned" / "config.json")["head"] == "ridge"


# a stranger's run -----------------------------------------------------------------------------------------------------
def calls(run: Path, images: Path) -> list[tuple]:
    return [
        (predict, [str(run), str(images)]),
        (learn, [str(run), "--data-dir", str(images)]),
        (evaluate, [str(run), "--data-dir", str(images)]),
        (export, [str(run), "--format", "timm", "--output", str(run.parent / "exported")]),
    ]


def test_no_command_imports_what_a_run_names(trained, here, photos, capsys):
    (here / "slda_here.py").write_text(f"open('{here}/trace', 'w')\n")
    sys.path.insert(0, str(here))  # not that it could not be found
    for command, call in calls(trained, photos):
        assert command.main(call) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"--head {NAME} was not said, and no file makes this program run code" in err
    with pytest.raises(CheckpointError, match=f"--head {NAME} was not said"):
        ContinualLearner.load(trained)
    assert not (here / "trace").exists() and "slda_here" not in sys.modules


@pytest.mark.parametrize("name", ["os:abort", "test_own_head:same", "nothing", "x:y; rm -r z #", "slda_here:", ""])
def test_no_function_is_called_that_a_run_names(trained, photos, capsys, name):
    """Not even one that is loaded: any function might do as a head."""
    set_settings(trained, {"head": name})
    for command, call in calls(trained, photos):
        assert command.main(call) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "config.json names a head that is not here: --head " in err and name in err
        assert "; rm" not in err or "got 'x:y; rm -r z #'" in err  # shown as what it is, and not to be typed


def test_another_head_needs_no_consent_and_imports_nothing(trained, here, photos, capsys):
    (here / "slda_here.py").write_text(f"open('{here}/trace', 'w')\n")
    sys.path.insert(0, str(here))
    for command, call in calls(trained, photos):
        if command is not learn:  # whose classes the run knows
            assert command.main([*call, "--head", "ridge"]) == 0
    assert report.main([str(trained), "--output", str(here / "page.html")]) == 0
    assert train.main(["--resume", "--output", str(trained)]) == 2  # other settings
    assert ContinualLearner.load(trained, head="ncm").config.head == "ncm"
    assert not (here / "trace").exists() and "slda_here" not in sys.modules


# the same bits --------------------------------------------------------------------------------------------------------
def test_a_function_that_does_as_lda_does_is_lda(weights, photos):
    """So it comes with the guard, and with all else that a fitted head has."""
    own, built_in = learner_of(weights, head=same), learner_of(weights, head="lda")
    for names in (FIRST, SECOND, THIRD):
        own.learn(photos, names)
        built_in.learn(photos, names)
    assert own.config.head == "test_own_head:same" and own.config.drift_budget == 0.1
    assert replace(own.config, head="lda") == built_in.config
    assert own.predict(photos, top=6) == built_in.predict(photos, top=6)
    assert_same(state_of(own), state_of(built_in))


def test_to_say_it_again_is_consent_and_changes_nothing(weights, photos, tmp_path):
    """Neither the guard, which another head brings along where there is none, nor random features."""
    learner = learner_of(weights, head=same)
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "saved")
    set_settings(tmp_path / "saved", {"drift_budget": None})  # as of --preset paper
    assert ContinualLearner.load(tmp_path / "saved", head=same).config.drift_budget is None
    assert ContinualLearner.load(tmp_path / "saved", head="lda").config.drift_budget == 0.1


def test_a_learner_takes_the_function_itself_and_goes_on_when_it_is_said_again(weights, photos, tmp_path):
    learner = learner_of(weights, head=same)
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="--head test_own_head:same was not said"):
        ContinualLearner.load(tmp_path / "saved")
    other = ContinualLearner.load(tmp_path / "saved", head=same)
    by_name = ContinualLearner.load(tmp_path / "saved", head="test_own_head:same")
    for one in (learner, other, by_name):
        one.learn(photos, SECOND)
    assert_same(state_of(other), state_of(learner))
    assert_same(state_of(by_name), state_of(learner))
    assert other.predict(photos) == learner.predict(photos)
    learner.save(tmp_path / "saved")
    assert ContinualLearner.load(tmp_path / "saved", head=HEADS["ncm"]).config.head == "ncm"


def test_a_run_that_was_cut_off_goes_on_with_the_same_bits(patterns, weights, tmp_path):
    changes = {"head": "test_own_head:same", "epochs": 2}
    first, resumed = whole_and_resumed(patterns, weights, tmp_path, changes)
    assert_same(weights_of(resumed), weights_of(first))


def test_the_example_is_what_it_says_in_float64(here, weights, photos):
    sys.path.insert(0, str(here))
    learner = learner_of(weights, head=NAME, learn="all")
    for names in (FIRST, SECOND):
        learner.learn(photos, names)
    known = learner._core.method.known
    mu, S = known.statistics.means(), known.statistics.covariance()
    inverse = torch.linalg.inv((1 - 1e-4) * S + 1e-4 * torch.eye(len(S), dtype=torch.float64))
    features = torch.randn(5, len(S), dtype=torch.float64) + mu.mean(0)
    wanted = features @ inverse @ mu.mT - 0.5 * (mu @ inverse * mu).sum(1)
    got = learner._core.method.decision().scores(features.float()).double()
    assert float((got - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


# what is installed ----------------------------------------------------------------------------------------------------
def test_what_is_installed_needs_no_consent(here, weights, photos, tmp_path):
    install(here, "heads", "janus_ext.heads", f"slda = {NAME}")
    sys.path.insert(0, str(here))
    learner = learner_of(weights, head="slda")
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "saved")
    forget("slda_here")
    assert ContinualLearner.load(tmp_path / "saved").predict(photos) == learner.predict(photos)
    with pytest.raises(ArgumentError, match="--head must be one of linear, .*, slda, or .*'sdla'; similar: slda"):
        TrainConfig(head="sdla").resolved()


# what is refused ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:f", "--head nowhere:f: no module nowhere is installed or in the current folder"),
        ("slda_here:sdla", "--head slda_here:sdla: module slda_here has no sdla; similar: slda"),
        (
            "slda_here:SHRINKAGE",
            "--head slda_here:SHRINKAGE: wanted is a function that gives a weight and a bias, got an object",
        ),
        (
            "threading:Thread",
            "wanted is a function that gives a weight and a bias, got class Thread",
        ),
        ("slda_here:", "--head must be package.module:function"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(here, name, message):
    sys.path.insert(0, str(here))
    with pytest.raises(ArgumentError, match=re.escape(message)):
        TrainConfig(head=name).resolved()
    with pytest.raises(ArgumentError, match=re.escape(message)):
        ContinualLearner(head=name)


def test_a_method_of_ones_own_may_bring_a_head_along(monkeypatch):
    monkeypatch.setattr(Declared, "defaults", {"head": "nowhere:f"})
    from test_extending import Norm

    with pytest.raises(ArgumentError, match="--head nowhere:f: no module nowhere"):
        ContinualLearner(method=Norm)
    monkeypatch.setattr(Declared, "defaults", {"head": "test_own_head:same"})
    assert ContinualLearner(method=Norm, rank=4).config.head == "test_own_head:same"


def test_a_function_takes_what_is_known_and_nothing_else(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "same", lambda known, other: None)
    with pytest.raises(
        ArgumentError, match=r"--head test_own_head:same: wanted is a function of one argument, .*other"
    ):
        ContinualLearner(head="test_own_head:same")


def test_a_function_that_cannot_be_found_again_is_refused():
    with pytest.raises(ArgumentError, match="head must be a name, or stand at the top level of a module"):
        ContinualLearner(head=lambda known: lda.fit(known))


def test_random_features_belong_to_heads_that_are_built_in():
    with pytest.raises(
        ArgumentError, match="--head-width belongs to --head lda or ridge, got --head test_own_head:same"
    ):
        ContinualLearner(head=same, head_width=40)


FINITE = "must be finite in float32 for all classes that were seen, got NaN or infinity"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, b: None, "wanted are a weight and a bias, got an object of type NoneType"),
        (lambda w, b: (w, b, b), "wanted are a weight and a bias, got an object of type tuple"),
        (lambda w, b: w, "wanted are a weight and a bias, got torch.float64"),
        (lambda w, b: (w[1:], b), "weight must be [2, DIM] on cpu, got [1, DIM] on cpu"),
        (lambda w, b: (w.mT, b), "weight must be [2, DIM] on cpu, got [DIM, 2] on cpu"),
        (lambda w, b: (w.to("meta"), b), "weight must be [2, DIM] on cpu, got [2, DIM] on meta"),
        (lambda w, b: (w.long(), b), "weight must be a tensor of floating-point numbers, got torch.int64"),
        (lambda w, b: (w, [0.0, 0.0]), "bias must be a tensor of floating-point numbers, got an object of type list"),
        (lambda w, b: (w, b[:, None]), "bias must be [2] on cpu, got [2, 1] on cpu"),
        (lambda w, b: (w, b * float("nan")), f"bias {FINITE}"),
        (lambda w, b: (w, b - float("inf")), f"bias {FINITE}"),
        (lambda w, b: (w / 0, b), f"weight {FINITE}"),
        (lambda w, b: (w * 0 + 1e200, b), f"weight {FINITE}"),  # which float64 holds, and the decision does not
    ],
)
def test_what_a_function_gives_is_checked(met, change, message):
    message = message.replace("DIM", str(met.statistics.dim))
    with pytest.raises(ArgumentError, match=re.escape(f"--head own:f: {message}")):
        elsewhere.fit("own:f", lambda known: change(*same(known)), met)


@pytest.fixture
def met(weights, photos):
    """What a learner knows of two classes."""
    learner = learner_of(weights, head="lda")
    learner.learn(photos, FIRST)
    return learner._core.method.known


def test_errors_of_ours_name_the_head(met):
    def wrong(known):
        raise ArgumentError("too few images")

    with pytest.raises(ArgumentError, match="^--head own:f: too few images$"):
        elsewhere.fit("own:f", wrong, met)


def test_a_class_without_images_never_wins_whatever_is_said_of_it(met):
    met.statistics.reserve(3)
    met.heads[0] = torch.nn.Linear(met.statistics.dim, 3)

    def own(known):
        weight, bias = same(known)
        weight[2], bias[2] = float("nan"), float("inf")
        return weight, bias

    scores = elsewhere.fit("own:f", own, met).scores(torch.randn(9, met.statistics.dim))
    assert scores[:, :2].isfinite().all() and (scores[:, 2] == -float("inf")).all()


def test_no_graph_is_kept_of_what_a_function_does(weights, photos):
    """So a learner can be copied."""
    learner = learner_of(weights, head=traced)
    learner.learn(photos, FIRST)
    decision = learner._core.method.decision()
    assert not decision.weight.requires_grad and not decision.bias.requires_grad
    assert copy.deepcopy(learner).predict(photos) == learner.predict(photos)


def test_a_learner_keeps_the_function_that_it_was_made_with(weights, photos, monkeypatch):
    """Also where the name stands for another one by now, as where a notebook's cell is run again."""
    learner, wanted = learner_of(weights, head=same), learner_of(weights, head="lda")
    monkeypatch.setattr(sys.modules[__name__], "same", lambda known: 1 / 0)
    for one in (learner, wanted):
        one.learn(photos, FIRST)
    assert learner.predict(photos) == wanted.predict(photos)


def test_an_error_in_a_function_undoes_the_task(weights, photos):
    learner = learner_of(weights, head=of_two_classes)
    learner.learn(photos, FIRST)
    before = state_of(learner)
    with pytest.raises(ZeroDivisionError):
        learner.learn(photos, SECOND)
    assert_same(state_of(learner), before)
    assert len(learner.predict(photos)) == 30
