"""Trees of images that are not what they look like, endings that count or do not, and names that are no text."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from trees import drawing, folders

from janus_ext import train
from janus_ext.config import TrainConfig
from janus_ext.data import check, folder
from janus_ext.errors import DataError


def name_of(label: int) -> str:
    return f"thing {label:02d}"


@pytest.fixture
def tree(tmp_path):
    folders(tmp_path / "tree", 12, 6, name_of)
    return tmp_path / "tree"


@pytest.fixture
def parts(tmp_path):
    folders(tmp_path / "parts" / "train", 12, 3, name_of)
    folders(tmp_path / "parts" / "test", 12, 2, name_of)
    return tmp_path / "parts"


def load(root, **changes):
    return folder.load(TrainConfig(benchmark="folder", data_dir=root, workers=0, **changes).resolved())


def to_image(pixels):
    from PIL import Image

    return Image.fromarray(pixels)


# layouts that are not what they look like ----------------------------------------------------------------------------
def test_a_first_level_of_splits_or_domains_is_no_level_of_classes(parts, tree):
    (parts / "train").rename(parts / "fold1")
    (parts / "test").rename(parts / "fold2")
    with pytest.raises(
        DataError,
        match=r"^the 2 folders of .*parts \(fold1, fold2\) all hold the same folders \(thing 00, thing 01, "
        r"thing 02, \.\.\.\), so they look like splits or domains and not like classes: .*, or say --split random",
    ):
        load(parts)
    assert load(parts, split="random").class_names == ("fold1", "fold2")
    shutil.rmtree(parts / "fold2" / name_of(3))  # a domain that lacks a class
    with pytest.raises(DataError, match="look like splits or domains"):
        load(parts)


def test_domains_below_the_sides_are_found_too(parts):
    for part in ("train", "test"):
        (parts / part).rename(parts / "classes")
        for domain in ("real", "sketch"):
            shutil.copytree(parts / "classes", parts / part / domain)
        shutil.rmtree(parts / "classes")
    with pytest.raises(
        DataError, match=r"the 2 folders of .*train \(real, sketch\) all hold .*or say --split folders if"
    ):
        load(parts)
    assert load(parts, split="folders").class_names == ("real", "sketch")


def test_a_folder_of_images_in_each_class_is_no_domain(tree):
    for label in range(12):
        (tree / name_of(label)).rename(tree / "images")
        (tree / name_of(label)).mkdir()
        (tree / "images").rename(tree / name_of(label) / "images")
    assert len(load(tree).class_names) == 12


def test_a_split_of_the_sides_is_refused(parts):
    with pytest.raises(DataError, match="--split random is for one tree of classes, and .* has train and test"):
        load(parts, split="random")


@pytest.mark.parametrize("name", ["train", "images"])
def test_classes_one_level_deeper_are_pointed_at(tmp_path, name):
    folders(tmp_path / "tree" / name, 12, 2, name_of)
    with pytest.raises(DataError, match=f"one class folder alone, {name}, which holds 12 folders: is .*/{name} meant"):
        load(tmp_path / "tree")


def test_one_class_is_refused(tmp_path):
    folders(tmp_path / "tree", 1, 6, name_of)
    with pytest.raises(DataError, match="has one class folder alone, thing 00; wanted are two or more"):
        load(tmp_path / "tree")
    folders(tmp_path / "parts" / "train", 1, 6, name_of)
    folders(tmp_path / "parts" / "test", 1, 6, name_of)
    with pytest.raises(DataError, match="needs at least two classes, got 1"):
        load(tmp_path / "parts")


def test_two_folders_of_training_images_are_refused(parts):
    shutil.copytree(parts / "train", parts / "training")
    with pytest.raises(DataError, match="has train and training: leave one folder of training images there"):
        load(parts)


# endings -------------------------------------------------------------------------------------------------------------
def test_images_of_all_accepted_endings_are_taken(tree):
    endings = {".jfif": "JPEG", ".gif": "GIF", ".JPE": "JPEG"}
    for ending, kind in endings.items():
        to_image(drawing(1, 0)).save(tree / name_of(1) / f"x{ending}", kind)
    found = load(tree)
    samples = (*found.train.samples, *found.test.samples)
    assert {f"{name_of(1)}/x{ending}" for ending in endings} < set(samples)


def test_image_files_that_are_not_read_are_one_warning(tree, caplog, capsys):
    for number, ending in enumerate((".heic", ".HEIC", ".svg")):
        (tree / name_of(number)).joinpath(f"x{ending}").write_bytes(b"x")
    load(tree)
    warnings = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
    assert len(warnings) == 1
    assert re.search(r"tree: image files that are not read: 3, for example thing 00/x.heic; convert them", warnings[0])
    assert ".jpg .jpeg .png" in warnings[0] and ".gif" in warnings[0]
    assert train.main(["--benchmark", "folder", "--data-dir", str(tree), "--check-data"]) == 0
    assert re.search(r"unlisted +thing 00/x.heic +\(not the name of an image that is read\)", capsys.readouterr().out)


def test_a_class_of_such_files_alone_says_so(tree):
    for path in (tree / name_of(2)).iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(
        DataError, match=r"thing 02 is without images: its 6 files like thing 02/.*\.heic are not read. .*\.jpg"
    ):
        load(tree)


def test_a_folder_of_ones_own_has_no_page_of_lists(parts, capsys):
    for path in (parts / "train" / name_of(2)).iterdir():
        path.unlink()
    assert train.main(["--benchmark", "folder", "--data-dir", str(parts), "--check-data"]) == 2
    out = capsys.readouterr().out
    assert "put images into the class folders named above" in out and "lists" not in out and ".jfif" in out


# names ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def odd_tree(tmp_path):
    """Class and file names that are no UTF-8."""
    folders(tmp_path / "tree", 4, 6, name_of)
    os.rename(tmp_path / "tree" / name_of(1), os.fsencode(tmp_path / "tree") + b"/caf\xe9")
    for path in sorted((tmp_path / "tree" / name_of(2)).iterdir())[:5]:
        os.rename(path, os.fsencode(path.parent) + b"/\xe9" + os.fsencode(path.name))
    return tmp_path / "tree"


def test_names_that_are_no_text_are_names(odd_tree, weights, tmp_path, capsys):
    benchmark = load(odd_tree)
    assert benchmark.class_names == ("caf\udce9", name_of(0), name_of(2), name_of(3))
    assert len(check.read_known(odd_tree)) == 24
    flags = ["--benchmark", "folder", "--data-dir", str(odd_tree), "--output", str(tmp_path / "run")]
    settings = f"--backbone emoji --weights {weights} --epochs 1 --workers 1 --no-plots --amp off"
    assert train.main([*flags, *settings.split()]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["split_sha256"] == benchmark.split_sha256
    broken = next((odd_tree / "caf\udce9").iterdir())
    broken.write_bytes(b"")
    assert train.main([*flags, "--check-data"]) == 2
    assert re.search(r"empty +caf\\udce9/thing 01_\d.jpg", capsys.readouterr().out)
    assert train.main([*flags[:-1], str(tmp_path / "other")]) == 2
    assert "is empty: 0 bytes" in capsys.readouterr().err


def test_a_data_folder_whose_name_is_no_text(tree, tmp_path, weights):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9")
    os.rename(tree, odd)
    (Path(odd) / name_of(1) / "x.heic").write_bytes(b"x")
    settings = f"--backbone emoji --weights {weights} --epochs 1 --tasks 2 --workers 0 --no-plots --amp off"
    output = tmp_path / "run"
    flags = ["--benchmark", "folder", "--data-dir", odd, *settings.split(), "--output"]
    assert train.main([*flags, str(output)]) == 0
    assert json.loads((output / "config.json").read_text())["data_dir"] == odd


def test_a_run_folder_whose_name_is_no_text_is_refused_before_anything_is_written(tmp_path, capsys):
    assert train.main(["--output", os.fsdecode(os.fsencode(tmp_path) + b"/run\xe9")]) == 2
    assert "run\\udce9' is no valid text; choose another name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_log_takes_any_name(tmp_path, caplog):
    with train.logging_to(tmp_path / "log.txt"):
        train.LOG.info("caf%s", "\udce9")
    assert caplog.messages == ["caf\\udce9"], "valid text, which every handler can write or send"
    assert "caf\\udce9" in (tmp_path / "log.txt").read_text()
