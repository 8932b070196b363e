"""CUB, ImageNet-A and Stanford Cars: their layouts at the real numbers of classes, refusals, checks, and runs."""

import json
import re
import shutil

import pytest
import trees

from janus_ext import train
from janus_ext.config import TrainConfig
from janus_ext.data import BENCHMARKS, cars, cub, imagenet_a
from janus_ext.errors import DataError


def bird(label: int) -> str:
    return f"{label + 1:03d}.Bird_{label:03d}"


def car(label: int) -> str:
    return f"Maker Model {label:03d} 2012"


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """The 200 classes with two training images and one test image each, in the official layout."""
    root = tmp_path_factory.mktemp("CUB_200_2011")
    trees.cub(root)
    return root


@pytest.fixture(scope="module")
def adversarial(tmp_path_factory):
    """200 classes of five images, as in the archive."""
    root = tmp_path_factory.mktemp("imagenet-a")
    trees.folders(root, 200, 5)
    (root / "README.txt").write_text("n01440764 tench\n")
    return root


@pytest.fixture(scope="module")
def vehicles(tmp_path_factory):
    root = tmp_path_factory.mktemp("cars")
    trees.sides(root, 196, 1, 1, car)
    return root


@pytest.fixture
def copy(birds, tmp_path):
    """The lists of the birds, to be broken, beside a link to their images."""
    for path in birds.glob("*.txt"):
        shutil.copy(path, tmp_path)
    (tmp_path / "images").symlink_to(birds / "images")
    return tmp_path


def load(name, root, **changes):
    return BENCHMARKS[name](TrainConfig(benchmark=name, data_dir=root, workers=0, **changes).resolved())


def edit(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# cub -----------------------------------------------------------------------------------------------------------------
def test_cub_takes_classes_and_split_from_its_lists(birds):
    benchmark = load("cub", birds)
    assert (len(benchmark.train), len(benchmark.test)) == (400, 200)
    assert benchmark.class_names == tuple(map(bird, range(200)))
    assert [len(classes) for classes in benchmark.tasks] == [20] * 10
    assert benchmark.train.samples[:2] == (f"{bird(0)}/{bird(0)}_0.jpg", f"{bird(0)}/{bird(0)}_1.jpg")
    assert benchmark.test.samples[7] == f"{bird(7)}/{bird(7)}_2.jpg" and benchmark.test.labels[7] == 7


def test_the_order_of_the_lists_does_not_matter(birds, copy):
    for name in cub.LISTS:
        lines = (copy / name).read_text().splitlines(keepends=True)
        (copy / name).write_text("".join(lines[::-1] if name == cub.LISTS[1] else lines).replace("\n", "\r\n"))
    assert load("cub", copy).split_sha256 == load("cub", birds).split_sha256


def test_class_ids_are_those_of_the_list(copy):
    text = (copy / cub.LISTS[1]).read_text()
    swapped = {"1": "200", "200": "1"}
    lines = [line.split() for line in text.splitlines()]
    (copy / cub.LISTS[1]).write_text("".join(f"{n} {swapped.get(c, c)}\n" for n, c in lines))
    names = load("cub", copy).class_names
    assert (names[0], names[199], names[1]) == (bird(199), bird(0), bird(1))


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        (0, "\n2 ", "\n1 ", "images.txt:2 is wrong: wanted a new image id and a word, got '1 001.Bird_000/"),
        (0, "1 001", "001", "images.txt:1 is wrong: wanted a new image id and a word, got '001.Bird"),
        (0, "1 001.Bird_000/", "1 ", "image id 1 is wrong: wanted <class>/<file>, got '001.Bird_000_0.jpg'"),
        (0, "_1.jpg", "_0.jpg", "id 2 is wrong: 001.Bird_000/001.Bird_000_0.jpg is listed in image id 1 already"),
        (1, "1 1\n", "1 0\n", "image id 1 is wrong: the class id must lie in 1..200, got 0"),
        (1, "1 1\n", "1 201\n", "must lie in 1..200, got 201"),
        (1, "1 1\n", "1 x\n", "must lie in 1..200, got 'x'"),
        (1, "1 1\n", "", "image id 1 is wrong: the class id must lie in 1..200, got None"),
        (1, "\n4 2\n", "\n4 1\n", "id 4 is wrong: class 1 is 001.Bird_000 in earlier entries, here 002.Bird_001"),
        (1, "\n5 2\n", "\n5 9\n", "id 5 is wrong: 002.Bird_001 is class 2 in earlier entries, here 9"),
        (2, "1 1\n", "1 2\n", r"id 1 is wrong: train_test_split.txt must say 1 \(training\) or 0 of it, got '2'"),
        (2, "1 1\n", "", "must say 1 .training. or 0 of it, got None"),
    ],
)
def test_bad_lines_are_named(copy, file, old, new, complaint):
    edit(copy / cub.LISTS[file], old, new)
    with pytest.raises(DataError, match=complaint) as caught:
        load("cub", copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", cub.LISTS)
def test_a_missing_list_is_named_with_the_files_wanted(copy, name):
    (copy / name).unlink()
    with pytest.raises(DataError, match=f"the list .*{name} cannot be read: No such file") as caught:
        load("cub", copy)
    assert cub.LAYOUT.strip() in str(caught.value)


def test_lists_that_lack_a_class_are_refused(copy):
    lines = (copy / cub.LISTS[0]).read_text().splitlines(keepends=True)
    (copy / cub.LISTS[0]).write_text("".join(lines[3:]))
    with pytest.raises(DataError, match=r"the lists of .* must name 200 classes .*got 199; the first .*missing is 1"):
        load("cub", copy)


def test_check_data_compares_with_the_lists(birds, copy, capsys):
    edit(copy / cub.LISTS[0], "001.Bird_000_0.jpg", "001.Bird_000_9.jpg")
    assert train.main(["--benchmark", "cub", "--data-dir", str(copy), "--check-data"]) == 2
    out = capsys.readouterr().out
    assert re.search(r"missing +001.Bird_000/001.Bird_000_9.jpg", out)
    assert re.search(r"unlisted +001.Bird_000/001.Bird_000_0.jpg", out)
    assert re.search(r"train +400 +5,994", out) and re.search(r"test +200 +5,794", out)
    assert train.main(["--benchmark", "cub", "--data-dir", str(birds), "--check-data"]) == 0


# train/ and test/ ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "classes", "official"),
    [
        ("cub", 200, {"train": 5_994, "test": 5_794}),
        ("imagenet-a", 200, {"train": 5_981, "test": 1_519}),
        ("cars", 196, {"train": 8_144, "test": 8_041}),
    ],
)
def test_two_sides_are_taken_as_they_are(tmp_path, caplog, name, classes, official):
    trees.sides(tmp_path, classes, 2, 1)
    benchmark = load(name, tmp_path)
    assert (len(benchmark.train), len(benchmark.test)) == (2 * classes, classes)
    assert benchmark.class_names == tuple(map(trees.wnid, range(classes)))
    assert {sample.split("/")[0] for sample in benchmark.test.samples} == {"test"}
    counts = {"train": 2 * classes, "test": classes}
    said = "; ".join(f"{side} {counts[side]:,} images (official: {wanted:,})" for side, wanted in official.items())
    assert f"{name} is not the official data set: {said}" in caplog.text


def test_each_division_in_circulation_is_known(tmp_path, monkeypatch, caplog):
    trees.sides(tmp_path, 200, 2, 1)
    monkeypatch.setattr(cub, "PILOT", {"train": 400, "test": 200})
    load("cub", tmp_path)
    assert "official" not in caplog.text


def test_cars_have_196_classes_in_tasks_of_20_and_19(vehicles):
    benchmark = load("cars", vehicles)
    assert (len(benchmark.train), len(benchmark.test)) == (196, 196)
    assert benchmark.class_names == tuple(map(car, range(196)))
    assert [len(classes) for classes in benchmark.tasks] == [20] * 6 + [19] * 4


def test_cars_without_sides_are_refused(vehicles):
    with pytest.raises(DataError, match="train has no train/ and test/; wanted:") as caught:
        load("cars", vehicles / "train")
    assert cars.LAYOUT.strip() in str(caught.value)


def test_a_wrong_number_of_classes_is_refused(tmp_path, vehicles):
    with pytest.raises(DataError, match="must hold 200 class folders, got 196 .Maker Model 000 2012, "):
        load("cub", vehicles)
    trees.sides(tmp_path, 3, 1, 1)
    for name in ("cars", "imagenet-a"):
        with pytest.raises(DataError, match="must hold (200|196) class folders, got 3 "):
            load(name, tmp_path)
    with pytest.raises(DataError, match="must hold 200 class folders, got 3 "):
        load("imagenet-a", tmp_path / "train")


# imagenet-a ----------------------------------------------------------------------------------------------------------
def test_a_fifth_of_every_class_is_for_the_test_whatever_the_seed(adversarial):
    before = sorted(adversarial.rglob("*"))
    benchmark = load("imagenet-a", adversarial)
    assert (len(benchmark.train), len(benchmark.test)) == (800, 200)
    assert benchmark.test.labels.tolist() == list(range(200)) and len(benchmark.tasks) == 10
    assert not set(benchmark.train.samples) & set(benchmark.test.samples)
    assert benchmark.split_sha256 == load("imagenet-a", adversarial, seed=(5,)).split_sha256
    assert sorted(adversarial.rglob("*")) == before


def test_the_archive_is_compared_as_a_whole(adversarial, capsys):
    assert train.main(["--benchmark", "imagenet-a", "--data-dir", str(adversarial), "--check-data"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"train and test +1,000 +7,500", out) and re.search(r"train +800 +-", out)
    assert "The counts are not the official ones" in out


# all -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "module"), [("cub", cub), ("imagenet-a", imagenet_a), ("cars", cars)])
def test_without_a_folder_the_exact_tree_is_shown(name, module, capsys):
    assert train.main(["--benchmark", name]) == 2
    message = capsys.readouterr().err
    assert "needs --data-dir" in message and module.LAYOUT.strip() in message and module.PAGE in message


def test_pixels_are_taken_as_they_are_stored(birds, adversarial, vehicles):
    for name, root in (("cub", birds), ("imagenet-a", adversarial), ("cars", vehicles)):
        assert not load(name, root).train.source.upright


@pytest.mark.parametrize(("name", "tree"), [("cub", "birds"), ("imagenet-a", "adversarial"), ("cars", "vehicles")])
def test_a_run_at_the_real_number_of_classes_and_tasks(name, tree, weights, tmp_path, request):
    root = request.getfixturevalue(tree)
    flags = f"--benchmark {name} --data-dir {root} --backbone emoji --weights {weights} --rank 4 --epochs 1"
    flags += f" --workers 1 --no-plots --method lora --output {tmp_path / 'run'}"
    assert train.main(flags.split()) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    classes = 196 if name == "cars" else 200
    assert len(results["accuracy_matrix"]) == 10 and sum(results["test_sizes"]) == classes
    assert results["class_order"] == list(range(classes))
    assert results["split_sha256"] == load(name, root).split_sha256
