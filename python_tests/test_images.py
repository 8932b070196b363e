"""Images in files: decoding, transforms, worker processes, memory."""

import gc
import os
import re
import resource
import signal
import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from trees import drawing, odd_images, save_jpeg

from janus_ext.data import images, workers
from janus_ext.data.images import Arrays, Files, ImageSplit, View, read_image
from janus_ext.data.names import IMAGE_SUFFIXES
from janus_ext.data.workers import Workers
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


def noted(orientation: int):
    """EXIF data with which a camera says how it was held."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


TURNED = {  # by orientation: what undoes it, of pixels [H, W, 3]
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}


@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_cameras_orientation_is_applied_only_if_asked_for(tmp_path, kind, orientation):
    stored = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    options = {"lossless": True} if kind == "webp" else {}
    Image = images_of_pillow()
    Image.fromarray(stored).save(tmp_path / f"x.{kind}", exif=noted(orientation), **options)
    assert np.array_equal(np.asarray(read_image(tmp_path / f"x.{kind}", upright=True)), TURNED[orientation](stored))
    if kind != "tif":  # Pillow itself turns those
        assert np.array_equal(np.asarray(read_image(tmp_path / f"x.{kind}")), stored)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_a_damaged_note_of_the_orientation_is_no_matter(tmp_path, exif):
    images_of_pillow().fromarray(drawing(0, 0)).save(tmp_path / "x.jpg", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.jpg", upright=True)), read_image(tmp_path / "x.jpg"))


def test_damage_beside_the_orientation_is_no_matter_either(tmp_path):
    """Pillow's own turning writes the whole block anew, and stops at a width that is text."""
    width, turned = struct.pack("<HHI4s", 0x0100, 2, 4, b"300"), struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + width + turned + bytes(4)
    images_of_pillow().fromarray(drawing(0, 0)).save(tmp_path / "x.jpg", exif=block)
    stored = np.asarray(read_image(tmp_path / "x.jpg"))
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.jpg", upright=True)), TURNED[6](stored))


def images_of_pillow():
    from PIL import Image

    return Image


@pytest.mark.parametrize("ending", ["gif", "webp", "apng", "avif"])
def test_of_an_animation_the_first_picture_is_taken(tmp_path, ending):
    if f".{ending}" not in IMAGE_SUFFIXES:
        pytest.skip("this build of Pillow has no AVIF")
    first, second = (images_of_pillow().new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    kind = "PNG" if ending == "apng" else ending.upper()
    first.save(tmp_path / f"x.{ending}", kind, save_all=True, append_images=[second])
    red, _, blue = np.asarray(read_image(tmp_path / f"x.{ending}")).reshape(-1, 3).mean(0)
    assert red > 240 and blue < 15


@pytest.mark.parametrize("suffix", sorted(set(IMAGE_SUFFIXES) - {".avif"}))
def test_every_accepted_ending_is_decoded(tmp_path, suffix):
    kind = {".apng": "PNG", ".jfif": "JPEG", ".jpe": "JPEG"}.get(suffix)
    images_of_pillow().new("L", (16, 16), 128).convert("1" if suffix == ".pbm" else "L").save(
        tmp_path / f"x{suffix}", kind
    )
    assert read_image(tmp_path / f"x{suffix}").mode == "RGB"


def test_floating_point_pixels_are_refused(tmp_path):
    from PIL import Image

    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="x.tif cannot be read: pixels are floating point"):
        read_image(tmp_path / "x.tif")


def test_image_suffixes_are_torchvisions_and_more():
    images.prepare_torchvision()
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(IMAGE_SUFFIXES) > set(IMG_EXTENSIONS)


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
        pids.add(tuple(worker.pid for worker in parallel._workers._loader._iterator._workers))
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
    with pytest.raises(DataError, match=r"^a worker process ended: [^\n]*; fewer --workers need less memory, 0 none$"):
        list(split.stream([torch.tensor([0])]))


def test_a_worker_that_is_killed_between_two_batches_is_one_line(tmp_path):
    """The loader raises that wherever the program is."""
    split = make_split(tmp_path, workers=1)
    stream = split.stream(torch.arange(12).split(1))
    with (
        pytest.raises(DataError, match=r"^a worker process ended: [^\n]*killed by signal"),
        workers.naming_lost_workers(),
    ):
        next(stream)
        os.kill(split._workers._loader._iterator._workers[0].pid, signal.SIGKILL)
        time.sleep(30)  # ended by the signal


class Asleep(Files):
    """A disk that does not answer."""

    def open(self, key):
        time.sleep(3600)


def test_no_wait_for_a_worker_is_endless(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 1)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # its patience when it says goodbye
    split = ImageSplit(Asleep(tmp_path), ["a"], torch.zeros(1), ["a"], View(8), workers=1)
    with pytest.raises(
        DataError, match="^no image came from the worker processes in 1 s: .* --workers 0 reads without"
    ):
        list(split.stream([torch.tensor([0])]))


def test_images_that_find_no_room_in_shared_memory_come_through_pipes(tmp_path):
    """A limit of the size of files holds there, too, and the workers inherit it."""
    want, split = batches_of(make_split(tmp_path)), make_split(tmp_path, workers=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        first = batches_of(split)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = batches_of(split)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(want, first, again, strict=True))


@pytest.mark.parametrize(
    ("free", "ahead"),
    [(64 << 20, 4), (14 << 20, 1), (8 << 20, 1), (1 << 40, 16)],  # a chunk has 6.75 MiB, one worker
)
def test_the_look_ahead_takes_half_of_the_free_shared_memory_at_most(tmp_path, monkeypatch, caplog, free, ahead):
    status = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
    monkeypatch.setattr(workers.os, "statvfs", lambda path: status)
    split = make_split(tmp_path, workers=1, size=384)
    batches_of(split)
    assert split._workers._loader.prefetch_factor == ahead
    assert ("8 MiB free, too little for --workers 1" in caplog.text) == (free == 8 << 20)


def test_a_system_that_does_not_tell_its_shared_memory_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "SHARED_MEMORY", str(tmp_path / "nowhere"))
    split = make_split(tmp_path, workers=1)
    assert len(batches_of(split)) == len(batches_of(make_split(tmp_path)))
    assert split._workers._loader.prefetch_factor == 16


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


class Frozen(Dataset):
    def __getitem__(self, request: int) -> int:
        return gc.get_freeze_count()


def test_workers_leave_the_garbage_of_their_parent_alone():
    """Loaders are among it, behind images that were refused: their end looks for processes of the parent."""
    assert min(Workers(Frozen(), 1).read([0, 1], 2, 8)) > 10_000
