"""Class orders, splits, and the embedded benchmark."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from together import noisy

from janus_ext.config import TrainConfig
from janus_ext.data import emoji
from janus_ext.data.benchmark import Benchmark, MemorySplit, Selection
from janus_ext.data.images import Arrays, ImageSplit, View
from janus_ext.data.tasks import class_order, default_tasks, split_classes, split_sha256
from janus_ext.errors import ArgumentError, DataError


@pytest.fixture(scope="module")
def embedded() -> Benchmark:
    return emoji.load(TrainConfig())


# tasks ---------------------------------------------------------------------------------------------------------------
def test_class_order_is_the_identity_without_a_seed_and_a_fixed_permutation_with_one():
    assert class_order(5) == (0, 1, 2, 3, 4)
    assert class_order(6, seed=200) == (2, 4, 0, 3, 5, 1)  # the same on every machine, for ever
    assert sorted(class_order(50, seed=1)) == list(range(50))
    assert class_order(50, seed=1) != class_order(50, seed=2)


@pytest.mark.parametrize(("classes", "tasks"), [(200, 10), (7, 3), (4, 2), (4, 1)])
def test_tasks_partition_the_order_almost_evenly(classes, tasks):
    order = class_order(classes, seed=3)
    groups = split_classes(order, tasks)
    assert tuple(c for group in groups for c in group) == order
    assert len(groups) == tasks and max(map(len, groups)) - min(map(len, groups)) <= 1


@pytest.mark.parametrize("tasks", [0, 6, -1])
def test_an_impossible_number_of_tasks_names_the_flag(tasks):
    with pytest.raises(ArgumentError, match=r"--tasks must lie in 1\.\.5"):
        split_classes(range(5), tasks)


@pytest.mark.parametrize(("classes", "tasks"), [(2, 1), (3, 1), (4, 2), (10, 5), (11, 5), (19, 9), (20, 10), (500, 10)])
def test_by_default_a_task_has_two_classes_at_least(classes, tasks):
    assert default_tasks(classes, 10) == tasks
    assert min(map(len, split_classes(range(classes), tasks))) >= 2


def test_a_task_of_one_class_needs_a_head_that_learns_it():
    with pytest.raises(ArgumentError, match="^--tasks 6 of 11 classes makes .*; --tasks 1 to 5 fit, or --head lda$"):
        split_classes(range(11), 6, "linear")
    assert list(map(len, split_classes(range(11), 6, "ncm"))) == [2, 2, 2, 2, 2, 1]
    with pytest.raises(ArgumentError, match="--tasks 150 of 200 classes"):
        emoji.load(TrainConfig(tasks=150, head="linear").resolved())
    assert len(emoji.load(TrainConfig(tasks=200).resolved()).tasks) == 200


@pytest.mark.parametrize("classes", [0, 1])
@pytest.mark.parametrize("head", ["linear", "ncm"])
def test_one_class_is_no_benchmark(classes, head):
    with pytest.raises(DataError, match=f"at least two classes, got {classes}"):
        split_classes(range(classes), 1, head)


def test_fingerprints_of_ordinary_and_of_odd_names():
    ordinary = split_sha256(["b/ä.jpg", "a/1.jpg"], ["c/😀.png"], [(0,), (1,)])
    assert ordinary == "66cfd1a745a5838d563c278a2a1eb694be4023cf2c6f060842890fe08a149d8b"
    odd = [split_sha256(["a", name], ["c"], [(0,), (1,)]) for name in ("caf\udce9.jpg", "caf\udce8.jpg", "café.jpg")]
    assert len(set(odd)) == 3


def test_fingerprint_ignores_the_order_of_samples_and_sees_everything_else():
    base = split_sha256(["a", "b"], ["c"], [(0,), (1,)])
    assert base == split_sha256(["b", "a"], ["c"], [(0,), (1,)])
    others = [
        split_sha256(["a"], ["b", "c"], [(0,), (1,)]),
        split_sha256(["a", "b"], ["c"], [(1,), (0,)]),
        split_sha256(["a", "b"], ["c"], [(0, 1)]),
    ]
    assert len({base, *others}) == 4


# splits --------------------------------------------------------------------------------------------------------------
def tiny_split(augmentation=None) -> MemorySplit:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 4).contiguous()
    return MemorySplit(images, torch.tensor([2, 0, 2, 1, 0, 2]), list("abcdef"), augmentation)


def test_a_split_is_a_map_style_data_set():
    split = tiny_split()
    image, label = split[3]
    assert len(split) == 6 and image.dtype == torch.uint8 and image.shape == (3, 4, 4) and int(label) == 1


def test_selection_by_class_and_limit():
    split = tiny_split()
    assert split.of_classes([0, 1]).tolist() == [1, 3, 4]
    assert split.first_per_class(2).tolist() == [0, 1, 2, 3, 4]
    taken = split.take(torch.tensor([5, 1]))
    assert taken.samples == ("f", "b") and taken.labels.tolist() == [2, 0] and int(taken.images[0, 0, 0, 0]) == 5


def test_a_stream_is_augmented_only_with_a_generator():
    split = tiny_split(augmentation=lambda images, generator: images + 100)
    batches = [torch.tensor([0, 1]), torch.tensor([2])]
    assert [int(images.max()) for images, _ in split.stream(batches)] == [1, 2]
    assert [int(images.max()) for images, _ in split.stream(batches, torch.Generator())] == [101, 102]


def test_a_split_of_uneven_parts_is_refused():
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="^MemorySplit: samples must be 3 names, one an image, got 2 names$"):
        MemorySplit(images, torch.tensor([0, 1, 0]), ["a", "b"])
    with pytest.raises(
        ArgumentError, match=r"^MemorySplit: labels must be \[3\] integers, one an image, from 0 on, got"
    ):
        MemorySplit(images, torch.zeros(3), ["a", "b", "c"])


# the embedded benchmark ----------------------------------------------------------------------------------------------
def test_emoji_has_the_published_size(embedded):
    assert (len(embedded.train), len(embedded.test)) == (1200, 400)
    assert [len(classes) for classes in embedded.tasks] == [20] * 10
    assert len(set(embedded.class_names)) == 200
    assert torch.bincount(embedded.train.labels).tolist() == [6] * 200
    assert torch.bincount(embedded.test.labels).tolist() == [2] * 200


def test_emoji_train_and_test_are_disjoint_and_keep_families_together(embedded):
    train, test = set(embedded.train.samples), set(embedded.test.samples)
    assert not train & test
    for pair in (("openmoji", "openmoji-black"), ("fluent-3d", "fluent-flat")):
        codes = [{s.split("/")[1] for s in test if s.split("/")[0] == style} for style in pair]
        assert codes[0] == codes[1], pair


def test_emoji_tasks_mix_categories(embedded):
    table = emoji.read_table(emoji.ASSETS / "emoji.json")
    categories = [c["category"] for c in sorted(table["concepts"], key=lambda c: c["code"])]
    assert all(len({categories[c] for c in classes}) >= 4 for classes in embedded.tasks)


def test_positions_invert_the_class_order(embedded):
    order = torch.tensor(embedded.class_order)
    assert torch.equal(embedded.positions[order], torch.arange(200))


def test_shuffled_orders_follow_the_seed(embedded):
    orders = [emoji.load(TrainConfig(shuffle_classes=True, seed=(s,))).class_order for s in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert embedded.class_order not in orders


def test_limited_benchmark_keeps_every_class():
    small = emoji.load(TrainConfig(limit_per_class=1, tasks=4))
    assert (len(small.train), len(small.test), len(small.tasks)) == (200, 200, 4)


def test_augmentation_is_repeatable_and_keeps_the_ground_white(embedded):
    images = embedded.train.images[:16]
    augment = emoji.RandomAffine()
    first, again, other = (augment(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.uint8 and first.shape == images.shape
    white = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    assert torch.equal(augment(white, torch.Generator().manual_seed(0)), white)


def test_augmentation_without_amplitude_changes_nothing(embedded):
    images = embedded.train.images[:4]
    still = emoji.RandomAffine(zoom=(1.0, 1.0), aspect=0.0, shift=0.0, brightness=0.0, contrast=0.0)
    difference = still(images, torch.Generator()).int() - images.int()
    assert difference.abs().max() <= 1


def test_a_damaged_archive_is_named(tmp_path):
    table = {"styles": ["noto"], "families": [], "concepts": [{"code": "1f600", "name": "grin", "test_styles": []}]}
    (tmp_path / "emoji.json").write_text(json.dumps(table))
    (tmp_path / "emoji.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="emoji.zip cannot be read"):
        emoji.load(TrainConfig(tasks=1), tmp_path)
    with zipfile.ZipFile(tmp_path / "emoji.zip", "w") as archive:
        archive.writestr("noto/other.txt", "")
    with pytest.raises(DataError, match=r"lacks noto/1f600\.png"):
        emoji.load(TrainConfig(tasks=1), tmp_path)


# of several processes ------------------------------------------------------------------------------------------
class Own(MemorySplit):
    """A split that knows of no parts."""

    def stream(self, batches, generator=None, skip=0):
        return super().stream(batches, generator, skip)


@pytest.mark.parametrize("kind", [MemorySplit, Own, ImageSplit])
def test_the_parts_of_a_batch_are_the_batch(patterns, kind) -> None:
    """Whoever cuts them: as they are, augmented, in order."""
    images = patterns.train.images
    if kind is ImageSplit:
        pixels = Arrays([image.permute(1, 2, 0).numpy() for image in images])
        split = ImageSplit(pixels, range(len(images)), patterns.train.labels, patterns.train.samples, View(32))
    else:
        split = kind(images, patterns.train.labels, patterns.train.samples, noisy)
    selection = Selection.all_of(split, range(6))
    whole = list(selection.shuffled(10, seed=3, skip=1))
    parts = [list(selection.shuffled(10, 3, 1, lambda rows, i=i: rows.tensor_split(3)[i])) for i in range(3)]
    assert len(whole) == 4 and all(len(part) == 4 for part in parts)
    for (batch, labels), *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(batch, torch.cat([piece for piece, _ in pieces]))
        assert torch.equal(labels, torch.cat([piece for _, piece in pieces]))


@pytest.mark.parametrize("labels", [[0, 1], None, torch.tensor([0.5, 1.0])], ids=["list", "none", "fractions"])
def test_labels_of_a_split_of_ones_own_are_integers(patterns, labels) -> None:
    own = Own(patterns.train.images, patterns.train.labels, patterns.train.samples)
    own.labels = labels
    with pytest.raises(ArgumentError, match=r"Benchmark: train\.labels must be "):
        replace(patterns, train=own)


def test_a_benchmark_has_images_and_every_class_name_once(patterns) -> None:
    none = MemorySplit(patterns.test.images[:0], patterns.test.labels[:0], [])
    with pytest.raises(ArgumentError, match="Benchmark: train must have one image at least, got none"):
        replace(patterns, train=none)
    untested = replace(patterns, test=none)
    with pytest.raises(ArgumentError, match="Benchmark: test must have one image at least, or --validation hold some"):
        untested.as_asked(TrainConfig())
    asked = TrainConfig(validation=0.5, limit_per_class=4, seed=(0,))
    assert untested.as_asked(asked).test.samples == patterns.as_asked(asked).test.samples != []
    with pytest.raises(ArgumentError, match="Benchmark: class_names must differ, got 'b' more than once"):
        replace(patterns, class_names=("a", "b", "c", "b", "e", "f"))


def test_class_ids_of_any_kind_become_integers(patterns) -> None:
    """They are written down behind the first task."""
    tasks = replace(patterns, tasks=[range(2), list(np.array([3, 2])), (4, 5)]).tasks
    assert tasks == ((0, 1), (3, 2), (4, 5)) and json.dumps(tasks)


def test_labels_of_a_split_of_ones_own_are_in_a_row_and_no_mask(patterns) -> None:
    images, samples = patterns.train.images[:6], patterns.train.samples[:6]
    own = Own(images, torch.tensor([5, 1, 2, 3, 4, 1], dtype=torch.uint8), samples)  # as many as there are classes
    [(_, outputs)] = Selection.all_of(own, [5, 4, 3, 2, 1, 0]).batches(6)
    assert outputs.tolist() == [0, 4, 3, 2, 1, 4]
    with pytest.raises(ArgumentError, match=r"Benchmark: train\.labels must be integers \[N\]"):
        own.labels = own.labels.long()[:, None]
        replace(patterns, train=own)
