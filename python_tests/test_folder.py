"""Anybody's images: both layouts, the fixed split, broken trees, and a run of the command."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from trees import drawing, folders, save_jpeg

from janus_ext import train
from janus_ext.config import TrainConfig
from janus_ext.data import check, folder, images, listing
from janus_ext.data.images import Files
from janus_ext.errors import ArgumentError, DataError


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
    settings = {"benchmark": "folder", "data_dir": root, "workers": 0} | changes
    return folder.load(TrainConfig(**settings).resolved())


# layouts and splits --------------------------------------------------------------------------------------------------
def test_one_tree_is_split_class_by_class(tree):
    benchmark = load(tree)
    assert torch.bincount(benchmark.train.labels).tolist() == [5] * 12
    assert torch.bincount(benchmark.test.labels).tolist() == [1] * 12
    assert not set(benchmark.train.samples) & set(benchmark.test.samples)
    assert benchmark.class_names == tuple(name_of(c) for c in range(12)) and len(benchmark.tasks) == 6
    assert benchmark.split_sha256 == load(tree, seed=(9,)).split_sha256


def test_train_and_test_folders_are_taken_as_they_are(parts):
    benchmark = load(parts)
    assert (len(benchmark.train), len(benchmark.test)) == (36, 24)
    assert all(s.startswith("train/") for s in benchmark.train.samples)
    assert benchmark.split_sha256 == load(parts, split="folders").split_sha256


def test_class_order_and_limit(parts):
    small = load(parts, shuffle_classes=True, limit_per_class=1, tasks=3, seed=(4,))
    assert (len(small.train), len(small.test)) == (12, 12)
    assert sorted(small.class_order) == list(range(12)) and small.class_order != tuple(range(12))


def test_listing_is_that_of_torchvisions_image_folder(tree):
    images.prepare_torchvision()
    from torchvision.datasets import ImageFolder

    save_jpeg(tree / name_of(3) / "deep" / "er" / "x.JPG", torch.zeros(4, 4, 3, dtype=torch.uint8).numpy())
    shutil.copytree(tree / name_of(3) / "deep", tree / name_of(3) / "deep 2")
    (tree / name_of(3) / "notes.txt").write_text("no image")
    os.symlink(tree / name_of(5), tree / name_of(4) / "linked")
    found, problems, _ = listing.class_samples(tree, "", listing.subfolders(tree))
    want = ImageFolder(str(tree)).samples
    assert not problems
    assert [(os.path.join(tree, s.name), s.label) for s in found] == want


def test_hidden_folders_are_no_classes(tree):
    (tree / ".ipynb_checkpoints").mkdir()
    assert len(load(tree).class_names) == 12


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "Validation"), ("train", "dev"), ("TRAIN", "valid")])
def test_the_test_side_has_many_names(parts, names):
    want = load(parts)
    for old, new in zip(("train", "test"), names, strict=True):
        (parts / old).rename(parts / new)
    found = load(parts)
    assert found.class_names == want.class_names and (len(found.train), len(found.test)) == (36, 24)
    assert found.test.samples[0] == want.test.samples[0].replace("test/", f"{names[1]}/", 1)


def test_of_three_sides_the_validation_images_are_not_used(parts, caplog):
    want = load(parts)
    assert "not used" not in caplog.text
    shutil.copytree(parts / "train", parts / "val")
    assert load(parts).split_sha256 == want.split_sha256
    assert f"{parts}: images come from train/ and test/; not used: val/" in caplog.text


def test_test_images_without_labels_are_not_used(parts, caplog):
    want = load(parts)
    (parts / "test").rename(parts / "val")
    save_jpeg(parts / "test" / "1.jpg", drawing(0, 0))
    assert len(load(parts).test) == len(want.test)
    assert "images come from train/ and val/; not used: test/" in caplog.text


def test_small_data_sets_have_fewer_tasks(tmp_path):
    folders(tmp_path / "five", 5, 2, name_of)
    assert [len(classes) for classes in load(tmp_path / "five").tasks] == [3, 2]
    with pytest.raises(ArgumentError, match="--tasks 3 of 5 classes .* --tasks 1 to 2 fit, or --head lda"):
        load(tmp_path / "five", tasks=3, head="linear")
    assert len(load(tmp_path / "five", tasks=5, head="ncm").tasks) == 5


def test_an_ordinary_tree_keeps_its_fingerprint(tree):
    assert load(tree, tasks=4).split_sha256 == "d741cc9ca5c5d2bc2e1e3674d6f9c1d622e1f5b73b61fe45a41206d5ab8ba8d9"


def test_clutter_counts_neither_as_class_nor_as_image_nor_as_stray(tree, capsys):
    want = load(tree)
    for left in ("__MACOSX", "lost+found", "@eaDir"):
        save_jpeg(tree / left / "x.jpg", drawing(0, 0))
        save_jpeg(tree / name_of(2) / left / "x.jpg", drawing(0, 0))
    save_jpeg(tree / name_of(2) / ".ipynb_checkpoints" / "x.jpg", drawing(0, 0))
    for name in ("._x.jpg", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tree / name_of(3) / name).write_bytes(b"")
        (tree / name).write_bytes(b"")
    found = load(tree)
    assert found.class_names == want.class_names and found.split_sha256 == want.split_sha256
    assert train.main(["--benchmark", "folder", "--data-dir", str(tree), "--check-data"]) == 0
    out = capsys.readouterr().out
    assert "Nothing to do" in out and "unlisted" not in out


def test_photographs_are_turned_as_the_camera_was_held(tmp_path):
    """However they are decoded: here, by a worker, into memory."""
    from PIL import Image

    folders(tmp_path / "tree", 2, 5, name_of)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((64, 96, 3), dtype=np.uint8)
    pixels[:32] = 255  # white above; the camera was turned, so white is on the right
    for path in (tmp_path / "tree").rglob("*.jpg"):
        Image.fromarray(pixels).save(path, exif=exif)
    for changes in ({}, {"workers": 1}, {"cache_images": True}):
        image = load(tmp_path / "tree", **changes).at(64).test.stream([torch.tensor([0])])
        left, right = next(image)[0].float().mean((0, 1, 2)).split(32)
        assert left.mean() < 50 and right.mean() > 200


# what is wrong with a tree -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("root", "found"), [(None, "needs --data-dir"), ("nowhere", "does not exist"), (__file__, "no folder")]
)
def test_a_missing_folder_shows_the_files_wanted(root, found, capsys):
    flags = ["--benchmark", "folder"] + (["--data-dir", root] if root else [])
    assert train.main(flags) == 2
    message = capsys.readouterr().err
    assert found in message.splitlines()[0]
    assert "<data-dir>/train/<class>/*.jpg" in message and folder.PAGE in message


def test_an_empty_folder_shows_the_files_wanted(tmp_path):
    with pytest.raises(DataError, match="has no class folders; wanted:(.|\n)*<data-dir>/<class>"):
        load(tmp_path)


def test_classes_must_be_the_same_in_both_parts(parts):
    shutil.rmtree(parts / "test" / name_of(7))
    with pytest.raises(DataError, match="must have the same class folders; only one of them has thing 07"):
        load(parts)


def test_folders_must_be_there_if_asked_for(tree):
    with pytest.raises(DataError, match="--split folders needs"):
        load(tree, split="folders")


def test_a_class_without_images_is_named(parts):
    for path in (parts / "train" / name_of(2)).iterdir():
        path.unlink()
    with pytest.raises(DataError, match="train/thing 02 is without images"):
        load(parts)


def test_a_class_of_one_image_cannot_be_split(tree):
    for path in sorted((tree / name_of(2)).iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match="thing 02 is too small"):
        load(tree)


def test_a_link_to_a_folder_it_lies_in_is_named_and_ends(tree):
    os.symlink(tree, tree / name_of(1) / "loop")
    with pytest.raises(DataError, match="thing 01/loop is a symbolic link to a folder it lies in"):
        load(tree)


def test_a_link_to_itself_is_a_missing_image(tree):
    os.symlink("self.jpg", tree / name_of(1) / "self.jpg")
    with pytest.raises(DataError, match="thing 01/self.jpg is missing: Too many levels of symbolic links"):
        load(tree)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"benchmark": "emoji", "data_dir": "x"}, "--benchmark emoji has no --data-dir"),
        ({"benchmark": "folder", "split": "inflora"}, "--split inflora is none of folder's: auto, folders, random"),
        ({"workers": -1}, "--workers"),
    ],
)
def test_flags_of_other_benchmarks_are_refused(changes, flag):
    with pytest.raises(ArgumentError, match=flag):
        TrainConfig(**changes).resolved()


# the check -----------------------------------------------------------------------------------------------------------
def break_some(parts):
    """One image each that is missing behind a link, empty, truncated, and a text file."""
    train_files, test_files = (sorted((parts / part / name_of(5)).iterdir()) for part in ("train", "test"))
    train_files[0].write_bytes(b"")
    train_files[1].write_bytes(train_files[1].read_bytes()[:-40])
    os.symlink("nowhere.jpg", test_files[0].with_name("gone.jpg"))
    (parts / "test" / name_of(5) / "notes.txt").write_text("no image")


def test_check_data_reports_everything_and_does_not_train(parts, capsys, tmp_path):
    break_some(parts)
    flags = ["--benchmark", "folder", "--data-dir", str(parts), "--check-data", "--output", str(tmp_path / "run")]
    assert train.main(flags) == 2
    out, err = capsys.readouterr()
    assert re.search(r"empty +train/thing 05/thing 05_0.jpg +\(0 bytes\)", out)
    assert re.search(r"unreadable +train/thing 05/thing 05_1.jpg +\(image file is truncated", out)
    assert re.search(r"missing +test/thing 05/gone.jpg", out)
    assert re.search(r"unlisted +test/thing 05/notes.txt", out)
    assert re.search(r"train +36 +-", out) and re.search(r"test +25 +-", out)
    assert "To do: fetch or extract the broken files again." in out
    assert "1 empty, 1 unreadable, 1 missing" in err
    assert not (tmp_path / "run").exists()


def test_check_data_of_a_sound_tree_says_so(parts, capsys):
    assert train.main(["--benchmark", "folder", "--data-dir", str(parts), "--check-data"]) == 0
    out = capsys.readouterr().out
    assert "Nothing to do" in out and "36 training and 24 test images, 12 classes in 6 tasks, split " in out


def test_damage_is_found_before_training_without_being_asked(parts):
    break_some(parts)
    with pytest.raises(DataError, match="thing 05_0.jpg is empty: 0 bytes, and 2 more; --check-data lists all"):
        load(parts)


def test_images_are_decoded_once_and_again_only_if_they_change(parts, monkeypatch):
    read = []
    monkeypatch.setattr(images, "read_image", lambda path, upright: read.append(path.name))
    load(parts)
    assert len(read) == 60
    load(parts)
    assert len(read) == 60
    changed = parts / "train" / name_of(0) / "thing 00_1.jpg"
    changed.write_bytes(changed.read_bytes() + b" ")
    load(parts)
    assert read[60:] == ["thing 00_1.jpg"]
    load(parts, check_data=True)
    assert len(read) == 61 + 60


def test_a_trial_run_checks_only_what_it_needs(parts, monkeypatch):
    read = []
    monkeypatch.setattr(images, "read_image", lambda path, upright: read.append(path.name))
    load(parts, limit_per_class=1)
    assert len(read) == 24
    load(parts)
    assert len(read) == 60


def test_a_full_check_keeps_what_it_did_not_look_at_and_forgets_what_broke(parts, monkeypatch):
    load(parts)
    assert not check.examine(Files(parts), ["train/thing 00/thing 00_0.jpg"], afresh=True)
    assert len(check.read_known(parts)) == 60

    def broken(path, upright):
        raise DataError(f"{path} cannot be read: the disk is old")

    monkeypatch.setattr(images, "read_image", broken)
    problems = check.examine(Files(parts), ["train/thing 00/thing 00_0.jpg"], afresh=True)
    assert str(problems[0]) == "train/thing 00/thing 00_0.jpg is unreadable: the disk is old"
    assert len(check.read_known(parts)) == 59


def test_an_interrupted_check_goes_on_where_it_was(parts, monkeypatch):
    read = []

    def interrupted(path, upright):
        read.append(path.name)
        if len(read) == 50:
            raise KeyboardInterrupt

    monkeypatch.setattr(check, "CHUNK", 1)
    monkeypatch.setattr(check, "available_cores", lambda: 1)
    monkeypatch.setattr(images, "read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(parts)
    assert len(check.read_known(parts)) == 49
    load(parts)
    assert len(check.read_known(parts)) == 60


def test_a_damaged_record_costs_a_check_and_a_warning(parts, caplog):
    load(parts)
    check.record_path(parts).write_bytes(b"nonsense")
    load(parts)
    assert "record of checked images is damaged" in caplog.text
    assert len(check.read_known(parts)) == 60


def test_a_cache_that_cannot_be_written_is_a_warning(parts, caplog, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    load(parts)
    assert "the next start will check the images again" in caplog.text


@pytest.mark.parametrize("home", [None, "closed"])
def test_a_user_without_a_home_trains_with_a_warning(parts, caplog, monkeypatch, tmp_path, home):
    """As in a container whose user the system does not know."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it is where pwd has no entry
    else:
        closed = tmp_path / "closed"
        closed.write_text("not even a folder")
        monkeypatch.setenv("HOME", str(closed))
    assert len(load(parts).train) == 36
    assert caplog.text.count("the next start will check the images again") == 1
    assert ("this user has no home folder, and XDG_CACHE_HOME is not set" in caplog.text) == (home is None)


# the command ---------------------------------------------------------------------------------------------------------
def test_a_run_on_class_folders(parts, weights, tmp_path):
    settings = f"--backbone emoji --weights {weights} --epochs 1 --tasks 3 --workers 1 --no-plots --amp off"
    shas = []
    for number, extra in enumerate((["--cache-images"], ["--workers", "0"])):
        output = tmp_path / f"run{number}"
        flags = ["--benchmark", "folder", "--data-dir", str(parts), *settings.split(), *extra, "--output", str(output)]
        assert train.main(flags) == 0
        results = json.loads((output / "results.json").read_text())
        shas.append((results["split_sha256"], results["accuracy_matrix"], results["basis_rank"]))
    assert shas[0] == shas[1]  # decoding in workers, from memory, or here makes no difference
    assert json.loads((tmp_path / "run0" / "config.json").read_text())["data_dir"] == str(parts)
