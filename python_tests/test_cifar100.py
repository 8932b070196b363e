"""CIFAR-100: torchvision's own files and checks, with the MD5 sums of a small stand-in."""

import hashlib
import json
import tarfile

import numpy as np
import pytest
import torch
import trees

from janus_ext import train
from janus_ext.backbone import prepare_torchvision
from janus_ext.config import TrainConfig
from janus_ext.data import BENCHMARKS, cifar100
from janus_ext.errors import DataError


def subclass(contents: dict[str, bytes], **changes) -> type:
    """torchvision's class with the sums of ``contents``; nothing is downloaded from anywhere but ``changes["url"]``."""
    prepare_torchvision()
    from torchvision.datasets import CIFAR100

    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    body = {
        "url": "file:///nowhere/cifar-100-python.tar.gz",
        "train_list": [["train", sums["train"]]],
        "test_list": [["test", sums["test"]]],
        "meta": {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]},
    }
    return type("SmallCIFAR100", (CIFAR100,), body | changes)


@pytest.fixture
def small(tmp_path):
    """(folder, class) of two training and one test image of each of the 100 classes."""
    return tmp_path, subclass(trees.cifar100(tmp_path))


def load(folder, dataset, **changes):
    config = TrainConfig(benchmark="cifar100", data_dir=folder, workers=0, **changes).resolved()
    return cifar100.load(config, dataset)


def test_images_labels_and_names_are_torchvisions(small):
    benchmark = load(*small)
    assert (len(benchmark.train), len(benchmark.test)) == (200, 100)
    assert [len(classes) for classes in benchmark.tasks] == [10] * 10 and benchmark.class_names[7] == "thing_07"
    assert torch.bincount(benchmark.train.labels).tolist() == [2] * 100
    assert benchmark.train.samples[:2] == ("train/0", "train/1") and benchmark.test.samples[99] == "test/99"
    folder, dataset = small
    listed = dataset(str(folder), train=False)
    ours = benchmark.test.at(32)
    for n in (0, 57):
        assert torch.equal(ours[n][0].permute(1, 2, 0), torch.from_numpy(np.asarray(listed[n][0]).copy()))
        assert int(ours[n][1]) == listed[n][1]


def test_test_images_are_resized_without_a_crop(small):
    assert load(*small).test.at(224)[0][0].shape == (3, 224, 224)
    assert load(*small).test.view.margin == 1.0


def test_the_archive_is_downloaded_checked_and_unpacked(web_server, tmp_path):
    contents = trees.cifar100(tmp_path / "source")
    archive = tmp_path / "www" / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-100-python", "cifar-100-python")
    address = {"url": f"{web_server}/{archive.name}", "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest()}
    assert len(load(tmp_path / "target", subclass(contents, **address)).train) == 200
    (tmp_path / "target" / "cifar-100-python" / "test").write_bytes(b"")
    archive.unlink()
    assert len(load(tmp_path / "target", subclass(contents, **address)).test) == 100  # from the archive kept there
    with pytest.raises(DataError, match="cifar-100-python/meta is missing; not to be downloaded now: .*404"):
        load(tmp_path / "other", subclass(contents, **address))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train", None, "cifar-100-python/train is missing; not to be downloaded now: "),
        ("test", lambda data: data[:-1], "cifar-100-python/test is truncated or altered"),
        ("meta", lambda data: b"", r"cifar-100-python/meta is truncated or altered \(0 bytes\)"),
    ],
)
def test_broken_files_are_named_and_never_unpickled(small, name, damage, message):
    folder, dataset = small
    path = folder / "cifar-100-python" / name
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(DataError, match=message) as caught:
        load(folder, dataset)
    assert "<data-dir>/cifar-100-python/train" in str(caught.value) and cifar100.PAGE in str(caught.value)


def test_without_a_folder_the_files_wanted_are_shown(capsys):
    assert train.main(["--benchmark", "cifar100"]) == 2
    message = capsys.readouterr().err
    assert "needs --data-dir" in message and cifar100.LAYOUT in message and cifar100.PAGE in message


def test_check_data_reports_counts(small, capsys, monkeypatch):
    folder, dataset = small
    monkeypatch.setitem(BENCHMARKS, "cifar100", lambda config: cifar100.load(config, dataset))
    assert train.main(["--benchmark", "cifar100", "--data-dir", str(folder), "--check-data"]) == 0
    assert "cifar100: 200 training and 100 test images, 100 classes in 10 tasks" in capsys.readouterr().out


def test_a_run_at_100_classes_and_ten_tasks(small, weights, tmp_path, monkeypatch):
    folder, dataset = small
    monkeypatch.setitem(BENCHMARKS, "cifar100", lambda config: cifar100.load(config, dataset))
    flags = f"--benchmark cifar100 --data-dir {folder} --backbone emoji --weights {weights} --rank 4 --shuffle-classes"
    flags += " --epochs 1"
    assert train.main([*flags.split(), "--workers", "1", "--no-plots", "--output", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["accuracy_matrix"]) == 10 and results["test_sizes"] == [10] * 10
    assert sorted(results["class_order"]) == list(range(100)) != results["class_order"]
    assert results["split_sha256"] == load(folder, dataset, shuffle_classes=True).split_sha256
