"""``imagenet-r``: 200 classes of renditions, in one of the three splits that circulate under that name.

| --split | where it comes from | class ids |
|---|---|---|
| inflora | a random fifth of the whole folder is for the test (SPLIT_SEED), no file is moved | sorted wnid |
| coda | two yaml files, as CODA-Prompt distributes them (--split-files) | those of the files |
| folders | train/ and test/, as distributed with PILOT or left behind by InfLoRA's code | sorted wnid |

Results on different splits cannot be compared; the split's SHA-256 is in every result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from janus_ext.data.benchmark import Benchmark
from janus_ext.data.files import build
from janus_ext.data.layout import find_parts
from janus_ext.data.listing import Listing, subfolders
from janus_ext.data.lists import Register, read_yaml
from janus_ext.data.published import Published
from janus_ext.errors import DataError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

CLASSES = 200
OFFICIAL = {"train": 24_000, "test": 6_000}
SPLIT_SEED = 0  # InfLoRA draws from the seed of whichever run comes first and then moves the files
YAML_FILES = ("imagenet-r_train.yaml", "imagenet-r_test.yaml")
PAGE = "https://github.com/hendrycks/imagenet-r"
ADVICE = f"The archive imagenet-r.tar is linked from {PAGE}."
LAYOUTS = {
    "inflora": "<data-dir>/<wnid>/*.jpg     200 folders, as in imagenet-r.tar\n",
    "coda": "<data-dir>/<wnid>/*.jpg     200 folders, as in imagenet-r.tar\n"
    f"<data-dir>/{YAML_FILES[0]}   and {YAML_FILES[1]}, or elsewhere with --split-files\n",
    "folders": "<data-dir>/train/<wnid>/*.jpg     200 folders\n"
    "<data-dir>/test/<wnid>/*.jpg      the same 200 folders\n",
}


def load(config: TrainConfig) -> Benchmark:
    """The images of --data-dir in the split of --split."""
    return build(read(config), config)


def read(config: TrainConfig) -> Listing:
    """Lists the split; DataError if the tree or a yaml file is not as wanted."""
    split = "inflora" if config.split == "auto" else config.split
    data_set = Published("imagenet-r", CLASSES, LAYOUTS[split], PAGE, ADVICE)
    root = data_set.root(config)
    parts = find_parts(root)
    if bool(parts) != (split == "folders"):
        other = "--split folders is for them" if parts else "--split inflora is for what there is"
        has = f"{parts[0]}/ and {parts[1]}/" if parts else "no train/ and test/"
        raise DataError(f"--data-dir: {root} has {has}; {other}; wanted:\n\n{LAYOUTS[split]}")
    if parts:
        return data_set.sides(root, parts, OFFICIAL)
    if split == "coda":
        return _read_coda(data_set, root, config.split_files or tuple(root / name for name in YAML_FILES))
    return _read_inflora(data_set, root)


def _read_inflora(data_set: Published, root: Path) -> Listing:
    """torch's random_split of the files in the order of torchvision's ImageFolder, kept as indices."""
    classes, (samples, problems, unread) = data_set.tree(root)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    size = int(0.8 * len(samples))
    train, test = ([samples[i] for i in part] for part in (order[:size], order[size:]))
    return data_set.listing(root, classes, (train, test), classes, OFFICIAL, problems, unread)


def _read_coda(data_set: Published, root: Path, files: Sequence[Path]) -> Listing:
    """Class ids are those of the files; of their paths only <wnid>/<file> counts, the rest is of other machines."""
    register = Register(CLASSES, steps=2)
    train, test = ([sample for entry in read_yaml(file) if (sample := register.add(*entry))] for file in files)
    classes = register.class_names(f"--split-files: {files[0].name} and {files[1].name}")
    return data_set.listing(root, classes, (train, test), subfolders(root), OFFICIAL, register.problems)
