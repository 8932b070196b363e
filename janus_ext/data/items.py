"""Images as a caller holds them: files, PIL images and tensors, in a list or behind the [i] of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from janus_ext.arguments import shown
from janus_ext.data.images import CHUNK, LOOKAHEAD, read_image, seeded, to_rgb, turned_upright
from janus_ext.data.workers import Workers
from janus_ext.errors import ArgumentError, DataError, JanusError

if TYPE_CHECKING:
    from PIL.Image import Image

WANTED = "an image is a path, a PIL image, or a uint8 tensor [3, H, W] or [1, H, W]"
PATHS = (str, os.PathLike)
MOST_NAMED = 3  # culprits in a message
Label = int | str


def to_image(value: Any) -> Image:
    """The RGB image of a path, a PIL image (any mode) or a uint8 tensor [3, H, W] or [1, H, W], grey.

    Images are turned as a camera noted (EXIF), in whatever form they come; 16 bits a channel become 8, transparency is
    laid on white.

    Raises:
        ArgumentError: it is anything else; what to pass instead is said.
        DataError: a file cannot be read.
        ValueError: pixels that have no range, or whatever Pillow meets in a damaged image.
    """
    from PIL import Image

    if isinstance(value, Image.Image):
        return to_rgb(turned_upright(value))
    if isinstance(value, PATHS):
        return read_image(os.fspath(value), upright=True)
    if isinstance(value, Tensor):
        return _from_tensor(value)
    if hasattr(value, "__array_interface__"):
        raise ArgumentError(f"{WANTED}, got a numpy array: PIL.Image.fromarray makes an image of uint8 [H, W, 3]")
    raise ArgumentError(f"{WANTED}, got {shown(value)}")


def _from_tensor(pixels: Tensor) -> Image:
    from PIL import Image

    found = f"a {str(pixels.dtype).removeprefix('torch.')} tensor {list(pixels.shape)}"
    if pixels.dtype != torch.uint8:
        raise ArgumentError(
            f"{WANTED}, got {found}: colours are whole numbers from 0 to 255 (torchvision's PILToTensor leaves them)"
        )
    if pixels.is_meta or pixels.layout != torch.strided:
        raise ArgumentError(f"{WANTED}, got a tensor without pixels: on meta, or sparse")
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or not pixels.numel():
        raise ArgumentError(f"{WANTED}, got {found}")
    most = 2 * (Image.MAX_IMAGE_PIXELS or pixels.numel())  # as Pillow has it for files
    if pixels[0].numel() > most:
        raise ArgumentError(f"an image must have at most {most:,} pixels, got {found}")
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy())


def to_label(value: Any) -> Label:
    """A label as an int or a str; ArgumentError unless it is an integer (a tensor's, too) or a class name."""
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    found = f"the number {value!r}" if isinstance(value, float) else shown(value)  # 1.0 is no 1
    raise ArgumentError(f"a label is a class name or an integer, got {found}")


def is_pair(item: Any) -> bool:
    """True for an (image, label)."""
    return isinstance(item, (tuple, list)) and len(item) == 2


def name_of(index: int) -> str:
    """What an image without a file name is called."""
    return f"images[{index}]"


@dataclass(frozen=True)
class Items:
    """A source over a list or a map-style data set of images or (image, label); keys are positions."""

    items: Sequence[Any]

    def open(self, key: int) -> Image:
        """The RGB image at a position; DataError names the position, whatever is raised there."""
        with naming(key):
            item = self.items[key]
            return to_image(item[0] if is_pair(item) else item)


@contextmanager
def naming(index: int) -> Iterator[None]:
    """Says of which item an error is."""
    try:
        yield
    except Exception as error:  # a data set of somebody's raises what it likes
        text = " ".join(str(error).split())
        reason = text if isinstance(error, JanusError) else f"{type(error).__name__}: {text}"
        raise DataError(f"{name_of(index)}: {reason}") from error


# one look at each ----------------------------------------------------------------------------------------------------
class Look(Dataset):
    """What a worker does with positions: of each its label (None if there is none to read) and a complaint or ""."""

    def __init__(self, items: Sequence[Any], labelled: bool) -> None:
        self.items = items
        self.labelled = labelled

    def __getitem__(self, indices: Sequence[int]) -> list[tuple[Label | None, str]]:
        return [self.look(index) for index in indices]

    def look(self, index: int) -> tuple[Label | None, str]:
        """The label and "", or None and a complaint."""
        try:
            with seeded(0), naming(index):
                return self.read(self.items[index]), ""
        except DataError as error:
            return None, str(error)

    def read(self, item: Any) -> Label | None:
        """The item's label; raises what is wrong with it."""
        if self.labelled and not is_pair(item):
            raise ArgumentError(f"wanted (image, label), got {shown(item)}")
        to_image(item[0] if is_pair(item) else item)
        return to_label(item[1]) if self.labelled else None


def look_at(items: Sequence[Any], labelled: bool, workers: int = 0) -> list[Label | None]:
    """Decodes every item once, in ``workers`` processes (0: in this one), and returns the labels (None: not labelled).

    DataError names the first items that are no image or have no label.
    """
    rows = range(len(items))
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    look = Look(items, labelled)
    answers = Workers(look, workers).read(chunks, LOOKAHEAD // CHUNK, 1) if workers else map(look.__getitem__, chunks)
    labels: list[Label | None] = []
    complaints: list[str] = []
    with tqdm(total=len(rows), desc="checking images", unit="image", disable=None) as bar:
        for answer in answers:
            bar.update(len(answer))
            labels += [label for label, _ in answer]
            complaints += [complaint for _, complaint in answer if complaint]
            if complaints:
                raise DataError("; ".join(complaints[:MOST_NAMED]))
    return labels
