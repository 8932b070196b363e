"""``cub``: CUB-200-2011, 200 species of birds, with its official lists or in train/ and test/.

| --data-dir holds | division |
|---|---|
| images.txt, image_class_labels.txt, train_test_split.txt, images/ | the official one: 5,994 and 5,794 images |
| train/ and test/ | that of the folders; LAMDA-PILOT circulates one of 9,430 and 2,358 images |

Results on the two cannot be compared. classes.txt names the classes by their folders, so it is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from janus_ext.data.benchmark import Benchmark
from janus_ext.data.files import build
from janus_ext.data.layout import find_parts
from janus_ext.data.listing import Listing, Sample, subfolders
from janus_ext.data.lists import Register, class_id, read_lines
from janus_ext.data.published import Published

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

OFFICIAL = {"train": 5_994, "test": 5_794}
PILOT = {"train": 9_430, "test": 2_358}
LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
IMAGES = "images"
TRAINING, TEST = "1", "0"  # in the third list
PAGE = "https://www.vision.caltech.edu/datasets/cub_200_2011/"
LAYOUT = f"""\
<data-dir>/{IMAGES}/<class>/*.jpg     200 folders like 001.Black_footed_Albatross
<data-dir>/{LISTS[0]}   {LISTS[1]}   {LISTS[2]}, all as in CUB_200_2011.tgz

or

<data-dir>/train/<class>/*.jpg     200 folders
<data-dir>/test/<class>/*.jpg      the same 200 folders
"""
CUB = Published("cub", 200, LAYOUT, PAGE, f"The archive CUB_200_2011.tgz is linked from {PAGE}.")


def load(config: TrainConfig) -> Benchmark:
    """The images of --data-dir; class ids are those of the lists, from 0 on, or follow the folders' sorted names."""
    return build(read(config), config)


def read(config: TrainConfig) -> Listing:
    """Lists both sides; DataError if a list cannot be read or classes are missing, wrong lines are problems."""
    root = CUB.root(config)
    parts = find_parts(root)
    return CUB.sides(root, parts, OFFICIAL, PILOT) if parts else _read_lists(root)


def _read_lists(root: Path) -> Listing:
    """Every image has one id, under which each list says something of it."""
    register = Register(CUB.classes, steps=2, first=1)
    paths, labels, sides = (_read_list(register, root, file) for file in LISTS)
    splits: dict[str, list[Sample]] = {TEST: [], TRAINING: []}
    for number, path in paths.items():
        where, label, side = f"image id {number}", labels.get(number), sides.get(number)
        if side not in splits:
            register.refuse(where, f"{LISTS[2]} must say {TRAINING} (training) or {TEST} of it, got {side!r:.80}")
        elif sample := register.add(where, path, class_id(label) if label else label):
            splits[side].append(sample)
    classes = register.class_names(f"--data-dir: the lists of {root}")
    images = root / IMAGES
    return CUB.listing(
        images, classes, (splits[TRAINING], splits[TEST]), subfolders(images), OFFICIAL, register.problems
    )


def _read_list(register: Register, root: Path, file: str) -> dict[str, str]:
    """What a list says of each image id; notes lines that are no <image id> <word>, or repeat an id."""
    said: dict[str, str] = {}
    lines = read_lines(root / file, "--data-dir: the list", f"; wanted:\n\n{LAYOUT.rstrip()}")
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if len(words) == 2 and words[0] not in said:
            said[words[0]] = words[1]
        elif words:
            register.refuse(f"{file}:{number}", f"wanted a new image id and a word, got {line.strip()[:80]!r}")
    return said
