"""ContinualLearner.save and load: all or nothing, nothing of others, old runs, and damage in one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import trees
from learners import FIRST, SECOND, SETTINGS, THIRD, assert_same, learner_of, state_of

from janus_ext import ContinualLearner, train
from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.methods import METHODS
from janus_ext.runs import checkpoint
from janus_ext.runs.run import Run

ENERGIES = {"energy_start", "energy_end", "energy_power"}
OLD_RUN = Path(__file__).parent / "old_run"


def test_saving_replaces_the_same_and_nothing_else(weights, photos, tmp_path):
    learner = learner_of(weights)
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "saved")
    learner.learn(photos, SECOND)
    learner.save(tmp_path / "saved")
    assert ContinualLearner.load(tmp_path / "saved").classes == tuple(FIRST + SECOND)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(ArgumentError, match="no saved learner"):
        learner.save(tmp_path / "notes")
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["a.txt"]


def test_what_is_no_folder_for_a_learner_is_named(weights, photos, tmp_path, monkeypatch):
    learner = learner_of(weights)
    learner.learn(photos, FIRST)
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for place in ("file", ".", tmp_path):
        with pytest.raises(ArgumentError, match=r"file|folder"):
            learner.save(place)
    learner.save("real")
    Path("link").symlink_to("real")
    learner.learn(photos, SECOND)
    learner.save("link")
    assert Path("link").is_symlink() and len(ContinualLearner.load("real").tasks) == 2


def test_a_save_that_fails_leaves_the_last_one(weights, photos, tmp_path, monkeypatch):
    learner = learner_of(weights)
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "saved")
    before = {p: p.read_bytes() for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    learner.learn(photos, SECOND)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        learner.save(tmp_path / "saved")
    assert {p: p.read_bytes() for p in (tmp_path / "saved").rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_integers_of_numpy_are_integers(weights, photos, tmp_path):
    learner = learner_of(weights, seed=np.int64(3), planned_tasks=np.int32(4), epochs=np.int64(1))
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "saved")
    wanted = learner_of(weights, seed=3, planned_tasks=4, epochs=1)
    wanted.learn(photos, FIRST)
    assert_same(state_of(ContinualLearner.load(tmp_path / "saved")), state_of(wanted))


def test_a_run_of_joint_training_learns_no_more(weights, photos, tmp_path):
    call = f"--benchmark folder --data-dir {photos} --backbone emoji --weights {weights} --method joint --head linear"
    call += f" --epochs 1 --rank 4 --device cpu --amp off --no-plots --output {tmp_path / 'run'}"
    assert train.main(call.split()) == 0
    learner = ContinualLearner.load(tmp_path / "run")
    (tmp_path / "new").mkdir()
    for name in FIRST:
        shutil.copytree(photos / name, tmp_path / "new" / f"new {name}")
    with pytest.raises(ArgumentError, match="joint learns all classes at once, and a learner one set after another"):
        learner.learn(tmp_path / "new")
    assert len(learner.tasks) == 1


@pytest.mark.parametrize(
    "settings",
    [
        *({"method": method} for method in METHODS if method != "joint"),
        {"method": "inflora", "head": "linear", "energy_start": 0.9999, "energy_end": 1},  # keeps the free space
        {"head": "lda", "head_width": 40},
        {"head": "ridge", "drift": "ridge"},
        {"head": "aligned"},
        {"estimator": "isvd", "estimator_rank": 20},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_what_is_read_back_goes_on_to_the_same_bits(weights, photos, tmp_path, settings):
    """And has the same layout: products of numbers in another order in memory round otherwise."""
    method = settings.get("method")
    unread = {"lora": ENERGIES, "bilora": {*ENERGIES, "rank"}, "inflora": {"energy_power"}}.get(method, ())
    settings = {name: value for name, value in (SETTINGS | settings).items() if name not in unread}
    settings |= {"frequencies": 8} if method == "bilora" else {}
    learner = ContinualLearner("emoji", weights=str(weights), **settings)
    for names in (FIRST, SECOND):
        learner.learn(photos, names)
    learner.save(tmp_path / "saved")
    loaded = ContinualLearner.load(tmp_path / "saved")
    for found, wanted in zip(loaded._core.state(), learner._core.state(), strict=True):
        assert {name: x.stride() for name, x in found.items()} == {name: x.stride() for name, x in wanted.items()}
    learner.learn(photos, THIRD)
    loaded.learn(photos, THIRD)
    assert_same(state_of(loaded), state_of(learner))
    assert loaded.predict(photos, top=6) == learner.predict(photos, top=6)


def test_a_learner_outlives_its_folder(weights, photos, tmp_path):
    learner = learner_of(weights)
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "a")
    loaded = ContinualLearner.load(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert_same(state_of(ContinualLearner.load(tmp_path / "b")), state_of(learner))
    assert Run(tmp_path / "b").factors(0).keys() == {f"{n}.{f}" for n in learner._core.method.layers for f in "AB"}


@pytest.mark.parametrize(("key", "value"), [("seed", 5), ("seed", []), ("tasks", None), ("lr", -1), ("epochs", 0)])
def test_a_configuration_that_cannot_be_is_named(weights, photos, tmp_path, key, value):
    learner = learner_of(weights)
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "saved")
    settings = checkpoint.read_json(tmp_path / "saved" / "config.json")
    checkpoint.write_json(tmp_path / "saved" / "config.json", settings | {key: value})
    with pytest.raises(CheckpointError, match="config.json"):
        ContinualLearner.load(tmp_path / "saved")


def test_a_learner_leaves_what_it_was_saved_from_readable(weights, photos, tmp_path):
    """Factors of earlier tasks are in the folder that it was loaded from; another save copies them."""
    learner = learner_of(weights)
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "a")
    second = ContinualLearner.load(tmp_path / "a")
    second.learn(photos, SECOND)
    second.save(tmp_path / "a")
    third = ContinualLearner.load(tmp_path / "a")
    for task in range(2):
        factors, about = checkpoint.read_tensors(Run(tmp_path / "a").factors_path(task))
        assert factors and about["task"] == str(task)
    assert len(third.tasks) == 2


@pytest.mark.parametrize("name", ["config.json", "checkpoints/model.safetensors", "checkpoints/method-0.safetensors"])
def test_damaged_files_are_named(weights, photos, tmp_path, name):
    learner = learner_of(weights)
    learner.learn(photos, FIRST)
    learner.save(tmp_path / "saved")
    path = tmp_path / "saved" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=Path(name).name):
        ContinualLearner.load(tmp_path / "saved")
    with pytest.raises(ArgumentError, match="holds no run of this program|is no folder"):
        ContinualLearner.load(tmp_path / "saved" / "checkpoints")


def test_a_run_of_the_version_before_still_opens(tmp_path, monkeypatch):
    """python_tests/old_run is what that version wrote of four classes in two tasks."""
    shutil.copytree(OLD_RUN, tmp_path / "run")
    shutil.copy(OLD_RUN / "backbone.safetensors", tmp_path / "tiny.safetensors")
    trees.folders(tmp_path / "images", 4, 6)
    monkeypatch.chdir(tmp_path)
    learner = ContinualLearner.load("run", device="cpu")
    results = checkpoint.read_json(Path("run/results.json"))
    assert learner.classes == tuple(results["class_names"]) and [len(t) for t in learner.tasks] == [2, 2]
    learner.learn(more_photos(tmp_path), [trees.wnid(4), trees.wnid(5)])
    learner.save("saved")
    assert len(ContinualLearner.load("saved").classes) == 6


def more_photos(folder: Path) -> Path:
    trees.folders(folder / "more", 6, 3)
    return folder / "more"
