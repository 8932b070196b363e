"""Fashion-MNIST: torchvision's own files, packed or not and packed anew, with the MD5 sums of a small stand-in."""

import gzip
import hashlib
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import trees

from janus_ext import train
from janus_ext.backbone import prepare_torchvision
from janus_ext.config import TrainConfig
from janus_ext.data import BENCHMARKS, fashion_mnist
from janus_ext.errors import DataError

RAW = "FashionMNIST/raw"
NAMES = tuple(fashion_mnist.SUMS)


def subclass(mirror: str = "file:///nowhere/", **changes) -> type:
    """torchvision's class; nothing is downloaded from anywhere but ``mirror``."""
    prepare_torchvision()
    from torchvision.datasets import FashionMNIST

    return type("SmallFashionMNIST", (FashionMNIST,), {"mirrors": [mirror]} | changes)


def sums_of(contents: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}


def pack(folder) -> None:
    """Every file as an archive in its place, with a name and a time in it, as gzip packs."""
    for path in list(folder.iterdir()):
        with gzip.open(f"{path}.gz", "wb") as archive:
            archive.write(path.read_bytes())
        path.unlink()


@pytest.fixture
def small(tmp_path):
    """(folder, sums) of two training and one test image of each of the ten classes."""
    return tmp_path, sums_of(trees.fashion_mnist(tmp_path / RAW))


def load(folder, sums, dataset=None, **changes):
    config = TrainConfig(benchmark="fashion-mnist", data_dir=folder, workers=0, **changes).resolved()
    return fashion_mnist.load(config, dataset or subclass(), sums)


def test_images_labels_and_names_are_torchvisions(small):
    folder, sums = small
    benchmark = load(folder, sums)
    assert (len(benchmark.train), len(benchmark.test)) == (20, 10)
    assert benchmark.tasks == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)) and benchmark.class_names[9] == "Ankle boot"
    assert benchmark.train.samples[:2] == ("train/0", "train/1") and benchmark.test.samples[9] == "test/9"
    theirs = type("FashionMNIST", (subclass(),), {})
    for split, training in ((benchmark.train.at(28), True), (benchmark.test.at(28), False)):
        listed = theirs(str(folder), train=training)
        assert split.labels.tolist() == listed.targets.tolist()
        for n in (0, 7):
            assert torch.equal(split[n][0], torch.from_numpy(np.array(listed[n][0])).expand(3, 28, 28))


def test_test_images_are_resized_without_a_crop(small):
    benchmark = load(*small)
    assert benchmark.test.at(224)[0][0].shape == (3, 224, 224) and benchmark.test.view.margin == 1.0


def test_a_limit_holds_for_both_sides(small):
    benchmark = load(*small, limit_per_class=1)
    assert torch.bincount(benchmark.train.labels).tolist() == torch.bincount(benchmark.test.labels).tolist() == [1] * 10


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", [RAW, "."])
def test_the_files_may_be_packed_and_lie_in_the_folder_itself(small, tmp_path, packed, place):
    folder, sums = small
    want = load(folder, sums)
    shutil.copytree(folder / RAW, tmp_path / "other" / place, dirs_exist_ok=True)
    if packed:
        pack(tmp_path / "other" / place)
    before = sorted((tmp_path / "other").rglob("*"))
    found = load(tmp_path / "other", sums)
    assert torch.equal(found.train.at(28)[7][0], want.train.at(28)[7][0])
    assert found.split_sha256 == want.split_sha256
    assert sorted((tmp_path / "other").rglob("*")) == before


def test_what_is_missing_or_altered_is_downloaded_and_checked(small, tmp_path, web_server):
    folder, sums = small
    shutil.copytree(folder / RAW, tmp_path / "www", dirs_exist_ok=True)
    pack(tmp_path / "www")
    archives = {path.name: path.read_bytes() for path in (tmp_path / "www").iterdir()}
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in archives.items()]
    dataset = subclass(f"{web_server}/", resources=resources)
    (folder / RAW / NAMES[2]).write_bytes(b"x")
    assert len(load(folder, sums, dataset).test) == 10
    assert len(load(tmp_path / "target", sums, dataset).train) == 20
    (tmp_path / "www" / f"{NAMES[1]}.gz").unlink()
    with pytest.raises(
        DataError, match=rf"{NAMES[1]} is missing; .*; not to be downloaded now: .*{NAMES[1]}.gz: .*404"
    ):
        load(tmp_path / "other", sums, dataset)
    with pytest.raises(DataError, match=rf"{NAMES[0]} is truncated or altered .*{NAMES[0]}.gz does not hold what it"):
        load(tmp_path / "third", sums | {NAMES[0]: "0" * 32}, dataset)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (NAMES[0], None, f"{NAMES[0]} is missing; not to be downloaded now: "),
        (NAMES[1], lambda data: data[:-1], rf"{NAMES[1]} is truncated or altered \(27 bytes\); not to be"),
        (NAMES[3], lambda data: b"", rf"{NAMES[3]} is truncated or altered \(0 bytes\)"),
        (NAMES[2] + ".gz", lambda data: data[:-20], rf"{NAMES[2]}.gz is truncated or altered"),
        (NAMES[2] + ".gz", lambda data: b"x" * 30, rf"{NAMES[2]}.gz is truncated or altered \(30 bytes\)"),
    ],
)
def test_broken_files_are_named(small, name, damage, message):
    folder, sums = small
    if name.endswith(".gz"):
        pack(folder / RAW)
    path = folder / RAW / name
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(DataError, match=message) as caught:
        load(folder, sums)
    assert fashion_mnist.LAYOUT in str(caught.value) and fashion_mnist.PAGE in str(caught.value)
    assert str(caught.value).split("\n")[0].count("is missing") + str(caught.value).count("altered") == 1


def test_a_sound_file_beside_a_broken_one_is_enough(small):
    folder, sums = small
    with gzip.open(folder / RAW / f"{NAMES[0]}.gz", "wb") as archive:
        archive.write((folder / RAW / NAMES[0]).read_bytes())
    (folder / RAW / NAMES[0]).write_bytes(b"half")
    assert len(load(folder, sums).train) == 20


def test_the_sums_are_those_of_torchvisions_four_files():
    prepare_torchvision()
    from torchvision.datasets import FashionMNIST

    assert {f"{name}.gz" for name in NAMES} == {name for name, _ in FashionMNIST.resources}
    assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in fashion_mnist.SUMS.values())


def test_without_a_folder_the_files_wanted_are_shown(capsys):
    assert train.main(["--benchmark", "fashion-mnist"]) == 2
    message = capsys.readouterr().err
    assert "needs --data-dir" in message and fashion_mnist.LAYOUT in message and fashion_mnist.PAGE in message


def test_check_data_reports_counts(small, capsys, monkeypatch):
    folder, sums = small
    monkeypatch.setitem(BENCHMARKS, "fashion-mnist", partial(fashion_mnist.load, dataset=subclass(), sums=sums))
    assert train.main(["--benchmark", "fashion-mnist", "--data-dir", str(folder), "--check-data"]) == 0
    assert "fashion-mnist: 20 training and 10 test images, 10 classes in 5 tasks" in capsys.readouterr().out


def test_a_run_at_ten_classes_and_five_tasks(small, weights, tmp_path, monkeypatch):
    folder, sums = small
    monkeypatch.setitem(BENCHMARKS, "fashion-mnist", partial(fashion_mnist.load, dataset=subclass(), sums=sums))
    flags = f"--benchmark fashion-mnist --data-dir {folder} --backbone emoji --weights {weights} --rank 4 --epochs 1"
    assert train.main([*flags.split(), "--workers", "1", "--no-plots", "--output", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["accuracy_matrix"]) == 5 and results["test_sizes"] == [2] * 5
    assert results["split_sha256"] == load(folder, sums).split_sha256
