"""Images handed over in any form: the same bits whatever the form, and one clear error before anything is learned."""

import re
import shutil

import numpy as np
import pytest
import torch
from collected import NAMES, Listed, assert_same, bits, image_folder, pixels, plain
from conftest import make_trainer
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset
from trees import drawing, folders, odd_images, save_jpeg

from janus_ext.config import MethodName, TrainConfig
from janus_ext.data import check, collect, folder
from janus_ext.data.benchmark import Benchmark
from janus_ext.data.collect import labelled, labelled_as, require_readable, unlabelled
from janus_ext.data.images import View
from janus_ext.data.items import to_image
from janus_ext.errors import ArgumentError, DataError

SMALL = View(32)


# the same images in every form ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["torchvision", "paths and names", "paths and ids", "pillow", "in memory", "relative"])
def test_every_form_gives_the_bits_of_the_folder(tree, form, monkeypatch):
    found = labelled(tree, view=SMALL)
    assert found.class_names == NAMES and found.split.samples[-1] == "eel/deep/er.JPG"
    assert torch.bincount(found.split.labels).tolist() == [5, 4, 5]
    labels = found.split.labels.tolist()
    paths = [tree / name for name in found.split.samples]
    monkeypatch.chdir(tree.parent)
    other = {
        "torchvision": lambda: labelled(image_folder(tree), view=SMALL),
        "paths and names": lambda: labelled(list(zip(paths, map(NAMES.__getitem__, labels), strict=True)), view=SMALL),
        "paths and ids": lambda: labelled(list(zip(map(str, paths), labels, strict=True)), NAMES, view=SMALL),
        "pillow": lambda: labelled(
            Listed([plain(p, c) for p, c in zip(paths, labels, strict=True)], NAMES), view=SMALL
        ),
        "in memory": lambda: labelled([plain(p, NAMES[c]) for p, c in zip(paths, labels, strict=True)], view=SMALL),
        "relative": lambda: labelled([(f"tree/./{n}", NAMES[n > "d"]) for n in found.split.samples[:9]], view=SMALL),
    }[form]()
    if form == "relative":
        assert other.split.samples == found.split.samples[:9] and other.class_names == NAMES[:2]
        assert_same(other.split, found.split.take(torch.arange(9)))
    else:
        assert other.class_names == NAMES
        assert_same(other.split, found.split)


def test_training_sees_what_the_benchmark_folder_sees(tree):
    shutil.copytree(tree, tree.parent / "parts" / "train")
    shutil.copytree(tree, tree.parent / "parts" / "test")
    settings = {"benchmark": "folder", "data_dir": tree.parent / "parts", "workers": 0}
    assert_same(labelled(tree).split, folder.load(TrainConfig(**settings).resolved()).train)


@pytest.mark.parametrize("mode", ["tensors", "random"])
def test_the_bits_do_not_depend_on_workers(tree, mode):
    """Also where a data set draws from torch's random numbers itself, as torchvision's transforms do."""

    class Noisy(Listed):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return (image + torch.randint(50, image.shape)).to(torch.uint8), label

    items = [(pixels(c, n) // 2, c) for n in range(12) for c in range(3)]
    held = (Listed if mode == "tensors" else Noisy)(items, NAMES)
    state = torch.get_rng_state()
    here, there = labelled(held, view=SMALL), labelled(held, view=SMALL, workers=2)
    assert_same(here.split, there.split)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(bits(here.split, 3)[0], bits(here.split, 4)[0])


def test_a_grey_tensor_is_that_grey_and_an_odd_image_is_laid_on_white(tmp_path):
    assert np.asarray(to_image(torch.full((1, 5, 6), 77, dtype=torch.uint8))).tolist() == [[[77] * 3] * 6] * 5
    for name in odd_images(tmp_path):
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(to_image(image), to_image(tmp_path / name)), name


def test_a_picture_in_memory_is_left_as_it_is(tree):
    image, _ = plain(tree / "cat" / "turned.jpg", 0)
    before = image.tobytes(), image.size, image.mode, dict(image.getexif())
    assert to_image(image).size == image.size[::-1]
    assert (image.tobytes(), image.size, image.mode, dict(image.getexif())) == before


# classes -------------------------------------------------------------------------------------------------------------
def test_classes_choose_and_order_those_that_images_bring(tree):
    wanted = ["eel", "cat"]
    for images in (tree, str(tree), image_folder(tree)):
        found = labelled(images, wanted)
        assert found.class_names == ("eel", "cat") and torch.bincount(found.split.labels).tolist() == [5, 5]
    whole, part = labelled(tree, view=SMALL).split, labelled(image_folder(tree), wanted, view=SMALL).split
    assert torch.equal(bits(part)[0], bits(whole.take(whole.of_classes([0, 2])))[0])
    assert part.labels.tolist() == [1] * 5 + [0] * 5


def test_of_a_subset_the_classes_with_images_are_taken():
    held = Listed([(pixels(c), c) for c in (4, 0, 2, 2)], ["a", "b", "c", "d", "e"])
    found = labelled(Subset(Subset(held, [0, 2, 3]), [0, 2]))
    assert found.class_names == ("c", "e") and found.split.labels.tolist() == [1, 0]


@pytest.mark.parametrize("label", [2, np.int64(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8), "eel"])
def test_labels_of_every_integer_kind(label):
    held = Listed([(pixels(0), 0), (pixels(1), "dog, small"), (pixels(2), label)])
    assert labelled(held, NAMES).split.labels.tolist() == [0, 1, 2]


def test_names_that_only_the_labels_have_are_sorted():
    held = Listed([(pixels(c), name) for c, name in enumerate(["z", "A", "\u00e4", "z"])])
    assert labelled(held).class_names == ("A", "z", "\u00e4")


def test_for_an_evaluation_classes_may_lack_images_and_no_class_may_be_unknown(tree):
    known = ("x", "eel", "y", "dog, small", "cat")
    for images in (tree, image_folder(tree), Listed([(pixels(0), 4), (pixels(0), 1)]), [(tree / "cat/cat_0.jpg", 4)]):
        assert set(labelled_as(images, known).labels.tolist()) <= {1, 3, 4}
    message = r"^5 of 14 labels are none of the 3 classes: cat/cat_0.jpg has 'cat' \(similar: cats\)$"
    with pytest.raises(DataError, match=message):
        labelled_as(tree, ["cats", "eel", "dog, small"])


@pytest.mark.parametrize("method", MethodName.__args__)
def test_one_image_is_enough_for_a_class(tmp_path, weights, method):
    """Every method learns from it, and remembers, without a number that is not finite."""
    folders(tmp_path / "tree", 4, 1, "class {}".format)
    found = labelled(tmp_path / "tree", view=SMALL)
    tasks = ((0, 1, 2, 3),) if method == "joint" else ((0, 1), (2, 3))
    benchmark = Benchmark("ones", found.class_names, found.split, found.split, tasks)
    changes = {"frequencies": 100} if method == "bilora" else {}
    trainer = make_trainer(benchmark, weights, tmp_path / "run", method=method, **changes)
    trainer.run()
    assert all(
        value.isfinite().all() for value in trainer.learner.model.state_dict().values() if value.is_floating_point()
    )


# refusals of what images are -----------------------------------------------------------------------------------------
class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (np.zeros((4, 32, 32, 3), np.uint8), "an object of type ndarray"),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "an object of type Tensor"),
        (Endless(), "an object of type Endless"),
        (DataLoader(Listed([1])), "an object of type DataLoader"),
        ({"image": 1}, "an object of type dict"),
        ((pair for pair in ()), "an object of type generator"),
        (None, "None"),
        (7, "7"),
    ],
)
def test_what_holds_no_labelled_images(images, found):
    with pytest.raises(ArgumentError, match=f"^images must be {re.escape(collect.LABELLED)}, got {found}$"):
        labelled(images)
    if not isinstance(images, torch.Tensor):
        with pytest.raises(ArgumentError, match=f"^images must be {re.escape(collect.UNLABELLED)}, got {found}$"):
            unlabelled(images)


@pytest.mark.parametrize("images", [[], (), Listed([])])
def test_nothing_is_said_to_be_nothing(images):
    with pytest.raises(DataError, match="images is empty; wanted a folder of class folders"):
        labelled(images)
    with pytest.raises(DataError, match="images is empty; wanted a folder, a pattern"):
        unlabelled(images)


def test_folders_without_classes_or_with_them_a_level_deeper(tmp_path):
    with pytest.raises(DataError, match="none does not exist; wanted a folder of class folders"):
        labelled(tmp_path / "none")
    save_jpeg(tmp_path / "flat" / "1.jpg", drawing(0, 0))
    with pytest.raises(DataError, match=r"flat has no class folders; wanted .*flat/<class>/\*.jpg. Endings that count"):
        labelled(tmp_path / "flat")
    with pytest.raises(DataError, match="1.jpg is no folder"):
        labelled(tmp_path / "flat" / "1.jpg")
    for part in ("train", "test"):
        folders(tmp_path / "parts" / part, 3, 1)
    for part in ("train", "test"):
        (tmp_path / "parts" / part).rename(tmp_path / "parts" / f"{part} side")
    with pytest.raises(
        DataError, match=r"the 2 folders of .*parts \(test side, train side\) all hold the same .*: hand"
    ):
        labelled(tmp_path / "parts")
    assert labelled(tmp_path / "parts", ["train side", "test side"]).class_names == ("train side", "test side")


def test_a_file_has_one_label(tmp_path):
    save_jpeg(tmp_path / "1.jpg", drawing(0, 0))
    save_jpeg(tmp_path / "2.jpg", drawing(0, 0))
    one, two = str(tmp_path / "1.jpg"), tmp_path / "2.jpg"
    assert len(labelled([(one, "cat"), (two, "dog"), (two, "dog")]).split) == 3  # that is to count twice
    with pytest.raises(DataError, match="1.jpg has two labels, 'cat' and 'dog'"):
        labelled([(one, "cat"), (two, "dog"), (one, "dog")])


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "val")])
def test_training_and_test_images_are_no_two_classes(tmp_path, train, test):
    """Whatever they hold: a competition's test images lie in no class folders."""
    folders(tmp_path / train, 3, 1)
    save_jpeg(tmp_path / test / "1.jpg", drawing(0, 0))
    save_jpeg(tmp_path / "extra" / "1.jpg", drawing(0, 0))
    with pytest.raises(
        DataError, match=rf"holds training and test images \({train}, {test}\), .*: hand over one of them"
    ):
        labelled(tmp_path)
    assert labelled(tmp_path, [train, test]).class_names == (train, test)
    assert len(labelled_as(tmp_path, [train, test, "extra"])) == 5  # to whom they are classes


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes must be a list of class names, got []"),
        ("cat", "classes must be a list of class names, got 'cat'"),
        (["cat", 3], "classes must be names, got 3 at position 1"),
        (["cat", ""], "classes must be names, got '' at position 1"),
        (["cat", "eel", "cat"], "classes must be different names, got several times: cat"),
    ],
)
def test_class_names_that_are_none(tree, classes, message):
    for take in (labelled, labelled_as):
        with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
            take(tree, classes)


# refusals of what is in them -----------------------------------------------------------------------------------------
def test_a_class_without_images(tree):
    (tree / "empty").mkdir()
    (tree / "phone").mkdir()
    (tree / "phone" / "1.heic").write_bytes(b"x")
    message = (
        r"empty is without images: a class folder .*; phone is without images: its 1 files like phone/1.heic are not"
    )
    with pytest.raises(DataError, match=message):
        labelled(tree)
    assert labelled(tree, NAMES).class_names == NAMES
    with pytest.raises(DataError, match="^images must be of every class, 2 of 4 have none: cow, ape$"):
        labelled([(tree / "cat" / "cat_0.jpg", "cat"), (tree / "eel" / "eel_0.jpg", 3)], ["cat", "cow", "ape", "eel"])
    held = Listed([(pixels(0), 0)], ["a", "b"])
    with pytest.raises(DataError, match="^images must be of every class, 1 of 2 have none: b$"):
        labelled(held, ["a", "b"])


def test_classes_that_images_do_not_have(tree):
    with pytest.raises(
        DataError, match=r"classes: 1 of 2 names are none of the 3 classes below .*tree: 'cta' \(similar: cat\)$"
    ):
        labelled(tree, ["cta", "eel"])
    with pytest.raises(DataError, match="classes: 1 of 2 names are none of the 3 classes of the data set: 'cow'$"):
        labelled(image_folder(tree), ["cow", "eel"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0, 3, -1],
            "2 of 3 labels are none of the 3 classes: images[1] has 3 (wanted 0..2); images[2] has -1 (wanted",
        ),
        (
            ["cat", "cats", "x"],
            "2 of 3 labels are none of the 3 classes: images[1] has 'cats' (similar: cat); images[2]",
        ),
        ([0, 1.0, 2], "images[1]: a label is a class name or an integer, got the number 1.0"),
        ([0, True, 2], "images[1]: a label is a class name or an integer, got True"),
        ([0, None, 2], "images[1]: a label is a class name or an integer, got None"),
        ([torch.tensor(1.0), 1, 2], "images[0]: a label is a class name or an integer, got the number 1.0"),
        ([torch.tensor([1]), 1, 2], "images[0]: a label is a class name or an integer, got an object of type Tensor"),
    ],
)
def test_labels_that_are_not_the_classes(tree, labels, message):
    files = [tree / "cat" / f"cat_{n}.jpg" for n in range(3)]
    for values in ([pixels(c) for c in range(3)], files):
        held = list(zip(values, labels, strict=True))
        held = held if values is files else Listed(held)
        want = message.replace("images[1] has", "cat_1.jpg has").replace("images[2]", "cat_2.jpg")
        for take in (labelled, labelled_as):
            with pytest.raises(DataError, match=re.escape(want if values is files else message)):
                take(held, NAMES)


def test_numbers_need_names(tree):
    with pytest.raises(DataError, match="the labels are numbers, so classes= must name the classes, in their order"):
        labelled([(tree / "cat" / "cat_0.jpg", 0)])


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ((torch.zeros(3, 8, 8), 0), "got a float32 tensor [3, 8, 8]: colours are whole numbers from 0 to 255"),
        ((torch.zeros(8, 8, 3, dtype=torch.uint8), 0), "got a uint8 tensor [8, 8, 3]"),
        ((torch.zeros(8, 8, dtype=torch.uint8), 0), "got a uint8 tensor [8, 8]"),
        ((torch.zeros(3, 0, 8, dtype=torch.uint8), 0), "got a uint8 tensor [3, 0, 8]"),
        ((np.zeros((8, 8, 3), np.uint8), 0), "got a numpy array: PIL.Image.fromarray makes an image"),
        ((None, 0), "an image is a path, a PIL image, or a uint8 tensor [3, H, W] or [1, H, W], got None"),
        ((Image.new("F", (4, 4)), 0), "ValueError: pixels are floating point numbers"),
        (pixels(0), "wanted (image, label), got an object of type Tensor"),
        (("no/such.jpg", 0), "no/such.jpg cannot be read: no such file"),
        (KeyError("gone\nfor ever"), "KeyError: 'gone\\nfor ever'"),
        (OSError(5, "the disk is old"), "OSError: [Errno 5] the disk is old"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_is_no_image_is_named_by_its_position(item, reason, workers):
    held = Listed([(pixels(0), 0)] * 20 + [item])
    with pytest.raises(DataError, match=f"^images\\[20\\]: [^\n]*{re.escape(reason)}[^\n]*$"):
        labelled(held, ["a"], workers=workers)
    if isinstance(item, tuple):
        split = unlabelled(held, view=SMALL, workers=workers)
        for look in (require_readable, bits):
            with pytest.raises(DataError, match=f"^images\\[20\\]: [^\n]*{re.escape(reason)}[^\n]*$"):
                look(split)


def test_an_item_that_fails_later_is_named_too():
    held = Listed([(pixels(c), c) for c in range(3)], NAMES)
    split = labelled(held, view=SMALL).split
    held.items[1] = RuntimeError("out of shelf space")
    with pytest.raises(DataError, match=r"^images\[1\]: RuntimeError: out of shelf space$"):
        bits(split, 0)


def test_files_that_cannot_be_read_are_named_before(tree):
    for n in range(4):
        (tree / "eel" / f"eel_{n}.jpg").write_bytes(b"no image" * (n > 0))
    (tree / "cat" / "cat_0.jpg").unlink()
    pairs = [(path, path.parent.name) for path in sorted(tree.glob("[ce]*/*.jpg"))]
    message = "images below .*tree: eel/eel_0.jpg is empty: 0 bytes; eel/eel_1.jpg is unreadable: .*; and 1 more$"
    for images in (tree, pairs):
        with pytest.raises(DataError, match=message):
            labelled(images)
    assert labelled(tree, ["cat"]).class_names == ("cat",)  # what is left alone is not looked at
    missing = [(tree / "cat" / "cat_0.jpg", 0), (tree / "cat" / "cat_1.jpg", 0)]
    with pytest.raises(DataError, match="cat_0.jpg is missing: No such file or directory$"):
        labelled(missing, ["cat"])


def test_files_are_decoded_once_and_then_remembered(tree, monkeypatch):
    labelled(tree)
    monkeypatch.setattr(check, "_decode_one", lambda files, name: pytest.fail(f"{name} is decoded again"))
    labelled(tree)


@pytest.mark.parametrize("image", ["a\0b", "a\nb"])
def test_a_path_that_there_cannot_be_is_one_line(image):
    with pytest.raises(DataError, match="cannot be read: ") as caught:
        to_image(image)
    assert "\n" not in str(caught.value)


def test_an_image_without_end_is_refused():
    """Its pixels would be 50 TB; Pillow refuses such a file, too."""
    with pytest.raises(ArgumentError, match=r"an image must have at most [\d,]+ pixels, got a uint8 tensor \[3, 16, "):
        to_image(torch.zeros(1, dtype=torch.uint8).expand(3, 16, 2**40))
