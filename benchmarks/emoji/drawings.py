"""The pretraining images: how batches of them are drawn, and how a drawing is changed in form and colour."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = 0.75, 0.35  # of all channels: the images are mostly white


class Drawings:
    """The pretraining images and how batches are drawn from them.

    A batch has ``concepts`` concepts, each with ``drawings`` images of different styles where the concept has so many;
    of the skin-tone variants within one style one is drawn.
    """

    def __init__(self, path: Path) -> None:
        data = np.load(path)
        self.images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2).contiguous()
        self.count = len(data["codes"])
        cells: list[dict[int, list[int]]] = [{} for _ in range(self.count)]
        labels = zip(data["concept"].tolist(), data["style"].tolist(), strict=True)
        for row, (concept, style) in enumerate(labels):
            cells[concept].setdefault(style, []).append(row)
        self._cells = [list(styles.values()) for styles in cells]
        groups = [str(data["groups"][group]) for group in data["group"]]
        self._weight = torch.tensor([self._share(g, len(c)) for g, c in zip(groups, self._cells, strict=True)])

    @staticmethod
    def _share(group: str, styles: int) -> float:
        """Weight of a concept in sampling: flags and extra art count less, and so do concepts in few styles."""
        return (0.35 if group.startswith(("Flags", "extras")) else 1.0) * math.sqrt(styles / 8)

    def batch(self, concepts: int, drawings: int) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, 3, 64, 64] and concept labels int64 [B], B = concepts * drawings."""
        labels = torch.multinomial(self._weight, concepts)
        rows = [row for concept in labels.tolist() for row in self._draw(self._cells[concept], drawings)]
        return self.images[rows], labels.repeat_interleave(drawings)

    @staticmethod
    def _draw(styles: list[list[int]], count: int) -> list[int]:
        order = torch.randperm(len(styles)).tolist()
        variants = [styles[order[i % len(styles)]] for i in range(count)]
        return [rows[int(torch.randint(len(rows), ()))] for rows in variants]


def uniform(count: int, low: float, high: float) -> Tensor:
    """Random float32 [count] in [low, high)."""
    return torch.rand(count) * (high - low) + low


def pick(count: int, probability: float) -> Tensor:
    """Random mask bool [count]."""
    return torch.rand(count) < probability


def warp(x: Tensor) -> Tensor:
    """Random rotation, scale, aspect, shear, shift and mirror of x [B, 3, H, W] in [0, 1], white outside."""
    n = len(x)
    angle, scale, aspect = uniform(n, -0.35, 0.35), uniform(n, -0.3, 0.3).exp(), uniform(n, -0.2, 0.2).exp()
    cos, sin, mirror = angle.cos() * scale, angle.sin() * scale, 1 - 2 * pick(n, 0.25).float()
    top = torch.stack([mirror * cos * aspect, uniform(n, -0.2, 0.2) - sin, uniform(n, -0.2, 0.2)], 1)
    bottom = torch.stack([mirror * sin, cos / aspect, uniform(n, -0.2, 0.2)], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(x.shape), align_corners=False)
    return 1 - F.grid_sample(1 - x, grid, align_corners=False)


def line_art(x: Tensor) -> Tensor:
    """x [B, 3, H, W] as dark outlines on white (Sobel magnitude of the grey image)."""
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None])
    return (1 - 3 * gradient.norm(dim=1, keepdim=True)).clamp(0, 1).expand_as(x)


def mix_colours(x: Tensor) -> Tensor:
    """Random linear map of the channels of x [B, 3, H, W]: jitter, exchanged channels, part or all of the colour gone.

    Rows of the map sum to one, so that white stays white.
    """
    n = len(x)
    matrix = torch.eye(3) + 0.2 * torch.randn(n, 3, 3) * pick(n, 0.8)[:, None, None]
    permuted = matrix.gather(1, torch.rand(n, 3).argsort(1)[:, :, None].expand(-1, -1, 3))
    matrix = torch.where(pick(n, 0.3)[:, None, None], permuted, matrix)
    matrix = matrix / matrix.sum(2, keepdim=True).clamp_min(0.3)
    grey = (torch.rand(n) * pick(n, 0.25))[:, None, None]
    matrix = (1 - grey) * matrix + grey * torch.tensor([0.30, 0.59, 0.11])
    return torch.einsum("bij,bjhw->bihw", matrix, x)


def change_sharpness(x: Tensor) -> Tensor:
    """x [B, 3, H, W] blurred or sharpened by a random amount."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    weight = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight, groups=3)
    return torch.lerp(x, blurred, uniform(len(x), -1.0, 1.5)[:, None, None, None])


def erase(x: Tensor) -> Tensor:
    """A random rectangle of x [B, 3, H, W] filled with a random colour, in two images of five."""
    n, side = len(x), x.shape[-1]
    at = torch.arange(side) / side
    across, down = ((at - torch.rand(n, 1)).abs() < uniform(n, 0.08, 0.23)[:, None] for _ in range(2))
    mask = down[:, None, :, None] & across[:, None, None, :] & pick(n, 0.4)[:, None, None, None]
    return torch.where(mask, torch.rand(n, 3, 1, 1), x)


def normalise(x: Tensor) -> Tensor:
    """x in [0, 1] as the networks see it."""
    return (x - MEAN) / STD


def augment(images: Tensor) -> Tensor:
    """Images uint8 [B, 3, 64, 64] as normalised float32 of the same shape, changed per image in form and colour."""
    x = warp(images.float() / 255)
    n = len(x)
    outlined = pick(n, 0.1)
    x[outlined] = line_art(x[outlined])
    x = mix_colours(x).clamp(0, 1).add(1e-4).pow(uniform(n, -0.5, 0.5).exp()[:, None, None, None])
    x = torch.where(pick(n, 0.06)[:, None, None, None], 1 - x, x)
    soft = pick(n, 0.3)
    x[soft] = change_sharpness(x[soft])
    return normalise(erase(x))
