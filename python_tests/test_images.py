"""Images in files: decoding, transforms, worker processes, memory."""

import os
import re
import signal

import numpy as np
import pytest
import torch
from trees import drawing, odd_images, save_jpeg

from janus_ext.data import images
from janus_ext.data.images import Arrays, Files, ImageSplit, View, read_image
from janus_ext.data.listing import IMAGE_SUFFIXES
from janus_ext.errors import ArgumentError, DataError


def make_split(folder, count: int = 12, workers: int = 0, size: int = 32) -> ImageSplit:
    names = [f"{n}.jpg" for n in range(count)]
    for n, name in enumerate(names):
        save_jpeg(folder / name, drawing(n, n))
    return ImageSplit(Files(folder), names, torch.arange(count) % 3, names, View(size), workers)


def batches_of(split: ImageSplit, seed: int | None = None, size: int = 5) -> list[torch.Tensor]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return [images for images, _ in split.stream(torch.arange(len(split)).split(size), generator)]


# decoding ------------------------------------------------------------------------------------------------------------
def test_unusual_images_are_decoded_rightly(tmp_path):
    for name in odd_images(tmp_path):
        image = read_image(tmp_path / name)
        want = 255 if "transparent" in name or "alpha" in name or "bilevel" in name else 128
        assert image.mode == "RGB" and image.size == ((1, 1) if "1x1" in name else (40, 30)), name
        assert np.abs(np.asarray(image).astype(int) - want).max() <= 2, name
        assert images.transform(View(32), True)(image).shape == (3, 32, 32), name
        assert images.transform(View(32), False)(image).shape == (3, 32, 32), name


def test_sixteen_bits_keep_their_grey_levels(tmp_path):
    from PIL import Image

    Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)).save(tmp_path / "ramp.png")
    pixels = np.asarray(read_image(tmp_path / "ramp.png"))
    assert np.array_equal(pixels[..., 0].reshape(-1), np.arange(256))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("missing.jpg", None, "no such file"),
        ("empty.jpg", lambda data: b"", "empty (0 bytes)"),
        ("truncated.jpg", lambda data: data[: len(data) // 2], "truncated"),
        ("truncated.png", lambda data: data[:60], "truncated"),
        ("header.jpg", lambda data: data[:4], "cannot identify"),
        ("text.jpg", lambda data: b"<html>404</html>", "cannot identify"),
    ],
)
def test_damaged_images_are_named(tmp_path, name, damage, message):
    save_jpeg(tmp_path / "good.jpg", drawing(0, 0))
    if name.endswith("png"):
        read_image(tmp_path / "good.jpg").save(tmp_path / "good.png")
    if damage is not None:
        (tmp_path / name).write_bytes(damage((tmp_path / f"good.{name[-3:]}").read_bytes()))
    with pytest.raises(DataError, match=f"^[^\n]*{name} cannot be read: [^\n]*{re.escape(message)}[^\n]*$"):
        read_image(tmp_path / name)


def test_floating_point_pixels_are_refused(tmp_path):
    from PIL import Image

    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="x.tif cannot be read: pixels are floating point"):
        read_image(tmp_path / "x.tif")


def test_image_suffixes_are_torchvisions():
    images.prepare_torchvision()
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(IMAGE_SUFFIXES) == set(IMG_EXTENSIONS)


# transforms ----------------------------------------------------------------------------------------------------------
def test_transforms_are_those_of_the_published_protocol():
    images.prepare_torchvision()
    from torchvision import transforms

    photo = read_image_of_size(300, 200)
    test = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    assert torch.equal(images.transform(View(), False)(photo), test(photo))
    cifar = read_image_of_size(32, 32)
    plain = transforms.Compose([transforms.Resize(224), transforms.PILToTensor()])
    assert torch.equal(images.transform(View(224, margin=1), False)(cifar), plain(cifar))
    train = transforms.Compose(
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )
    for seed in range(4):
        torch.manual_seed(seed)
        want = train(photo)
        torch.manual_seed(seed)
        assert torch.equal(images.transform(View(), True)(photo), want)


def read_image_of_size(width: int, height: int):
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# streams -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [None, 3])
def test_workers_change_nothing_and_last_for_many_passes(tmp_path, seed):
    split, parallel = make_split(tmp_path), make_split(tmp_path, workers=2)
    want = batches_of(split, seed)
    assert [tuple(batch.shape) for batch in want] == [(5, 3, 32, 32), (5, 3, 32, 32), (2, 3, 32, 32)]
    assert want[0].dtype == torch.uint8
    pids = set()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(want, batches_of(parallel, seed), strict=True))
        pids.add(tuple(worker.pid for worker in parallel._loader._iterator._workers))
    assert len(pids) == 1


@pytest.mark.cuda
def test_a_gpu_can_fetch_batches_by_itself(tmp_path):
    torch.cuda.init()
    assert all(batch.is_pinned() for batch in batches_of(make_split(tmp_path, workers=1)))


def test_images_do_not_depend_on_the_batches_around_them(tmp_path):
    split = make_split(tmp_path)
    assert torch.equal(torch.cat(batches_of(split, 3, size=12)), torch.cat(batches_of(split, 3, size=12)))
    assert not torch.equal(torch.cat(batches_of(split, 3)), torch.cat(batches_of(split, 4)))


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_leave_the_global_random_state_alone(tmp_path, workers):
    split = make_split(tmp_path, workers=workers)
    state = torch.get_rng_state()
    batches_of(split, 3)
    batches_of(split)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_while_training_is_one_line(tmp_path, workers):
    split = make_split(tmp_path, workers=workers)
    (tmp_path / "7.jpg").unlink()
    with pytest.raises(DataError, match=r"^[^\n]*7\.jpg cannot be read: no such file$"):
        batches_of(split)
    save_jpeg(tmp_path / "7.jpg", drawing(7, 7))
    assert len(torch.cat(batches_of(split))) == 12  # the workers live on


def test_a_pass_that_was_left_early_does_not_leak_into_the_next(tmp_path):
    split = make_split(tmp_path, workers=1)
    left = split.stream(torch.arange(12).split(1))
    next(left)
    assert torch.equal(torch.cat(batches_of(split)), torch.cat(batches_of(make_split(tmp_path))))
    with pytest.raises(RuntimeError, match="another pass"):
        list(left)


class Fatal(Files):
    """The operating system kills whoever opens an image of this source."""

    def open(self, key):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(tmp_path):
    split = ImageSplit(Fatal(tmp_path), ["a"], torch.zeros(1), ["a"], View(8), workers=1)
    with pytest.raises(DataError, match=r"^a worker process ended: [^\n]*; fewer --workers need less memory$"):
        list(split.stream([torch.tensor([0])]))


def test_take_at_and_items(tmp_path):
    split = make_split(tmp_path)
    taken = split.take(torch.tensor([4, 2])).at(16)
    assert taken.samples == ("4.jpg", "2.jpg") and taken.labels.tolist() == [1, 2]
    image, label = taken[1]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and int(label) == 2
    assert torch.equal(image, batches_of(split.at(16))[0][2])


@pytest.mark.parametrize("seed", [None, 3])
def test_images_in_memory_are_the_same_images(tmp_path, seed):
    split = make_split(tmp_path, count=70, size=16)
    decoded = split.decoded()
    (tmp_path / "0.jpg").unlink()
    assert isinstance(decoded.source, Arrays) and decoded.samples == split.samples
    with pytest.raises(DataError):
        batches_of(split)
    save_jpeg(tmp_path / "0.jpg", drawing(0, 0))
    assert torch.equal(torch.cat(batches_of(split, seed)), torch.cat(batches_of(decoded, seed)))


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images.os, "sysconf", lambda name: 64)
    with pytest.raises(ArgumentError, match="--cache-images needs about"):
        make_split(tmp_path).decoded()


def test_uneven_parts_are_refused(tmp_path):
    with pytest.raises(DataError, match="2 labels and 1 names"):
        ImageSplit(Files(tmp_path), ["a"], torch.zeros(2), ["a"])


def test_workers_follow_the_device():
    assert 1 <= images.default_workers("cpu") <= images.default_workers("cuda:0") <= images.MOST_WORKERS
