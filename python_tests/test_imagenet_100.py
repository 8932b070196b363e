"""ImageNet-100: class lists, layouts, refusals, and a run at its real number of classes and tasks."""

import json
import re
import shutil

import pytest
import torch
import trees

from janus_ext import train
from janus_ext.config import TrainConfig
from janus_ext.data import imagenet_100
from janus_ext.errors import DataError


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """All thousand classes, one training and one validation image of each."""
    root = tmp_path_factory.mktemp("imagenet")
    trees.imagenet(root)
    return root


@pytest.fixture
def class_list(tmp_path):
    """Every tenth class, in descending order, with words behind the wnids."""
    path = tmp_path / "classes.txt"
    path.write_text("".join(f"{trees.wnid(label)} thing, {label}\n" for label in range(990, -1, -10)))
    return path


def load(root, class_list, **changes):
    config = TrainConfig(
        benchmark="imagenet-100", data_dir=root, class_list=class_list and str(class_list), workers=0, **changes
    )
    return imagenet_100.load(config.resolved())


def test_a_list_chooses_classes_and_their_order(tree, class_list):
    benchmark = load(tree, class_list)
    assert (len(benchmark.train), len(benchmark.test)) == (100, 100)
    assert benchmark.class_names == tuple(trees.wnid(label) for label in range(990, -1, -10))
    assert [len(classes) for classes in benchmark.tasks] == [10] * 10
    assert benchmark.train.samples[0] == f"train/{trees.wnid(990)}/{trees.wnid(990)}_1.JPEG"
    assert torch.equal(benchmark.test.labels, torch.arange(100))


def test_first100_are_the_first_of_all_thousand(tree, tmp_path):
    assert load(tree, "first100").class_names == tuple(trees.wnid(label) for label in range(100))
    trees.imagenet(tmp_path / "few", 100)
    with pytest.raises(DataError, match="first of all 1000 training folders, got 100; name the classes in a file"):
        load(tmp_path / "few", "first100")


def test_only_the_listed_classes_need_to_be_there(class_list, tree, tmp_path):
    for part in ("train", "val"):
        for label in range(0, 1000, 10):
            shutil.copytree(tree / part / trees.wnid(label), tmp_path / "some" / part / trees.wnid(label))
    assert load(tmp_path / "some", class_list).split_sha256 == load(tree, class_list).split_sha256


def test_the_validation_images_are_the_test_and_imagenets_test_images_are_not(tree, class_list, tmp_path, caplog):
    want = load(tree, class_list)
    (tmp_path / "linked" / "test").mkdir(parents=True)
    for part, name in (("train", "Training"), ("val", "validation")):
        (tmp_path / "linked" / name).symlink_to(tree / part)
    found = load(tmp_path / "linked", class_list)
    assert found.test.samples == tuple(name.replace("val/", "validation/", 1) for name in want.test.samples)
    assert "images come from Training/ and validation/; not used: test/" in caplog.text


def test_a_tree_without_its_sides_is_refused(tree, class_list):
    with pytest.raises(DataError, match="train has no train/ and val/; wanted:(.|\n)*<data-dir>/val/<wnid>"):
        load(tree / "train", class_list)


def test_a_class_list_may_begin_with_a_byte_order_mark(tree, class_list):
    want = load(tree, class_list).class_names
    class_list.write_text("\ufeff" + class_list.read_text())
    assert load(tree, class_list).class_names == want
    class_list.write_text(class_list.read_text().removeprefix("\ufeff"), encoding="utf-16")
    assert load(tree, class_list).class_names == want


# refusals ------------------------------------------------------------------------------------------------------------
def test_without_a_folder_or_a_list_it_says_what_is_wanted(tree, capsys):
    assert train.main(["--benchmark", "imagenet-100", "--class-list", "first100"]) == 2
    message = capsys.readouterr().err
    assert "needs --data-dir" in message and "<data-dir>/val/<wnid>/*.JPEG" in message
    assert imagenet_100.PAGE in message
    with pytest.raises(DataError, match="needs --class-list: a file with 100 wnids, one a line, or first100"):
        load(tree, None)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda ls: ls[:99], "classes.txt must name 100 classes, got 99"),
        (lambda ls: [*ls, "n99999999"], "classes.txt must name 100 classes, got 101"),
        (lambda ls: [*ls, ls[4]], "classes.txt:101 repeats n01570914 of line 5"),
        (lambda ls: ["goldfish", *ls], "classes.txt:1 must begin with a wnid like n01440764, got 'goldfish'"),
        (lambda ls: ["n99999999", *ls[1:]], "train lacks 1 of the 100 class folders, the first is n99999999"),
    ],
)
def test_bad_lists_are_named_by_line(tree, class_list, edit, message):
    class_list.write_text("\n".join(edit(class_list.read_text().splitlines())) + "\n")
    with pytest.raises(DataError, match=re.escape(message)):
        load(tree, class_list)


def test_a_missing_list_is_named(tree, tmp_path):
    with pytest.raises(DataError, match="--class-list .*nowhere.txt cannot be read: No such file"):
        load(tree, tmp_path / "nowhere.txt")


def test_flat_validation_images_are_refused(tree, class_list, tmp_path):
    for label in range(0, 1000, 10):
        shutil.copytree(tree / "train" / trees.wnid(label), tmp_path / "flat" / "train" / trees.wnid(label))
    trees.save_jpeg(tmp_path / "flat" / "val" / "ILSVRC2012_val_00000001.JPEG", trees.drawing(0, 0))
    with pytest.raises(DataError, match="val lacks 100 of the 100 class folders(.|\n)*not as the flat archive unpacks"):
        load(tmp_path / "flat", class_list)


# the check and a run -------------------------------------------------------------------------------------------------
def test_check_data_counts_validation_images(tree, class_list, capsys):
    flags = ["--benchmark", "imagenet-100", "--data-dir", str(tree), "--class-list", str(class_list), "--check-data"]
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    assert re.search(r"train +100 +-", out) and re.search(r"val +100 +5,000", out)


def test_a_run_at_100_classes_and_ten_tasks(tree, class_list, weights, tmp_path):
    flags = f"--benchmark imagenet-100 --data-dir {tree} --class-list {class_list} --backbone emoji --weights {weights}"
    flags += " --epochs 1"
    assert train.main([*flags.split(), "--workers", "1", "--no-plots", "--output", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["accuracy_matrix"]) == 10 and results["test_sizes"] == [10] * 10
    assert results["split_sha256"] == load(tree, class_list).split_sha256
