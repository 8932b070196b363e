"""ImageNet-R: the three splits, broken trees and yaml files, and runs at 5, 10 and 20 tasks."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import trees

from janus_ext import train
from janus_ext.config import TrainConfig
from janus_ext.data import imagenet_r, images
from janus_ext.errors import ArgumentError, DataError


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """200 classes of five images, as in the archive."""
    root = tmp_path_factory.mktemp("imagenet-r")
    trees.imagenet_r(root)
    return root


@pytest.fixture
def parts(tmp_path):
    trees.folders(tmp_path / "train", 200, 2)
    trees.folders(tmp_path / "test", 200, 1)
    return tmp_path


@pytest.fixture
def yaml_files(tree, tmp_path):
    return trees.coda_lists(tree, tmp_path)


def load(root, **changes):
    config = TrainConfig(benchmark="imagenet-r", data_dir=root, workers=0, **changes).resolved()
    return imagenet_r.load(config)


# splits --------------------------------------------------------------------------------------------------------------
def test_inflora_is_the_default_and_moves_no_file(tree):
    before = sorted(tree.rglob("*"))
    benchmark = load(tree)
    assert (len(benchmark.train), len(benchmark.test)) == (800, 200)
    assert not set(benchmark.train.samples) & set(benchmark.test.samples)
    assert benchmark.class_names == tuple(sorted(benchmark.class_names)) and len(benchmark.tasks) == 10
    assert sorted(tree.rglob("*")) == before
    assert benchmark.split_sha256 == load(tree, split="inflora", seed=(5,)).split_sha256


def test_inflora_is_torchs_random_split_of_torchvisions_listing(tree):
    images.prepare_torchvision()
    from torch.utils.data import random_split
    from torchvision.datasets import ImageFolder

    listed = ImageFolder(str(tree))
    torch.manual_seed(imagenet_r.SPLIT_SEED)
    want_train, want_test = random_split(listed, [800, 200])
    benchmark = load(tree)
    for split, want in ((benchmark.train, want_train), (benchmark.test, want_test)):
        assert [os.path.join(tree, name) for name in split.samples] == [listed.samples[i][0] for i in want.indices]
        assert split.labels.tolist() == [listed.samples[i][1] for i in want.indices]


def test_coda_takes_classes_and_split_from_its_files(tree, yaml_files):
    benchmark = load(tree, split="coda", split_files=yaml_files)
    assert (len(benchmark.train), len(benchmark.test)) == (800, 200)
    wnids = sorted(benchmark.class_names)
    assert benchmark.class_names[7] == wnids[1] and benchmark.class_names != tuple(wnids)
    for split in (benchmark.train, benchmark.test):
        for name, label in zip(split.samples, split.labels.tolist(), strict=True):
            assert name.split("/")[0] == benchmark.class_names[label]
    assert benchmark.split_sha256 != load(tree).split_sha256


def test_coda_looks_for_its_files_beside_the_images(tree, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(tree, root)
    with pytest.raises(DataError, match="imagenet-r_train.yaml cannot be read: No such file.*--split-files"):
        load(root, split="coda")
    files = trees.coda_lists(root, root)
    assert load(root, split="coda").split_sha256 == load(tree, split="coda", split_files=files).split_sha256


def test_folders_may_be_called_train_and_val(parts):
    (parts / "test").rename(parts / "val")
    with pytest.raises(DataError, match="has train/ and val/; --split folders is for them"):
        load(parts)
    assert len(load(parts, split="folders").test) == 200


def test_clutter_of_the_archive_and_the_orientation_of_cameras_do_not_count(tree, tmp_path):
    root = Path(shutil.copytree(tree, tmp_path / "copy"))
    (root / "__MACOSX" / trees.wnid(0)).mkdir(parents=True)
    (root / trees.wnid(0) / f"._{trees.wnid(0)}_0.jpg").write_bytes(b"x")
    benchmark = load(root)
    assert benchmark.split_sha256 == load(tree).split_sha256
    assert not benchmark.train.source.upright  # the published protocol takes the pixels as they are stored


def test_folders_are_taken_as_they_are(parts):
    benchmark = load(parts, split="folders")
    assert (len(benchmark.train), len(benchmark.test)) == (400, 200)
    assert benchmark.class_names == tuple(sorted(benchmark.class_names))


# refusals ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("split", ["inflora", "coda", "folders"])
def test_without_a_folder_the_exact_tree_is_shown(split, capsys):
    assert train.main(["--benchmark", "imagenet-r", "--split", split]) == 2
    message = capsys.readouterr().err
    assert "needs --data-dir" in message and imagenet_r.LAYOUTS[split].strip() in message
    assert imagenet_r.PAGE in message


def test_a_tree_of_the_other_kind_is_answered_with_the_flag(tree, parts):
    with pytest.raises(DataError, match="has train/ and test/; --split folders is for them"):
        load(parts)
    with pytest.raises(DataError, match="has no train/ and test/; --split inflora"):
        load(tree, split="folders")


def test_a_wrong_number_of_classes_is_refused(parts, tmp_path):
    trees.folders(tmp_path / "few", 7, 1)
    with pytest.raises(DataError, match="must hold 200 class folders, got 7 .n01440764, "):
        load(tmp_path / "few")
    for part in ("train", "test"):
        shutil.rmtree(parts / part / trees.wnid(3))
    with pytest.raises(DataError, match="must hold 200 class folders, got 199 "):
        load(parts, split="folders")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            "targets:\n- 0\n",
            "targets:\n- 200\n",
            "train.yaml, entry 1 is wrong: the class id must lie in 0..199, got 200",
        ),
        ("targets:\n- 0\n", "targets:\n- x\n", "entry 1 is wrong: the class id must lie in 0..199, got 'x'"),
        ("targets:\n- 0\n- 0", "targets:\n- 0\n- 7", "train.yaml, entry 2 is wrong: n01440764 is class 0 in"),
        (
            "targets:\n- 0\n- 0\n- 0\n- 0\n- 7",
            "targets:\n- 0\n- 0\n- 0\n- 0\n- 0",
            "entry 5 is wrong: class 0 is n01440764",
        ),
        ("targets:\n- 0\n", "targets:\n- true\n", "entry 1 is wrong: the class id must lie in 0..199, got True"),
        (
            "data:\n- data/imagenet-r/n01440764/",
            "data:\n- ",
            "entry 1 is wrong: wanted <class>/<file>, got 'n01440764_1.jpg'",
        ),
        ("data:\n- data", 'data:\n- "a\\0b"\n- data', "train.yaml has 801 entries"),
        ("data:\n- data", "data:\n- 5\n- data", "train.yaml has 801 entries in 'data' and 800 in 'targets'"),
        ("data:\n", "date:\n", "is no yaml with the lists 'data' and 'targets': 'data'"),
        ("targets:\n", "targets: {\n", "is no yaml with the lists"),
        (
            "data:\n- data/imagenet-r/",
            "data:\n- !!python/object/apply:os.system [x]\n- ",
            "could not determine a constr",
        ),
    ],
)
def test_bad_yaml_files_are_named(tree, yaml_files, old, new, complaint):
    text = yaml_files[0].read_text()
    assert old in text
    yaml_files[0].write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=re.escape(complaint)) as caught:
        load(tree, split="coda", split_files=yaml_files)
    assert "\n" not in str(caught.value)


def test_an_image_in_both_files_is_named(tree, yaml_files):
    with pytest.raises(DataError, match="entry 1 is wrong: .* is listed in imagenet-r_train.yaml, entry 1 already"):
        load(tree, split="coda", split_files=(yaml_files[0], yaml_files[0]))


def test_paths_of_other_systems_are_read(tree, yaml_files):
    want = load(tree, split="coda", split_files=yaml_files).split_sha256
    for file in yaml_files:
        file.write_text("\ufeff" + file.read_text().replace("- data/imagenet-r/n0", r"- D:\data\.\imagenet-r\n0"))
        file.write_text(file.read_text().replace("/n", "\\n"))
    assert load(tree, split="coda", split_files=yaml_files).split_sha256 == want


@pytest.mark.parametrize("name", [r"a\0b", r"\uD800"])
def test_a_name_that_no_disk_can_hold_is_named(tree, yaml_files, name):
    text = yaml_files[0].read_text()
    first = text.splitlines()[1]
    yaml_files[0].write_text(text.replace(first, f'- "n01440764/{name}.jpg"', 1))
    with pytest.raises(DataError, match="entry 1 is wrong: wanted <class>/<file>|train.yaml is no yaml"):
        load(tree, split="coda", split_files=yaml_files)


def test_an_image_that_is_only_in_a_file_is_missing(tree, yaml_files):
    yaml_files[1].write_text(yaml_files[1].read_text().replace("_0.jpg", "_77.jpg", 1))
    with pytest.raises(DataError, match="_77.jpg is missing"):
        load(tree, split="coda", split_files=yaml_files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "random"}, "--split random is none of imagenet-r's: auto, inflora, coda, folders"),
        ({"split_files": ("a", "b")}, "--split-files are .* got 2 files and --split auto"),
        ({"split": "coda", "split_files": ("a",)}, "--split-files are .* got 1 files and --split coda"),
    ],
)
def test_impossible_splits_are_refused(changes, message):
    with pytest.raises(ArgumentError, match=message):
        TrainConfig(benchmark="imagenet-r", **changes).resolved()


def test_check_data_finds_images_that_the_yaml_files_leave_out(tree, yaml_files, capsys):
    lines = yaml_files[1].read_text().splitlines(True)
    left_out = lines.pop(1).strip().removeprefix("- data/imagenet-r/")
    lines.pop(lines.index("targets:\n") + 1)
    yaml_files[1].write_text("".join(lines))
    flags = ["--benchmark", "imagenet-r", "--data-dir", str(tree), "--split", "coda", "--check-data"]
    assert train.main([*flags, "--split-files", *map(str, yaml_files)]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"unlisted +{left_out}", out) and "800     24,000" in out


# runs ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tasks", [5, 10, 20])
def test_a_run_at_200_classes(tree, weights, tmp_path, tasks):
    flags = f"--benchmark imagenet-r --data-dir {tree} --backbone emoji --weights {weights} --batch-size 64 --rank 4"
    flags += " --epochs 1"
    flags += f" --tasks {tasks} --workers 1 --no-plots --method lora --output {tmp_path / 'run'}"
    assert train.main(flags.split()) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["accuracy_matrix"]) == tasks and sum(results["test_sizes"]) == 200
    assert (
        results["class_order"] == list(range(200)) and results["split_sha256"] == load(tree, tasks=tasks).split_sha256
    )
