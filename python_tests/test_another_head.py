"""A run's classifier is chosen again when it is loaded, without an image (docs/method.md, property 14)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from learners import FIRST, SECOND, SETTINGS, THIRD, assert_same, learner_of, state_of
from results import set_settings

from janus_ext import ContinualLearner, evaluate, export, predict, train
from janus_ext.errors import ArgumentError
from janus_ext.heads import HEADS

OLD_RUN = Path(__file__).parent / "old_run"


@pytest.fixture
def saved(weights, photos, tmp_path) -> Path:
    """A learner of three tasks with linear heads."""
    learner = learner_of(weights, head="linear")
    for names in (FIRST, SECOND, THIRD):
        learner.learn(photos, names)
    learner.save(tmp_path / "linear")
    return tmp_path / "linear"


@pytest.fixture
def old_run(tmp_path, monkeypatch) -> Path:
    """What a version before there were statistics has left."""
    shutil.copytree(OLD_RUN, tmp_path / "run")
    shutil.copy(OLD_RUN / "backbone.safetensors", tmp_path / "tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("head", HEADS)
def test_it_is_the_head_that_learning_with_it_gives(weights, photos, saved, head):
    """Training does not know which head comes after it, but for the guard; so the scores have the same bits."""
    learner = learner_of(weights, head=head, drift_budget=1e9)
    for names in (FIRST, SECOND, THIRD):
        learner.learn(photos, names)
    loaded = ContinualLearner.load(saved, head=head)
    assert loaded.config.head == head and (loaded.config.drift_budget == 0.1) == (head != "linear")
    assert loaded.predict(photos, top=6) == learner.predict(photos, top=6)
    assert_same(state_of(loaded), state_of(learner))


def test_the_guard_is_the_one_that_the_head_has_by_default(weights, photos, tmp_path):
    """Also once the learner was saved in between; what the user said stays."""
    learner = learner_of(weights)
    learner.learn(photos, FIRST)
    budgets = []
    for head in ("linear", "lda", "ridge", "linear"):
        learner.save(tmp_path / head)
        learner = ContinualLearner.load(tmp_path / head, head=head)
        budgets.append(learner.config.drift_budget)
    assert budgets == [None, 0.1, 0.1, None]
    set_settings(tmp_path / "linear", {"drift_budget": 0.5})
    assert ContinualLearner.load(tmp_path / "linear", head="linear").config.drift_budget == 0.5


def test_of_a_paper_preset_no_head_brings_a_guard_however_often_it_is_saved(weights, photos, tmp_path):
    learner = learner_of(weights, head="linear")
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "run")
    set_settings(tmp_path / "run", {"preset": "paper"})
    for head in ("lda", "lda", "linear", "ridge"):
        learner = ContinualLearner.load(tmp_path / "run", head=head)
        assert learner.config.drift_budget is None
        learner.save(tmp_path / "run")


def test_it_is_kept(photos, saved, tmp_path):
    learner = ContinualLearner.load(saved, head="lda")
    learner.save(tmp_path / "lda")
    again = ContinualLearner.load(tmp_path / "lda")
    assert again.config.head == "lda" and again.predict(photos) == learner.predict(photos)
    assert again.predict(photos) != ContinualLearner.load(saved).predict(photos)
    plain = again.model()
    assert plain.get_classifier().out_features == 6


def test_random_features_stay_the_runs_own_and_a_head_that_is_named_has_none(weights, photos, tmp_path):
    """Also where it is the run's own head: so it may be exported as a plain model."""
    wide, plain = (learner_of(weights, head="lda", drift_budget=1e9, **more) for more in ({"head_width": 40}, {}))
    for learner in (wide, plain):
        for names in (FIRST, SECOND):
            learner.learn(photos, names)
    wide.save(tmp_path / "wide")
    again = ContinualLearner.load(tmp_path / "wide")
    assert again.config.head_width == 40 and again.predict(photos, top=4) == wide.predict(photos, top=4)
    again.learn(photos, THIRD)
    assert len(again._core.method.decision().weight[0]) == 40 + plain._core.method.known.statistics.dim
    for head in ("lda", "ridge", "ncm"):
        named = ContinualLearner.load(tmp_path / "wide", head=head)
        assert named.config.head_width is None and named._core.method.decision().expansion is None
    named = ContinualLearner.load(tmp_path / "wide", head="lda")
    assert named.predict(photos, top=4) == plain.predict(photos, top=4) != wide.predict(photos, top=4)
    with pytest.raises(ArgumentError, match="--head-width makes random features .* name a --head, which then works"):
        wide.model()
    assert named.model().get_classifier().out_features == 4


def test_predicting_fits_nothing_twice(photos, saved):
    learner = ContinualLearner.load(saved, head="lda")
    method = learner._core.method
    assert method.decision() is method.decision()


def test_the_commands_take_it(photos, saved, tmp_path, capsys):
    assert predict.main([str(saved), str(photos / FIRST[0]), "--head", "lda", "--json", "--top", "6"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = ContinualLearner.load(saved, head="lda").predict(photos / FIRST[0], top=6)
    assert [[(c["name"], c["score"]) for c in line["classes"]] for line in lines] == wanted
    arguments = [str(saved), "--data-dir", str(photos), "--head", "ridge", "--output", str(tmp_path / "scores")]
    assert evaluate.main(arguments) == 0
    found = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert found["accuracy"] == ContinualLearner.load(saved, head="ridge").evaluate(photos).accuracy
    assert export.main([str(saved), "--format", "timm", "--head", "ncm", "--output", str(tmp_path / "timm")]) == 0
    assert "| head | ncm |" in (tmp_path / "timm" / "README.md").read_text()


def test_a_head_that_is_none_is_named(saved):
    with pytest.raises(ArgumentError, match="--head must be one of linear, .*, got 'lds'; similar: lda"):
        ContinualLearner.load(saved, head="lds")


@pytest.mark.parametrize("learn", ["none", "first"])
def test_linear_heads_that_were_never_trained_are_refused(weights, photos, tmp_path, learn):
    idle = (
        {"rank", "epochs", "batch_size", "lr", "energy_start", "energy_end", "energy_power"}
        if learn == "none"
        else set()
    )
    settings = {name: value for name, value in SETTINGS.items() if name not in idle}
    learner = ContinualLearner("emoji", weights=str(weights), head="lda", learn=learn, **settings)
    for names in (FIRST, SECOND):
        learner.learn(photos, names)
    learner.save(tmp_path / "frozen")
    tasks = 2 if learn == "none" else 1
    for head in ("linear", "aligned"):
        with pytest.raises(ArgumentError, match=f"head '{head}' needs linear heads, and those of {tasks} of 2 tasks"):
            ContinualLearner.load(tmp_path / "frozen", head=head)
    assert len(ContinualLearner.load(tmp_path / "frozen", head="ridge").predict(photos)) == 30


@pytest.mark.parametrize("head", ["lda", "ridge", "aligned"])
def test_a_run_of_the_version_before_has_no_statistics(old_run, head):
    with pytest.raises(ArgumentError, match=f"head '{head}' needs statistics .* take head 'linear' or 'ncm'"):
        ContinualLearner.load(old_run, head=head)


def test_a_run_of_the_version_before_has_means(old_run):
    learner = ContinualLearner.load(old_run, head="ncm")
    size = learner.input_size
    images = torch.randint(256, (4, 3, size, size), dtype=torch.uint8)
    method = learner._core.method
    with torch.no_grad():
        cosines = method.prototypes.cosines(learner._core.model.features(images))
        assert torch.equal(method.scores(images).argmax(1), cosines.argmax(1))


def test_a_card_shows_the_accuracy_of_the_head_that_is_exported(weights, photos, tmp_path):
    run = str(tmp_path / "run")
    settings = ["--backbone", "emoji", "--weights", str(weights), "--rank", "4", "--epochs", "1", "--no-plots"]
    data = ["--benchmark", "folder", "--data-dir", str(photos), "--tasks", "3", "--device", "cpu"]
    assert train.main([*data, *settings, "--output", run]) == 0
    measured = json.loads((tmp_path / "run" / "results.json").read_text())["heads"]
    for head, found in measured.items():
        results = ContinualLearner.load(run, head=head).contents().results
        assert results["accuracy_matrix"] == found["accuracy_matrix"]
    assert measured.keys() == {"linear", "ncm", "lda", "ridge"}
    assert ContinualLearner.load(run, head="aligned").contents().results is None  # nobody measured it


def test_a_card_shows_no_accuracy_of_random_features_that_are_not_exported(weights, photos, tmp_path):
    run = str(tmp_path / "run")
    settings = ["--backbone", "emoji", "--weights", str(weights), "--learn", "none", "--no-plots", "--output", run]
    data = ["--benchmark", "folder", "--data-dir", str(photos), "--tasks", "3", "--device", "cpu"]
    assert train.main([*data, *settings, "--head-width", "40"]) == 0
    measured = ContinualLearner.load(run).contents().results
    assert measured["accuracy_matrix"] == measured["heads"]["lda"]["accuracy_matrix"]
    assert ContinualLearner.load(run, head="lda").contents().results is None, "nobody has measured it"
    assert "accuracy_matrix" in ContinualLearner.load(run, head="ncm").contents().results
