"""``imagenet-a``: 200 classes of natural adversarial examples, as the archive unpacks or in train/ and test/.

The data set is a test set: it has no official division. LAMDA-PILOT circulates one as two folders, which is taken where
it is. Of the plain archive a fifth of every class is for the test, as of a folder of one's own: some classes have three
images, so a fifth of the whole could miss them. Results on the two cannot be compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from janus_ext.data.benchmark import Benchmark
from janus_ext.data.files import build
from janus_ext.data.folder import split_each_class
from janus_ext.data.layout import find_parts
from janus_ext.data.listing import Listing
from janus_ext.data.published import ALL, Published

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

OFFICIAL = {ALL: 7_500}
PILOT = {"train": 5_981, "test": 1_519}
PAGE = "https://github.com/hendrycks/natural-adv-examples"
LAYOUT = """\
<data-dir>/train/<wnid>/*.jpg     200 folders, the division of LAMDA-PILOT
<data-dir>/test/<wnid>/*.jpg      the same 200 folders

or, of which a fifth of the images of each class, by their names, is taken for the test:

<data-dir>/<wnid>/*.jpg           200 folders, as in imagenet-a.tar
"""
IMAGENET_A = Published("imagenet-a", 200, LAYOUT, PAGE, f"The archive imagenet-a.tar is linked from {PAGE}.")


def load(config: TrainConfig) -> Benchmark:
    """The images of --data-dir; class ids follow the sorted wnids."""
    return build(read(config), config)


def read(config: TrainConfig) -> Listing:
    """Lists both sides; DataError if --data-dir is not laid out as wanted."""
    root = IMAGENET_A.root(config)
    parts = find_parts(root)
    return IMAGENET_A.sides(root, parts, PILOT) if parts else _read_tree(root)


def _read_tree(root: Path) -> Listing:
    classes, found = IMAGENET_A.tree(root)
    splits = split_each_class(found.samples, len(classes))
    return IMAGENET_A.listing(root, classes, splits, classes, OFFICIAL, found.problems, found.unread)
