"""DomainNet's folders and lists: what is loaded, what is refused by path and line, and a run at its real size."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import trees

from janus_ext import train
from janus_ext.config import TrainConfig
from janus_ext.data import domainnet
from janus_ext.errors import ArgumentError, DataError

FIVE = ("clipart", "infograph", "painting", "real", "sketch")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """345 classes in five domains, one training and one test image of each class and domain."""
    root = tmp_path_factory.mktemp("domainnet")
    trees.domainnet(root, FIVE)
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """345 classes in two domains."""
    root = tmp_path_factory.mktemp("two")
    trees.domainnet(root, ("clipart", "quickdraw"))
    return root


@pytest.fixture
def tree(two, tmp_path):
    """A copy to be broken."""
    return Path(shutil.copytree(two, tmp_path / "tree"))


@pytest.fixture
def lists(two, tmp_path):
    """A copy of the lists alone, for what must be found before any image is looked for."""
    for path in two.glob("*.txt"):
        shutil.copy(path, tmp_path)
    return tmp_path


def load(root, **changes):
    config = TrainConfig(benchmark="domainnet", data_dir=root, workers=0, **changes).resolved()
    return domainnet.load(config)


def load_two(root, **changes):
    return load(root, domains=("quickdraw", "clipart"), **changes)


# what is loaded ------------------------------------------------------------------------------------------------------
def test_five_domains_are_mixed_in_five_tasks_of_69_classes(whole):
    benchmark = load(whole)
    assert [len(classes) for classes in benchmark.tasks] == [69] * 5
    assert benchmark.class_order == tuple(range(345)) and benchmark.class_names[344] == "thing_344"
    for split in (benchmark.train, benchmark.test):
        assert torch.bincount(split.labels).tolist() == [5] * 345
        assert Counter(name.split("/")[0] for name in split.samples) == dict.fromkeys(FIVE, 345)
    assert all(f"thing_{c:03d}/" in n for n, c in zip(benchmark.test.samples, benchmark.test.labels, strict=True))
    assert not set(benchmark.train.samples) & set(benchmark.test.samples)


def test_a_limit_counts_over_all_domains_and_takes_different_ones(tmp_path):
    trees.domainnet(tmp_path, ("clipart", "quickdraw"), train=2)
    small = load_two(tmp_path, limit_per_class=2)
    assert Counter(name.split("/")[0] for name in small.train.samples) == {"clipart": 345, "quickdraw": 345}


def test_official_totals_are_those_of_the_data_sets_page():
    assert sum(n for n, _ in domainnet.OFFICIAL.values()) == 409_832
    assert sum(n for _, n in domainnet.OFFICIAL.values()) == 176_743
    assert sum(domainnet.OFFICIAL[d][0] for d in FIVE) == 289_082
    assert sum(domainnet.OFFICIAL[d][1] for d in FIVE) == 124_993


def test_counts_unlike_the_official_ones_are_a_warning(two, caplog):
    load_two(two)
    assert "not the official data set: clipart train 345 images (official: 33,525)" in caplog.text


def test_windows_line_ends_and_empty_lines_are_no_matter(tree):
    want = load_two(tree).split_sha256
    for path in tree.glob("*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert load_two(tree).split_sha256 == want


ODD = {
    "a byte order mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "tabs": lambda text: text.replace(" ", "\t").encode(),
    "backslashes": lambda text: text.replace("/", "\\").encode(),
    "./": lambda text: "".join("./" + line for line in text.splitlines(True)).encode(),
    "spaces": lambda text: text.replace(" ", "   ").replace("\n", "  \n").encode(),
    "old Macs": lambda text: text.replace("\n", "\r").encode(),
    "another machine": lambda text: text.replace("clipart/", "/data/DomainNet/clipart/").encode(),
    "all": lambda text: text.replace("/", "\\").replace(" ", "\t ").replace("\n", "\t\r\n").encode("utf-8-sig"),
}


@pytest.mark.parametrize("system", ODD)
def test_lists_of_other_systems_are_read(two, tree, system):
    for path in tree.glob("*.txt"):
        path.write_bytes(ODD[system](path.read_text()))
    assert load_two(tree).split_sha256 == load_two(two).split_sha256


def test_names_that_are_no_text_are_found_on_the_disk(tree):
    for path in tree.glob("clipart_*.txt"):
        path.write_bytes(path.read_bytes().replace(b"clipart_013_", b"\xe9_"))
    for path in (tree / "clipart/thing_012").iterdir():
        os.rename(path, os.fsencode(path).replace(b"clipart_013_", b"\xe9_"))
    found = load_two(tree)
    assert "clipart/thing_012/\udce9_000001.jpg" in found.train.samples


def test_one_domain_alone_may_lack_classes(tree, caplog, weights, tmp_path):
    drop(tree / "clipart_train.txt", "thing_003", "thing_344")
    drop(tree / "clipart_test.txt", "thing_003")
    found = load(tree, domains=("clipart",))
    assert (
        "clipart has no training image of 2 of the 345 classes (class id 3, thing_344): they are left out, the class "
        "ids behind them move up, and 343 classes are divided into tasks" in caplog.text
    )
    assert len(found.class_names) == 343 and [len(classes) for classes in found.tasks] == [69, 69, 69, 68, 68]
    for split in (found.train, found.test):
        assert all(
            name.split("/")[1] == found.class_names[c] for name, c in zip(split.samples, split.labels, strict=True)
        )
    assert len(found.test) == 343
    assert load_two(tree).class_names[344] == "thing_344"  # with another domain nothing is lacking


def test_yaml_lists_are_the_same_split(whole, tmp_path):
    files = trees.domainnet_yaml(whole, tmp_path)
    want = load(whole)
    found = load(whole, split="coda", split_files=files)
    assert found.split_sha256 == want.split_sha256 and found.train.samples == want.train.samples
    some = load(whole, split="coda", split_files=files, domains=("real", "sketch"))
    assert some.split_sha256 == load(whole, domains=("real", "sketch")).split_sha256
    with pytest.raises(DataError, match="domainnet_train.yaml is empty: no entry is of quickdraw, which --domains may"):
        load(whole, split="coda", split_files=files, domains=("real", "quickdraw"))


def test_yaml_lists_lie_beside_the_images(tree):
    with pytest.raises(DataError, match="domainnet_train.yaml cannot be read: No such file.*--split-files"):
        load_two(tree, split="coda")
    trees.domainnet_yaml(tree, tree)
    assert load_two(tree, split="coda").split_sha256 == load_two(tree).split_sha256


def test_bad_yaml_entries_are_named(tree):
    train_file, _ = trees.domainnet_yaml(tree, tree)
    text = train_file.read_text()
    for old, new, complaint in (
        (
            "- data/DomainNet/clipart",
            "- data/DomainNet/photo",
            "entry 1 is wrong: wanted clipart|infograph|.*<file>, got",
        ),
        ("targets:\n- 0", "targets:\n- 345", "entry 1 is wrong: the class id must lie in 0..344, got 345"),
    ):
        train_file.write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match=complaint):
            load_two(tree, split="coda")


# what is refused -----------------------------------------------------------------------------------------------------
def test_without_a_folder_the_exact_tree_is_shown(capsys):
    assert train.main(["--benchmark", "domainnet", "--domains", "clipart", "quickdraw"]) == 2
    message = capsys.readouterr().err
    assert "needs --data-dir" in message and domainnet.PAGE in message
    for wanted in ("clipart/<class>/*.jpg", "quickdraw_train.txt", "clipart_001_000001.jpg 0"):
        assert wanted in message
    assert "real" not in message


@pytest.mark.parametrize(
    ("file", "edit", "complaint"),
    [
        (
            "clipart_train.txt",
            lambda ls: [*ls, "clipart/thing_000/x.jpg 345"],
            "clipart_train.txt:346 .*0..344, got 345",
        ),
        ("clipart_train.txt", lambda ls: [*ls, "clipart/thing_000/x.jpg -1"], "clipart_train.txt:346 .*wanted <path>"),
        ("clipart_train.txt", lambda ls: [*ls[:9], "clipart/thing_009", *ls[10:]], "clipart_train.txt:10 .*wanted"),
        ("clipart_train.txt", lambda ls: [*ls, ls[7]], "train.txt:346 .*000001.jpg is listed in clipart_train.txt:8"),
        ("clipart_train.txt", lambda ls: [*ls, "clipart/../real/x.jpg 3"], "clipart_train.txt:346 .*<class>/<file>"),
        ("clipart_train.txt", lambda ls: [*ls, "/etc/passwd 3"], "clipart_train.txt:346 .*<class>/<file>"),
        ("clipart_train.txt", lambda ls: [*ls, "real/thing_003/x.jpg 3"], "clipart_train.txt:346 .*wanted clipart/"),
        ("quickdraw_test.txt", lambda ls: [ls[0][:-1] + "9", *ls[1:]], "quickdraw_test.txt:1 .*class 9 is thing_009"),
        ("clipart_test.txt", lambda ls: [*ls, "clipart/other/x.jpg 5"], "clipart_test.txt:346 .*class 5 is thing_005"),
    ],
)
def test_bad_lines_are_named_before_any_image_is_opened(lists, file, edit, complaint):
    (lists / file).write_text("\n".join(edit((lists / file).read_text().splitlines())) + "\n")
    with pytest.raises(DataError, match=complaint) as caught:
        load_two(lists)
    assert "\n" not in str(caught.value)


def test_an_image_in_training_and_test_is_named_with_both_lines(lists):
    line = (lists / "clipart_train.txt").read_text().splitlines()[11]
    with (lists / "clipart_test.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="clipart_test.txt:346 .*is listed in clipart_train.txt:12 already"):
        load_two(lists)


def test_a_wrong_number_of_classes_is_refused(tmp_path):
    trees.domainnet(tmp_path, ("clipart", "real"), classes=40)
    complaint = r"the lists of clipart, real must name 345 classes \(0..344\), got 40; the first that is missing is 40$"
    with pytest.raises(DataError, match=complaint):
        load(tmp_path, domains=("clipart", "real"))


def test_lists_in_which_nothing_is_right_are_named_by_line(lists):
    for path in lists.glob("*.txt"):
        path.write_text(path.read_text().replace("/", "|"))
    with pytest.raises(
        DataError, match="clipart_train.txt:1 is wrong: wanted clipart/<class>/<file>, got 'clipart|thing"
    ):
        load_two(lists)


def test_an_empty_list_is_named(lists):
    (lists / "quickdraw_train.txt").write_text("\n\n")
    with pytest.raises(DataError, match="quickdraw_train.txt is empty: no line names an image"):
        load_two(lists)


def test_a_class_without_a_training_line_is_refused(lists):
    for domain in ("clipart", "quickdraw"):
        drop(lists / f"{domain}_train.txt", "thing_200")
    with pytest.raises(DataError, match="1 of 345 classes have no training image: thing_200"):
        load_two(lists)


def drop(path, *names):
    """Takes the lines of some classes out of a list."""
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not any(n in line for n in names)))


def test_a_missing_list_is_named(lists):
    (lists / "quickdraw_test.txt").unlink()
    with pytest.raises(DataError, match="quickdraw_test.txt cannot be read: No such file"):
        load_two(lists)


def test_a_list_that_is_no_text_is_named(lists):
    (lists / "quickdraw_test.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="quickdraw_test.txt cannot be read: 'utf-16-le'"):
        load_two(lists)


def test_a_missing_image_is_found_before_training(tree):
    (tree / "clipart/thing_012/clipart_013_000001.jpg").unlink()
    with pytest.raises(DataError, match="clipart/thing_012/clipart_013_000001.jpg is missing"):
        load_two(tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ("real", "real")}, "--domains needs one or more different names"),
        ({"domains": ()}, "--domains needs one or more different names"),
        ({"benchmark": "emoji", "domains": ("real",)}, "--benchmark emoji has no --domains"),
    ],
)
def test_impossible_domains_are_refused(changes, message):
    with pytest.raises(ArgumentError, match=message):
        TrainConfig(**({"benchmark": "domainnet"} | changes)).resolved()


# the check -----------------------------------------------------------------------------------------------------------
def test_check_data_lists_all_that_is_wrong(tree, capsys):
    (tree / "clipart/thing_001/clipart_002_000001.jpg").unlink()
    (tree / "clipart/thing_002/clipart_003_000001.jpg").write_bytes(b"")
    cut = tree / "quickdraw/thing_003/quickdraw_004_000002.jpg"
    cut.write_bytes(cut.read_bytes()[:-30])
    shutil.copy(cut.with_name("quickdraw_004_000001.jpg"), cut.with_name("stray.jpg"))
    with (tree / "clipart_train.txt").open("a") as file:
        file.write("clipart/thing_004/x.jpg 999\n")
    flags = ["--benchmark", "domainnet", "--domains", "clipart", "quickdraw", "--data-dir", str(tree), "--check-data"]
    assert train.main(flags) == 2
    out, err = capsys.readouterr()
    for line in (
        "wrong +clipart_train.txt:346 ",
        "missing +clipart/thing_001/clipart_002_000001.jpg ",
        "empty +clipart/thing_002/clipart_003_000001.jpg ",
        "unreadable +quickdraw/thing_003/quickdraw_004_000002.jpg +.image file is truncated",
        "unlisted +quickdraw/thing_003/stray.jpg",
        "clipart train +345 +33,525",
    ):
        assert re.search(line, out), line
    assert "ground truth" in out and "correct the lines" in out and "Files that are not used: 1;" in out
    assert "1 wrong, 1 missing, 1 empty, 1 unreadable" in err


# a run ---------------------------------------------------------------------------------------------------------------
def test_a_run_at_345_classes_and_five_tasks(whole, weights, tmp_path):
    flags = f"--benchmark domainnet --data-dir {whole} --backbone emoji --weights {weights} --batch-size 64 --rank 4"
    flags += " --epochs 1 --optimizer adam --lr 0.008"  # an update well above the rounding of the weights
    assert train.main([*flags.split(), "--workers", "1", "--no-plots", "--output", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3, 4, 5]
    assert results["class_order"] == list(range(345)) and results["test_sizes"] == [345] * 5
    assert results["split_sha256"] == load(whole).split_sha256
    assert max(results["violation"][1:]) <= 1e-5
    assert json.loads((tmp_path / "run" / "config.json").read_text())["domains"] == list(FIVE)
