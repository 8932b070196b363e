"""``emoji``, the embedded benchmark: 200 concepts drawn in eight art styles, six for training and two for test.

The images lie in ``assets/emoji.zip`` (``<style>/<code>.png``, 64 x 64 RGB), classes and split in ``emoji.json``.
Class ids follow the sorted code points, which puts like concepts side by side; the default class order is therefore a
fixed permutation (seed 200), so that every task mixes categories.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ext.data.benchmark import Benchmark, MemorySplit
from janus_ext.data.tasks import make_tasks
from janus_ext.errors import DataError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

ASSETS = Path(__file__).resolve().parents[1] / "assets"
DEFAULT_TASKS = 10
ORDER_SEED = 200
IMAGE_SIZE = 64


@dataclass(frozen=True)
class RandomAffine:
    """Random zoom, aspect, shift and colour per image, vectorised over the batch; the ground around a drawing is white.

    No flip and no rotation: hands, arrows and clocks change their meaning under them.
    """

    zoom: tuple[float, float] = (0.8, 1.15)
    aspect: float = 0.1
    shift: float = 0.12
    brightness: float = 0.15
    contrast: float = 0.2

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augments uint8 [b, 3, H, W]; every random number comes from ``generator`` (CPU)."""
        noise = torch.rand(6, len(images), generator=generator) * 2 - 1
        ink = 255.0 - images.float()  # grid_sample pads with zeros, and zero ink is white
        ink = F.grid_sample(ink, self._grid(noise[:4], images.shape), padding_mode="zeros", align_corners=False)
        gain = 1 + self.contrast * noise[4].view(-1, 1, 1, 1)
        offset = 255 * self.brightness * noise[5].view(-1, 1, 1, 1)
        drawn = (ink > 8).float()  # brightness changes the drawing, not the ground
        return (255.0 - ink * gain + offset * drawn).clamp_(0, 255).round_().to(torch.uint8)

    def _grid(self, noise: Tensor, shape: torch.Size) -> Tensor:
        """Sampling grid [b, H, W, 2] from noise [4, b] in (-1, 1): zoom, aspect, and two shifts."""
        low, high = self.zoom
        zoom = (low + high) / 2 + (high - low) / 2 * noise[0]
        stretch = 1 + self.aspect * noise[1]
        theta = torch.zeros(shape[0], 2, 3)
        theta[:, 0, 0] = stretch / zoom
        theta[:, 1, 1] = 1 / (stretch * zoom)
        theta[:, :, 2] = 2 * self.shift * noise[2:4].T
        return F.affine_grid(theta, list(shape), align_corners=False)


def load(config: TrainConfig, assets: Path = ASSETS) -> Benchmark:
    """The benchmark with the class order, number of tasks and size that ``config`` asks for."""
    table = read_table(assets / "emoji.json")
    concepts = sorted(table["concepts"], key=lambda concept: concept["code"])
    images = read_images(assets / "emoji.zip")
    parts = {
        part: [(label, style) for label, c in enumerate(concepts) for style in table["styles"] if _is(part, c, style)]
        for part in ("train", "test")
    }
    names = tuple(concept["name"] for concept in concepts)
    benchmark = Benchmark(
        name="emoji",
        class_names=names,
        train=_build_split(parts["train"], concepts, images, RandomAffine()),
        test=_build_split(parts["test"], concepts, images, None),
        tasks=make_tasks(config, names, DEFAULT_TASKS, ORDER_SEED),
        family=partial(_origin, {style: family[0] for family in table["families"] for style in family}),
    )
    return benchmark.as_asked(config)


def read_table(path: Path) -> dict:
    """Styles and concepts of ``emoji.json``."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the embedded emoji table {path} cannot be read: {error}") from error
    if not {"styles", "families", "concepts"} <= table.keys():
        raise DataError(f"{path} lacks 'styles', 'families' or 'concepts'")
    return table


def read_images(path: Path) -> dict[str, Tensor]:
    """Every image of the archive, ``<style>/<code>`` -> uint8 [3, 64, 64]."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    images = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".png"):
                    pixels = np.array(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
                    images[name.removesuffix(".png")] = torch.from_numpy(pixels).permute(2, 0, 1)
    except (OSError, zipfile.BadZipFile, UnidentifiedImageError) as error:
        raise DataError(f"the embedded emoji images {path} cannot be read: {error}") from error
    return images


def _is(part: str, concept: dict, style: str) -> bool:
    """True if the drawing of ``concept`` in ``style`` belongs to ``part`` ("train" or "test")."""
    return (style in concept["test_styles"]) == (part == "test")


def _origin(families: dict[str, str], sample: str) -> str:
    """The same for drawings of a concept in styles of one family, which show the same shapes."""
    style, code = sample.split("/")
    return f"{families.get(style, style)}/{code}"


def _build_split(
    members: list[tuple[int, str]], concepts: list[dict], images: dict[str, Tensor], augmentation: RandomAffine | None
) -> MemorySplit:
    """Gathers the (label, style) pairs into one tensor; names the first drawing that is missing or of a wrong size."""
    names = [f"{style}/{concepts[label]['code']}" for label, style in members]
    for name in names:
        if name not in images:
            raise DataError(f"the embedded emoji archive lacks {name}.png")
        if images[name].shape != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise DataError(f"{name}.png must be {IMAGE_SIZE} x {IMAGE_SIZE}, got {tuple(images[name].shape[1:])}")
    stacked = torch.stack([images[name] for name in names]).contiguous()
    return MemorySplit(stacked, torch.tensor([label for label, _ in members]), names, augmentation)
