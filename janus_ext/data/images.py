"""Splits of images in files: decoded with Pillow and brought to size by torchvision's transforms in worker processes.

A batch leaves the workers as one uint8 tensor, a quarter of the traffic of float32; the model normalises it on its
device. Every image of every epoch has a random seed of its own, so results do not depend on the number of workers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from janus_ext.arguments import check_integer
from janus_ext.backbone import prepare_torchvision
from janus_ext.data.benchmark import Part, Split, whole
from janus_ext.data.names import FORMATS
from janus_ext.data.workers import Workers, sendable
from janus_ext.devices import available_cores
from janus_ext.errors import ArgumentError, DataError, on_one_line
from janus_ext.processes import on_this_machine

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I")
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
CROP_MODES = ("center", "squash")
ORIENTATION = 0x0112  # the tag of EXIF
MOST_WORKERS = 16  # each reads more than 250 photographs a second: together more than a large GPU takes
CHUNK = 16  # images a worker reads at a time: all workers begin on the first batch, which then comes sooner
LOOKAHEAD = 256  # images read ahead (at least two batches) if there is room for them: 37 MiB at 224 pixels


# decoding ------------------------------------------------------------------------------------------------------------
def read_image(path: str | Path, upright: bool = False) -> Image:
    """The image file at ``path`` in RGB; DataError with the path if it is missing, empty, truncated or no image.

    ``upright`` applies the orientation that a camera noted in EXIF. The published protocols do not, so it is for
    images of one's own. Of an animation the first picture is taken.
    """
    from PIL import Image

    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, "it is no file")  # a pipe would be waited for
        with Image.open(path, formats=FORMATS) as image:
            return to_rgb(turned_upright(image) if upright else image)
    except Exception as error:  # Pillow's decoders raise what they meet: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{on_one_line(str(path))} cannot be read: {_reason(path, error)}") from error


def turned_upright(image: Image) -> Image:
    """``image`` as the camera was held, where it noted that; damage in the rest of what it noted does not matter."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    image.load()  # Pillow turns a TIFF by itself, and then takes the note away
    try:
        turn = turns.get(image.getexif().get(ORIENTATION))
    except Exception:  # Pillow's reader of EXIF raises what it meets; such an image was not noted to be turned
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image) -> Image:
    """``image`` in RGB: 16 bits a channel scaled to 8, transparency laid on white; ValueError for float pixels."""
    from PIL import Image

    if image.mode in SIXTEEN_BITS:
        return _from_sixteen_bits(image)
    if image.mode == "F":
        raise ValueError("pixels are floating point numbers, their range is unknown")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        drawing = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")
    return image.convert("RGB")


def _from_sixteen_bits(image: Image) -> Image:
    """Pillow's own conversion of 16-bit grey would clip everything above 255 to white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values lie in {values.min()}..{values.max()}, not in 16 bits")
    if image.mode == "I" and 0 < values.max() < 256:  # 32 bits a pixel, of which nothing says what white is
        raise ValueError(f"grey values of 32 bits lie in {values.min()}..{values.max()}: are they of 8 bits or of 16?")
    return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if os.path.isfile(path) and os.path.getsize(path) == 0:  # what no path can be has no size
        return "the file is empty (0 bytes)"
    return " ".join(str(error).split()) or type(error).__name__


# the square a model takes --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class View:
    """How images become ``size`` x ``size``: for training a random resized crop and a flip, else resize and crop.

    For evaluation the shorter side becomes ``margin`` times ``size`` (`side`) and the middle is taken: 256 and 224 in
    the published protocol, no margin for CIFAR. With ``crop_mode`` "squash" both sides do, whatever the image's shape.
    ``interpolation`` is of that resizing. Sizes, modes and names are timm's.
    """

    size: int = 224
    margin: float = 256 / 224
    interpolation: str = "bilinear"
    crop_mode: str = "center"

    @property
    def side(self) -> int:
        """To which an image is resized, in pixels: rounded down, but not below an integer by the last bit alone."""
        return max(1, math.floor(self.size * self.margin + 1e-4))

    @property
    def crop_pct(self) -> float:
        """1 / margin, so that timm's floor(size / crop_pct) is `side`."""
        share = 1 / self.margin
        return share if math.floor(self.size / share) == self.side else math.nextafter(share, 0)


@lru_cache(maxsize=8)
def transform(view: View, training: bool) -> Callable[[Image], Tensor]:
    """torchvision's transform of an RGB image to uint8 [3, size, size]; random numbers are torch's global ones."""
    prepare_torchvision()
    from torchvision import transforms

    if training:
        steps: list[Any] = [transforms.RandomResizedCrop(view.size), transforms.RandomHorizontalFlip()]
    else:
        side = (view.side, view.side) if view.crop_mode == "squash" else view.side
        resize = transforms.Resize(side, transforms.InterpolationMode(view.interpolation))
        steps = [resize, transforms.CenterCrop(view.size)]
    return transforms.Compose([*steps, transforms.PILToTensor()])


# where images come from ----------------------------------------------------------------------------------------------
class Source(Protocol):
    """Gives the RGB image of a key."""

    def open(self, key: Any) -> Image: ...


@dataclass(frozen=True)
class Files:
    """Image files below ``root``; keys are paths relative to it. ``upright`` as in :func:`read_image`."""

    root: Path
    upright: bool = False

    def open(self, key: str) -> Image:
        """Reads and decodes; DataError with the path."""
        return read_image(self.root / key, self.upright)


@dataclass(frozen=True)
class Arrays:
    """Decoded images, uint8 [H, W, 3] each, any sizes; keys are positions. Worker processes share their memory."""

    pixels: Sequence[np.ndarray]

    def open(self, key: int) -> Image:
        """Wraps the pixels without a copy."""
        from PIL import Image

        return Image.fromarray(self.pixels[key])


# batches -------------------------------------------------------------------------------------------------------------
Request = list[tuple[Any, int | None]]
"""Images as a worker is asked for them: of each the key, and the seed of its augmentation or None."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it torch's global random state on the CPU begins at ``seed``; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class Reader(Dataset):
    """What a worker does with a request: uint8 [b, 3, size, size], tensor or array, or in words what stopped it."""

    def __init__(self, source: Source, view: View) -> None:
        self.source = source
        self.view = view

    def __getitem__(self, request: Request) -> Tensor | np.ndarray | str:
        try:
            return sendable(torch.stack([self.read(key, seed) for key, seed in request]))
        except DataError as error:
            return str(error)  # raised in a worker, its one line would arrive as a page of tracebacks

    def read(self, key: Any, seed: int | None) -> Tensor:
        """uint8 [3, size, size]; augmented if there is a seed. torch's global random state is left as it was.

        A source that draws from it (a data set of somebody's with random transforms) gives the same image for a seed.
        """
        with seeded(seed or 0):
            return transform(self.view, seed is not None)(self.source.open(key))


class ImageSplit(Split):
    """A split whose images are decoded when they are asked for, by ``workers`` processes (0: by this one).

    ``keys`` are the source's names of the images, ``samples`` the names in the fingerprint. The processes start with
    the first pass and live as long as the split. One pass at a time: a new one ends the one before.
    """

    def __init__(
        self,
        source: Source,
        keys: Sequence[Any],
        labels: Tensor,
        samples: Sequence[str],
        view: View | None = None,
        workers: int = 0,
    ) -> None:
        if not len(keys) == len(labels) == len(samples):
            raise DataError(f"a split of {len(keys)} images has {len(labels)} labels and {len(samples)} names")
        self.source = source
        self.keys = keys
        self.labels = labels.to(torch.int64)
        self.samples = tuple(samples)
        self.view = view or View()
        self.margin = self.view.margin
        self.workers = workers
        self._reader = Reader(source, self.view)
        self._workers = Workers(self._reader, workers)

    @property
    def crop_mode(self) -> str:
        return self.view.crop_mode

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._reader.read(self.keys[index], None), self.labels[index]

    def stream(
        self, batches: Iterable[Tensor], generator: torch.Generator | None = None, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return self.parts(batches, generator, skip, whole)

    def parts(
        self, batches: Iterable[Tensor], generator: torch.Generator | None, skip: int, part: Part
    ) -> Iterator[tuple[Tensor, Tensor]]:
        batches = list(batches)
        requests = [self._request(indices, generator, part) for indices in batches][skip:]
        chunks = self._read(
            [request[i : i + CHUNK] for request in requests for i in range(0, len(request), CHUNK)],
            ahead=-(-max(LOOKAHEAD, 2 * max(map(len, requests), default=0)) // CHUNK),
        )
        for indices, request in zip(batches[skip:], requests, strict=True):
            yield self._gather(chunks, len(request)), self.labels[part(indices)]

    def take(self, indices: Tensor) -> ImageSplit:
        rows = indices.tolist()
        keys, samples = ([values[i] for i in rows] for values in (self.keys, self.samples))
        return ImageSplit(self.source, keys, self.labels[indices], samples, self.view, self.workers)

    def at(self, size: int) -> ImageSplit:
        view = replace(self.view, size=size)
        return ImageSplit(self.source, self.keys, self.labels, self.samples, view, self.workers)

    def decoded(self) -> ImageSplit:
        """The same split with every image decoded into memory now; ArgumentError if they would not fit."""
        import numpy as np

        def pixels(key: Any) -> np.ndarray:
            return np.asarray(self.source.open(key))

        first = [pixels(key) for key in self.keys[:64]]
        _require_memory(sum(array.nbytes for array in first) / max(1, len(first)) * len(self.keys))
        with ThreadPoolExecutor(max(1, self.workers)) as pool:  # Pillow decodes outside Python's global lock
            rest = pool.map(pixels, self.keys[64:])
            bar = tqdm(rest, "decoding", len(self.keys), initial=len(first), unit="image", leave=False, disable=None)
            arrays = [*first, *bar]
        return ImageSplit(Arrays(arrays), range(len(arrays)), self.labels, self.samples, self.view, self.workers)

    def _request(self, indices: Tensor, generator: torch.Generator | None, part: Part) -> Request:
        keys = [self.keys[i] for i in part(indices).tolist()]
        if generator is None:
            return [(key, None) for key in keys]
        seeds = part(torch.randint(2**62, (len(indices),), generator=generator)).tolist()
        return list(zip(keys, seeds, strict=True))

    def _gather(self, chunks: Iterator[Tensor | np.ndarray | str], count: int) -> Tensor:
        """One batch, in memory that a GPU can fetch from by itself; DataError if a chunk is a complaint.

        Each chunk is copied as it comes, which frees its place in the workers' memory.
        """
        shape = (count, 3, self.view.size, self.view.size)
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized())
        for start in range(0, count, CHUNK):
            chunk = next(chunks)
            if isinstance(chunk, str):
                raise DataError(chunk)
            batch[start : start + CHUNK] = torch.as_tensor(chunk)
        return batch

    def _read(self, requests: Sequence[Request], ahead: int) -> Iterator[Tensor | np.ndarray | str]:
        """What the reader makes of ``requests``, in order; RuntimeError if a later pass has the workers by then."""
        if not self.workers:
            return (self._reader[request] for request in requests)
        for training in (False, True):
            transform(self.view, training)  # imports torchvision here, once, and not in every forked worker
        return self._workers.read(requests, ahead, CHUNK * 3 * self.view.size**2)


def checked_workers(asked: Any) -> int:
    """``asked`` if it is a number of processes."""
    check_integer("asked", asked, lambda n: 0 <= n <= 1024, "from 0 to 1024")
    return asked


def default_workers(device: str) -> int:
    """Processes that decode: one a core for a GPU, at most MOST_WORKERS; half the cores where the CPU trains, too.

    Where several processes train on a machine they share its cores.
    """
    cores = max(1, available_cores() // on_this_machine()[1])
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return min(MOST_WORKERS, cores) if on_gpu else max(1, cores // 2)


def _require_memory(size: float) -> None:
    """ArgumentError if ``size`` bytes, in each process that trains here, are more than half of the machine's memory."""
    size *= on_this_machine()[1]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory / 2:
        raise ArgumentError(
            f"--cache-images needs about {size / 2**30:.1f} GiB, this machine has {memory / 2**30:.1f}; "
            "without it workers decode while the device trains"
        )
