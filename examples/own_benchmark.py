"""A benchmark of one's own: six shapes, drawn here, in three tasks.

python examples/own_benchmark.py
"""

import torch

from janus_ext.data.benchmark import Benchmark, MemorySplit
from janus_ext.train import main

SHAPES = {  # where ink is, of coordinates about the middle of the shape
    "disc": lambda x, y: x**2 + y**2 < 1,
    "ring": lambda x, y: (x**2 + y**2 - 0.7).abs() < 0.3,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) < 0.9,
    "diamond": lambda x, y: x.abs() + y.abs() < 1,
    "plus": lambda x, y: (torch.minimum(x.abs(), y.abs()) < 0.25) & (torch.maximum(x.abs(), y.abs()) < 1),
    "bar": lambda x, y: (x.abs() < 1) & (y.abs() < 0.3),
}


def draw(per_class: int, seed: int) -> MemorySplit:
    """uint8 images [N, 3, 64, 64] with their class ids, and a name for each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(SHAPES)).repeat_interleave(per_class)
    size, right, down, *colour = torch.rand(6, len(labels), 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.linspace(-2, 2, 64), torch.linspace(-2, 2, 64), indexing="ij")
    x, y = ((grid + shift - 0.5) / (0.5 + size) for grid, shift in ((x, right), (y, down)))
    shapes = list(SHAPES.values())
    ink = torch.stack([shapes[label](x[i], y[i]) for i, label in enumerate(labels.tolist())])
    images = 255 - 200 * ink[:, None] * torch.stack(colour, dim=1)
    return MemorySplit(images.to(torch.uint8), labels, [f"{seed}/{i}" for i in range(len(labels))])


def shapes(config) -> Benchmark:
    """The benchmark; ``config`` has what was typed: --data-dir, --workers, ..."""
    return Benchmark("shapes", tuple(SHAPES), draw(32, seed=0), draw(16, seed=1), tasks=((0, 1), (2, 3), (4, 5)))


if __name__ == "__main__":  # the same as `janus_ext.train --benchmark own_benchmark:shapes ...` in this folder
    main("--benchmark own_benchmark:shapes --backbone emoji --epochs 2 --limit-per-class 16".split())
