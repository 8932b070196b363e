"""janus_ext.predict, learn and evaluate: what they print and write, exit codes, and that the run stays as it is."""

import json
import shutil
from pathlib import Path

import pytest
import trees

from janus_ext import ContinualLearner, evaluate, learn, predict, train
from janus_ext.runs import checkpoint
from janus_ext.training.trainer import Trainer

SETTINGS = "--rank 4 --epochs 2 --batch-size 8 --lr 0.01 --energy-start 0.6 --energy-end 0.6 --energy-power 1"
SETTINGS += " --workers 0 --amp off --device cpu --no-plots --tasks 2"


@pytest.fixture(scope="module")
def place(weights, tmp_path_factory) -> Path:
    """A folder with photographs of four classes, more of two others, and a run on the first."""
    folder = tmp_path_factory.mktemp("place")
    trees.folders(folder / "photos", 4, 6, lambda c: f"class {c}")
    trees.folders(folder / "all", 6, 4, lambda c: f"class {c}")
    for name in ("class 4", "class 5"):
        shutil.copytree(folder / "all" / name, folder / "more" / name)
    call = f"--benchmark folder --data-dir {folder}/photos --backbone emoji --weights {weights} --output {folder}/run"
    assert train.main([*call.split(), *SETTINGS.split()]) == 0
    return folder


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# predict -------------------------------------------------------------------------------------------------------------
def test_every_image_is_a_line_with_its_classes(place, capsys):
    before = files_of(place / "run")
    assert predict.main([str(place / "run"), str(place / "photos" / "class 1"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.count("%") == 2 and "class" in line for line in lines)
    assert all(str(place / "photos" / "class 1") in line for line in lines)
    assert files_of(place / "run") == before


def test_json_says_what_the_learner_says(place, capsys):
    pattern = str(place / "photos" / "*" / "*_0.jpg")
    assert predict.main([str(place / "run"), pattern, "--json", "--top", "4", "--batch-size", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = ContinualLearner.load(place / "run").predict([line["image"] for line in lines], top=4)
    assert len(lines) == 4
    for line, classes in zip(lines, wanted, strict=True):
        assert [one["name"] for one in line["classes"]] == [name for name, _ in classes]
        assert [one["score"] for one in line["classes"]] == pytest.approx([score for _, score in classes], abs=1e-5)
        assert sum(one["score"] for one in line["classes"]) == pytest.approx(1)


def test_images_that_cannot_be_read_are_named_and_counted_and_the_rest_is_classified(place, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    good = place / "photos" / "class 1" / "class 1_0.jpg"
    call = [str(place / "run"), str(tmp_path / "bad.jpg"), str(good), str(tmp_path / "gone.png")]
    assert predict.main(call) == 1
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and str(good) in out
    assert "bad.jpg is unreadable" in err and "gone.png is missing" in err and "2 of 3 images could not be read" in err
    assert predict.main([*call, "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted("error" in line for line in lines) == [False, True, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["{place}", "{place}/photos"], "holds no run of this program"),
        (["{place}/nowhere", "{place}/photos"], "is no folder"),
        (["{place}/run", "{place}/photos", "--top", "0"], "--top must be at least 1, got 0"),
        (["{place}/run", "{place}/photos", "--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_mistakes_are_one_line_and_status_two(place, capsys, call, message):
    assert predict.main([word.format(place=place) for word in call]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("janus_ext.predict: ") and message in err


def test_of_several_seeds_one_has_to_be_named(place, tmp_path, capsys):
    for seed in (0, 1):
        shutil.copytree(place / "run", tmp_path / "many" / f"seed-{seed}")
    assert predict.main([str(tmp_path / "many"), str(place / "photos")]) == 2
    assert f"holds the runs of 2 seeds: name one, such as {tmp_path}/many/seed-0" in capsys.readouterr().err


def test_a_run_that_goes_on_later_says_what_it_knows(place, tmp_path, monkeypatch, caplog):
    shutil.copytree(place / "run", tmp_path / "half")
    for name in ("results.json", "checkpoints"):
        path = tmp_path / "half" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)

    learn_task = Trainer._learn

    def cut(self, index, *rest):
        if index:
            raise KeyboardInterrupt
        learn_task(self, index, *rest)

    monkeypatch.setattr(Trainer, "_learn", cut)
    call = checkpoint.read_json(place / "run" / "config.json")
    flags = f"--benchmark folder --data-dir {place}/photos --backbone emoji --weights {call['weights']} --resume"
    assert train.main([*flags.split(), *SETTINGS.split(), "--output", str(tmp_path / "half")]) == 130
    assert predict.main([str(tmp_path / "half"), str(place / "photos" / "class 1")]) == 0
    assert "half has finished 1 of 2 tasks and knows 2 of 4 classes; --resume goes on with it" in caplog.text


# learn ---------------------------------------------------------------------------------------------------------------
def test_classes_are_added_and_the_run_stays(place, tmp_path, capsys):
    before = files_of(place / "run")
    assert learn.main([str(place / "run"), "--data-dir", str(place / "more"), "--output", str(tmp_path / "new")]) == 0
    assert "6 classes in 3 tasks" in capsys.readouterr().out
    assert files_of(place / "run") == before
    learner = ContinualLearner.load(place / "run")
    learner.learn(place / "more")
    learner.save(tmp_path / "by hand")
    found, wanted = (
        checkpoint.read_tensors(tmp_path / name / "checkpoints" / "model.safetensors")[0] for name in ("new", "by hand")
    )
    assert found.keys() == wanted.keys() and all(found[key].equal(tensor) for key, tensor in wanted.items())
    assert predict.main([str(tmp_path / "new"), str(place / "more"), "--top", "6", "--json"]) == 0
    assert "class 5" in capsys.readouterr().out


def test_the_new_folder_has_a_number_behind_the_runs_name(place, capsys):
    assert learn.main([str(place / "run"), "--data-dir", str(place / "more"), "--tasks", "1"]) == 0
    assert (place / "run-2" / "config.json").exists()
    shutil.rmtree(place / "run-2")


def test_with_test_images_the_accuracy_is_shown(place, tmp_path, capsys):
    shutil.copytree(place / "more", tmp_path / "data" / "train")
    shutil.copytree(place / "all", tmp_path / "data" / "test")
    call = [str(place / "run"), "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "new")]
    assert learn.main(call) == 0
    assert "accuracy" in capsys.readouterr().out
    assert learn.main(call) == 2
    assert "is there already; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("photos", "classes must be new, got class 0"),
        ("nowhere", "does not exist"),
        ("more/class 4", "no class folders"),
    ],
)
def test_what_cannot_be_learned_is_one_line_and_nothing_is_written(place, tmp_path, capsys, data, message):
    assert learn.main([str(place / "run"), "--data-dir", str(place / data), "--output", str(tmp_path / "new")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


# evaluate ------------------------------------------------------------------------------------------------------------
def test_the_runs_own_test_images_give_the_last_row_of_its_matrix(place, tmp_path, capsys):
    assert evaluate.main([str(place / "run"), "--output", str(tmp_path / "out")]) == 0
    found = checkpoint.read_json(tmp_path / "out" / "evaluation.json")
    results = checkpoint.read_json(place / "run" / "results.json")
    assert [task["accuracy"] for task in found["tasks"]] == pytest.approx(results["accuracy_matrix"][-1])
    known = [task["accuracy_task_known"] for task in found["tasks"]]
    assert known == pytest.approx(results["accuracy_matrix_task_known"][-1])
    names = {"evaluation.json", "per_class.csv", "confusion.csv", "confusion.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_a_folder_of_images_is_scored_by_the_names_of_its_folders(place, tmp_path, capsys):
    assert evaluate.main([str(place / "run"), "--data-dir", str(place / "photos"), "--output", str(tmp_path)]) == 0
    found = checkpoint.read_json(tmp_path / "evaluation.json")
    learner = ContinualLearner.load(place / "run")
    assert found["accuracy"] == pytest.approx(learner.evaluate(place / "photos").accuracy) and found["images"] == 24
    assert evaluate.main([str(place / "run"), "--data-dir", str(place / "all"), "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "class 4" in err and err.count("\n") == 1


def test_another_benchmark_without_a_known_class_is_refused(place, tmp_path, capsys):
    assert evaluate.main([str(place / "run"), "--benchmark", "emoji", "--output", str(tmp_path / "out")]) == 2
    assert "none of the images is of a class that was learned" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
