"""``cars``: Stanford Cars, 196 classes, in class folders with the official division, as it circulates.

The official lists are MATLAB files. By default the 196 classes make six tasks of 20 and four of 19.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from janus_ext.data.benchmark import Benchmark
from janus_ext.data.files import build
from janus_ext.data.layout import find_parts
from janus_ext.data.listing import Listing
from janus_ext.data.published import Published
from janus_ext.errors import DataError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

OFFICIAL = {"train": 8_144, "test": 8_041}
PAGE = "https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.StanfordCars.html"
LAYOUT = """\
<data-dir>/train/<class>/*.jpg     196 folders like Acura Integra Type R 2001
<data-dir>/test/<class>/*.jpg      the same 196 folders
"""
CARS = Published("cars", 196, LAYOUT, PAGE, f"{PAGE} says where the data set can be had.")


def load(config: TrainConfig) -> Benchmark:
    """The images of train/ and test/; class ids follow the sorted names of the class folders."""
    return build(read(config), config)


def read(config: TrainConfig) -> Listing:
    """Lists both sides; DataError if they are not there, or not as wanted."""
    root = CARS.root(config)
    parts = find_parts(root)
    if parts is None:
        raise DataError(f"--data-dir: {root} has no train/ and test/; wanted:\n\n{LAYOUT.rstrip()}")
    return CARS.sides(root, parts, OFFICIAL)
