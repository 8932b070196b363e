"""janus_ext.predict, learn and evaluate: what they print and write, exit codes, and that the run stays as it is."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import trees
from learners import learner_of

from janus_ext import ContinualLearner, evaluate, learn, predict, train
from janus_ext.errors import TrainingError
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
    call = f"--benchmark folder --data-dir {folder}/photos --backbone emoji --weights {weights} --head linear"
    call += f" --output {folder}/run"
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
        (["{place}/run", "{place}/photos", "--top", "0"], "--top must lie in [1, 2147483647], got 0"),
        (["{place}/run", "{place}/photos", "--workers", "-1"], "--workers must lie in [0, 1024], got -1"),
        (["{place}/run", "{place}/photos", "--workers", "9999999"], "--workers must lie in [0, 1024], got 9999999"),
        (
            ["{place}/run", "{place}/photos", "--batch-size", "9" * 20],
            "--batch-size must lie in [1, 2147483647], got",
        ),
        (["{place}/run"], "IMAGE: name an image at least"),
        (["{place}/run", "{place}/photos", "--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_mistakes_are_one_line_and_status_two(place, capsys, call, message):
    assert predict.main([word.format(place=place) for word in call]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("janus_ext.predict: ") and message in err


def test_a_name_stays_on_its_line(place, weights, tmp_path, capsys):
    odd, escaped = "a\nb\x1b[1m é👩\u200d🎨", "a\\nb\\x1b[1m é👩\u200d🎨"
    trees.folders(tmp_path / "images", 2, 3, lambda c: f"{c}{odd}")
    learner = learner_of(weights)
    learner.learn(tmp_path / "images")
    learner.save(tmp_path / "learner")
    (tmp_path / "images" / "bad\n.jpg").write_bytes(b"nothing")
    assert predict.main([str(tmp_path / "learner"), str(tmp_path / "images"), "--top", "2"]) == 1
    out, err = capsys.readouterr()
    assert out.count("\n") == 6 and all(line.count(f"0{escaped}") >= 1 for line in out.splitlines())
    assert "\x1b" not in out and "bad\\n.jpg is unreadable" in err


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
    flags += " --head linear"
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


def test_the_new_folder_is_named_after_the_run(place, tmp_path, monkeypatch, capsys):
    shutil.copytree(place / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    for run, name in ((f"{tmp_path}/run/", "run-learned"), (".", "run-learned-2")):
        assert learn.main([run, "--data-dir", str(place / "more")]) == 0
        assert ContinualLearner.load(tmp_path / name).classes[-1] == "class 5"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-learned", "run-learned-2"]


def test_two_at_once_have_a_folder_each(place, tmp_path, monkeypatch):
    """The second begins while the first is at work."""
    shutil.copytree(place / "run", tmp_path / "run")
    call = [str(tmp_path / "run"), "--data-dir"]
    learned, inner = ContinualLearner.learn, []

    def learn_within(self, *arguments):
        if not inner:
            inner.append(None)
            inner.append(learn.main([*call, str(place / "more")]))
        return learned(self, *arguments)

    monkeypatch.setattr(ContinualLearner, "learn", learn_within)
    assert learn.main([*call, str(place / "more")]) == 0 and inner == [None, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-learned", "run-learned-2"]
    assert all(len(ContinualLearner.load(tmp_path / name).classes) == 6 for name in ("run-learned", "run-learned-2"))


def test_a_default_output_is_never_a_training_runs(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "run", tmp_path / "runs" / "folder-janus-0")
    assert learn.main(["runs/folder-janus-0", "--data-dir", str(place / "more")]) == 0
    names = [f"runs/folder-janus-0{end}" for end in ("", "-learned", "-2")]
    shutil.copytree(names[1], names[2])  # an earlier version's name
    before = files_of(tmp_path)
    call = f"--benchmark folder --data-dir {place}/photos --backbone emoji --weights none --image-size 32 --epochs 1"
    assert train.main([*call.split(), *"--rank 2 --workers 0 --amp off --device cpu --no-plots --tasks 2".split()]) == 0
    assert "run folder: runs/folder-janus-0-3" in capsys.readouterr().out
    assert {path: data for path, data in files_of(tmp_path).items() if "-0-3" not in str(path)} == before


def test_with_test_images_the_accuracy_is_shown(place, tmp_path, capsys):
    shutil.copytree(place / "more", tmp_path / "data" / "train")
    shutil.copytree(place / "all", tmp_path / "data" / "test")
    call = [str(place / "run"), "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "new")]
    assert learn.main(call) == 0
    assert "accuracy" in capsys.readouterr().out
    assert learn.main(call) == 2
    assert "is there already; choose another folder" in capsys.readouterr().err


@pytest.fixture
def data(place, tmp_path) -> Path:
    """Folders of four new classes, of these and a known one, and with a test part; and a run of --method joint."""
    for name in "abcd":
        shutil.copytree(place / "more" / "class 4", tmp_path / "four" / name)
    shutil.copytree(tmp_path / "four", tmp_path / "mixed")
    shutil.copytree(place / "photos" / "class 0", tmp_path / "mixed" / "class 0")
    for name in ("strange", "broken"):
        shutil.copytree(tmp_path / "four", tmp_path / name / "train")
        shutil.copytree(tmp_path / "four", tmp_path / name / "test")
    (tmp_path / "strange" / "test" / "d").rename(tmp_path / "strange" / "test" / "zebra")
    next((tmp_path / "broken" / "train" / "d").iterdir()).write_bytes(b"nothing")
    shutil.copytree(tmp_path / "four" / "a", tmp_path / "one" / "a")
    for domain in ("clipart", "photo"):
        shutil.copytree(tmp_path / "four", tmp_path / "deep" / domain)
    shutil.copytree(place / "run", tmp_path / "joint")
    config = checkpoint.read_json(tmp_path / "joint" / "config.json")
    checkpoint.write_json(tmp_path / "joint" / "config.json", config | {"method": "joint"})
    return tmp_path


@pytest.mark.parametrize(
    ("run", "folder", "tasks", "message"),
    [
        ("{place}/run", "{place}/photos", 1, "classes must be new, and the run knows class 0, class 1, class 2, ..."),
        ("{place}/run", "{data}/mixed", 2, "the run knows class 0 already"),
        ("{place}/run", "{data}/four", 3, "--tasks 3 of 4 classes makes tasks of one class"),
        ("{place}/run", "{data}/four", 0, "--tasks must lie in 1..4"),
        ("{place}/run", "{data}/one", 1, "got a alone"),
        ("{place}/run", "{data}/strange", 2, "labels are none of the 8 classes: zebra/"),
        ("{place}/run", "{data}/broken", 2, "train: d/class 4_"),
        ("{place}/run", "{data}/nowhere", 1, "does not exist"),
        ("{place}/run", "{data}/four/a", 1, "no class folders"),
        ("{place}/run", "{data}/deep", 1, "hand over one of them"),
        ("{data}/joint", "{data}/four", 1, "is of --method joint, which learns all classes at once"),
    ],
)
def test_what_cannot_be_learned_is_one_line_and_nothing_is_written(place, data, capfd, run, folder, tasks, message):
    run, folder = (text.format(place=place, data=data) for text in (run, folder))
    assert learn.main([run, "--data-dir", folder, "--tasks", str(tasks), "--output", str(data / "out")]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("janus_ext.learn: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (data / "out").exists()


@pytest.mark.parametrize("output", [".", "..", "file"])
def test_an_output_that_can_be_no_new_folder_is_refused_before_anything_is_learned(
    place, tmp_path, monkeypatch, capsys, output
):
    (tmp_path / "file").touch()
    checkpoint.make_folder(tmp_path / "x")
    monkeypatch.chdir(tmp_path if output == "file" else tmp_path / "x")
    monkeypatch.setattr(ContinualLearner, "learn", None)
    assert learn.main([str(place / "run"), "--data-dir", str(place / "more"), "--output", output]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and ("is a file" in message or "current folder" in message)


@pytest.mark.parametrize("error", [TrainingError("the loss is nan"), KeyboardInterrupt()])
def test_tasks_before_one_that_failed_are_kept_and_it_is_said_how_to_go_on(place, data, monkeypatch, capsys, error):
    whole = ContinualLearner.learn

    def failing(learner, images, classes):
        if "c" in classes:
            raise error
        return whole(learner, images, classes)

    with monkeypatch.context() as patched:
        patched.setattr(ContinualLearner, "learn", failing)
        call = [str(place / "run"), "--data-dir", str(data / "four"), "--output", str(data / "out"), "--tasks", "2"]
        assert learn.main(call) in (2, 130)
    said = capsys.readouterr().out
    assert f"1 of 2 tasks are learned and saved in {data}/out" in said and said.endswith("of the others: c, d\n")
    for name in "ab":
        shutil.rmtree(data / "four" / name)
    assert learn.main([str(data / "out"), "--data-dir", str(data / "four"), "--output", str(data / "all")]) == 0
    assert "8 classes in 4 tasks" in capsys.readouterr().out


def test_a_class_mean_takes_a_class_alone(place, data, weights, capsys):
    learner = learner_of(weights, head="ncm")
    learner.learn(place / "photos")
    learner.save(data / "means")
    assert learn.main([str(data / "means"), "--data-dir", str(data / "one")]) == 0
    assert f"5 classes in 2 tasks: {data}/means-learned" in capsys.readouterr().out


# evaluate ------------------------------------------------------------------------------------------------------------
def test_the_runs_own_test_images_give_the_last_row_of_its_matrix(place, tmp_path, capsys):
    assert evaluate.main([str(place / "run"), "--output", str(tmp_path / "out")]) == 0
    assert_last_row(tmp_path / "out", place / "run")
    assert "not those of the run" not in capsys.readouterr().err
    names = {"evaluation.json", "per_class.csv", "confusion.csv", "confusion.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def assert_last_row(evaluation: Path, run: Path) -> None:
    found, results = checkpoint.read_json(evaluation / "evaluation.json"), checkpoint.read_json(run / "results.json")
    for key, matrix in (("accuracy", "accuracy_matrix"), ("accuracy_task_known", "accuracy_matrix_task_known")):
        assert [task[key] for task in found["tasks"]] == pytest.approx(results[matrix][-1])


def test_of_the_embedded_images_in_a_drawn_order_and_number_too(weights, tmp_path, capsys):
    call = f"--weights {weights} --limit-per-class 1 --shuffle-classes --seed 3 --tasks 4 --epochs 1 --rank 4"
    call += f" --device cpu --amp off --no-plots --output {tmp_path}/run"
    assert train.main(call.split()) == 0
    assert evaluate.main([str(tmp_path / "run")]) == 0
    assert_last_row(tmp_path / "run" / "evaluation", tmp_path / "run")
    assert "not those of the run" not in capsys.readouterr().err


def test_images_that_may_have_been_trained_on_are_said(place, tmp_path, capsys):
    """One image more in a class moves the line between training and test."""
    shutil.copytree(place / "photos", tmp_path / "photos")
    shutil.copy(place / "all" / "class 4" / "class 4_0.jpg", tmp_path / "photos" / "class 0" / "new.jpg")
    call = ["--benchmark", "folder", "--data-dir", str(tmp_path / "photos"), "--output", str(tmp_path / "out")]
    assert evaluate.main([str(place / "run"), *call]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("janus_ext.evaluate: ")]
    assert "the images are not those of the run, so that some may have been trained on" in line
    assert checkpoint.read_json(tmp_path / "out" / "evaluation.json")["images"] == 4


@pytest.mark.parametrize("again", [False, True], ids=["learned once", "loaded and saved again"])
def test_folders_that_were_learned_from_later_are_no_test_either(place, tmp_path, capsys, monkeypatch, again):
    monkeypatch.chdir(place)  # wherever it is asked from
    assert learn.main(["run", "--data-dir", "more", "--output", str(tmp_path / "later")]) == 0
    monkeypatch.chdir(tmp_path)
    if again:
        ContinualLearner.load("later").save("again")
    call = ["again" if again else "later", "--output", "out", "--data-dir"]
    shutil.copytree(place / "more", tmp_path / "others")
    for folder, is_said in ((place / "more", True), (place / "photos", True), (tmp_path / "others", False)):
        assert evaluate.main([*call, str(folder)]) == 0
        assert (f"{folder}: it was trained on images there" in capsys.readouterr().err) == is_said


def test_a_folder_beside_embedded_images_is_refused(place, capsys):
    assert evaluate.main([str(place / "run"), "--benchmark", "emoji", "--data-dir", str(place / "photos")]) == 2
    assert "--benchmark emoji has no --data-dir" in capsys.readouterr().err


def test_the_training_side_of_a_tree_is_no_test_either(place):
    shutil.copytree(place / "photos", place / "both" / "Train")
    shutil.copytree(place / "photos", place / "both" / "test")
    for folder, is_said in (("both/Train", True), ("both/test", False), ("photos", False)):
        assert evaluate._is_trained_on(place / folder, {"data_dir": str(place / "both")}) == is_said


def test_where_others_trained_need_not_be_there_nor_be_readable(place, monkeypatch):
    def forbid(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    assert not evaluate._is_trained_on(place / "photos", {"data_dir": str(place / "gone")})
    monkeypatch.setattr(os, "scandir", forbid)
    assert not evaluate._is_trained_on(place / "all", {"data_dir": str(place / "photos")})
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", forbid)
        said = evaluate._is_trained_on(place / "all", {"data_dir": str(place / "photos")})
    assert not said


def test_a_folder_of_images_is_scored_by_the_names_of_its_folders(place, tmp_path, capsys):
    assert evaluate.main([str(place / "run"), "--data-dir", str(place / "photos"), "--output", str(tmp_path)]) == 0
    found = checkpoint.read_json(tmp_path / "evaluation.json")
    learner = ContinualLearner.load(place / "run")
    assert found["accuracy"] == pytest.approx(learner.evaluate(place / "photos").accuracy) and found["images"] == 24
    assert f"{place / 'photos'}: it was trained on images there, this is no test" in capsys.readouterr().err
    shutil.copytree(place / "photos", tmp_path / "others")
    assert evaluate.main([str(place / "run"), "--data-dir", str(tmp_path / "others"), "--output", str(tmp_path)]) == 0
    assert "trained on" not in capsys.readouterr().err
    assert evaluate.main([str(place / "run"), "--data-dir", str(place / "all"), "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "class 4" in err and err.count("\n") == 1


def test_another_benchmark_without_a_known_class_is_refused(place, tmp_path, capsys):
    assert evaluate.main([str(place / "run"), "--benchmark", "emoji", "--output", str(tmp_path / "out")]) == 2
    assert "split must be of classes that were learned (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
