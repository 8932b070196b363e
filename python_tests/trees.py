"""Small data sets in their official layouts, from the embedded drawings: concepts are classes, styles are domains.

    python python_tests/trees.py domainnet FOLDER

writes one for a look at it. Class c shows concept c % 200; beyond the 200 concepts the colours change, so every class
can be told from the others. All images are real JPEG files of 64 x 64 pixels.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from janus_ext.data import emoji

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
COLOURS = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0))


@cache
def art() -> tuple[list[str], list[str], dict[str, Tensor]]:
    """(codes, styles, drawings by "style/code")."""
    table = emoji.read_table(emoji.ASSETS / "emoji.json")
    codes = sorted(concept["code"] for concept in table["concepts"])
    return codes, table["styles"], emoji.read_images(emoji.ASSETS / "emoji.zip")


def drawing(label: int, style: int) -> np.ndarray:
    """uint8 [64, 64, 3]: class ``label`` drawn in one of the eight styles."""
    codes, styles, images = art()
    pixels = images[f"{styles[style % len(styles)]}/{codes[label % len(codes)]}"].permute(1, 2, 0).numpy()
    return pixels[:, :, COLOURS[label // len(codes)]]


def save_jpeg(path: Path, pixels: np.ndarray) -> None:
    """Writes a JPEG file and the folders above it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def wnid(label: int) -> str:
    """A name like WordNet's, sorted as the labels are."""
    return f"n{1440764 + 137 * label:08d}"


def folders(root: Path, classes: int, per_class: int, name: Callable[[int], str] = wnid) -> None:
    """``root``/<class>/<n>.jpg with ``per_class`` images of each class."""
    for label in range(classes):
        for n in range(per_class):
            save_jpeg(root / name(label) / f"{name(label)}_{n}.jpg", drawing(label, n))


def domainnet(
    root: Path, domains: tuple[str, ...] = DOMAINS, classes: int = 345, train: int = 1, test: int = 1
) -> None:
    """<domain>/<class>/<domain>_<class number>_<image number>.jpg and the two lists of each domain."""
    for d, domain in enumerate(domains):
        lines: dict[str, list[str]] = {"train": [], "test": []}
        for label in range(classes):
            for n in range(train + test):
                path = f"{domain}/thing_{label:03d}/{domain}_{label + 1:03d}_{n + 1:06d}.jpg"
                save_jpeg(root / path, drawing(label, d + n))
                lines["train" if n < train else "test"].append(f"{path} {label}\n")
        for part, listed in lines.items():
            (root / f"{domain}_{part}.txt").write_text("".join(listed))


def domainnet_yaml(root: Path, folder: Path) -> tuple[Path, Path]:
    """The lists of the tree at ``root`` as the two yaml files that CODA-Prompt and InfLoRA share."""
    files = []
    for part in ("train", "test"):
        lines = [line for path in sorted(root.glob(f"*_{part}.txt")) for line in path.read_text().splitlines()]
        entries = [line.split(" ") for line in lines]
        data, targets = ("".join(f"- {value}\n" for value in values) for values in zip(*entries, strict=True))
        files.append(folder / f"domainnet_{part}.yaml")
        files[-1].write_text(f"data:\n{data.replace('- ', '- data/DomainNet/')}targets:\n{targets}")
    return files[0], files[1]


def imagenet_r(root: Path, per_class: int = 5) -> None:
    """200 class folders and the README of the archive."""
    folders(root, 200, per_class)
    (root / "README.txt").write_text("n01440764 tench\n")


def coda_lists(root: Path, folder: Path) -> tuple[Path, Path]:
    """The two yaml files of CODA-Prompt over the tree at ``root``: its paths, class ids not in the order of wnids."""
    paths = sorted(root.glob("*/*.jpg"))
    ids = {name: (7 * i) % 200 for i, name in enumerate(sorted({path.parent.name for path in paths}))}
    files = []
    for part, keep in (("train", lambda n: n % 5 != 0), ("test", lambda n: n % 5 == 0)):
        chosen = [path for n, path in enumerate(paths) if keep(n)]
        data = "".join(f"- data/imagenet-r/{path.parent.name}/{path.name}\n" for path in chosen)
        targets = "".join(f"- {ids[path.parent.name]}\n" for path in chosen)
        files.append(folder / f"imagenet-r_{part}.yaml")
        files[-1].write_text(f"data:\n{data}targets:\n{targets}")
    return files[0], files[1]


def imagenet(root: Path, classes: int = 1000) -> None:
    """train/<wnid>/ and val/<wnid>/, one image in each."""
    for label in range(classes):
        for part in ("train", "val"):
            save_jpeg(root / part / wnid(label) / f"{wnid(label)}_1.JPEG", drawing(label, part == "val"))


def cifar100(root: Path, train: int = 2, test: int = 1) -> dict[str, bytes]:
    """cifar-100-python/{train,test,meta} with so many images a class; returns what was written, by name."""
    contents: dict[str, bytes] = {}
    for part, per_class, first in (("train", train, 0), ("test", test, train)):
        labels = [label for n in range(per_class) for label in range(100)]
        styles = [first + n for n in range(per_class) for _ in range(100)]
        small = [Image.fromarray(drawing(c, s)).resize((32, 32)) for c, s in zip(labels, styles, strict=True)]
        data = np.stack([np.asarray(image).transpose(2, 0, 1).reshape(-1) for image in small])
        contents[part] = pickle.dumps({"data": data, "fine_labels": labels, "coarse_labels": [c // 5 for c in labels]})
    contents["meta"] = pickle.dumps({"fine_label_names": [f"thing_{c:02d}" for c in range(100)]})
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


def fashion_mnist(folder: Path, train: int = 2, test: int = 1) -> dict[str, bytes]:
    """The four idx files of so many images a class in ``folder``; returns what was written, by name."""
    contents: dict[str, bytes] = {}
    for part, per_class, first in (("train", train, 0), ("t10k", test, train)):
        shown = [(label, first + n) for n in range(per_class) for label in range(10)]
        grey = [np.asarray(Image.fromarray(drawing(*each)).convert("L").resize((28, 28))) for each in shown]
        head = struct.pack(">4i", 0x803, len(shown), 28, 28)
        contents[f"{part}-images-idx3-ubyte"] = head + np.stack(grey).tobytes()
        labels = bytes(label for label, _ in shown)
        contents[f"{part}-labels-idx1-ubyte"] = struct.pack(">2i", 0x801, len(shown)) + labels
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


def cub(root: Path, train: int = 2, test: int = 1) -> None:
    """images/<class>/<n>.jpg, the three lists that count, and the names of the 200 classes."""
    classes = [f"{label + 1:03d}.Bird_{label:03d}" for label in range(200)]
    folders(root / "images", len(classes), train + test, classes.__getitem__)
    paths = sorted(path.relative_to(root / "images").as_posix() for path in root.glob("images/*/*.jpg"))
    lists: dict[str, list[object]] = {
        "images": paths,
        "image_class_labels": [int(path.split(".")[0]) for path in paths],
        "train_test_split": [int(number % (train + test) < train) for number in range(len(paths))],
        "classes": classes,
    }
    for name, values in lists.items():
        lines = [f"{number} {value}\n" for number, value in enumerate(values, start=1)]
        (root / f"{name}.txt").write_text("".join(lines))


def sides(root: Path, classes: int, train: int, test: int, name: Callable[[int], str] = wnid) -> None:
    """train/<class>/ and test/<class>/ with so many images of each class."""
    folders(root / "train", classes, train, name)
    folders(root / "test", classes, test, name)


def odd_images(folder: Path) -> Iterator[str]:
    """Images that are unusual but sound; yields their names. All show grey 128 or, where transparent, white."""
    folder.mkdir(parents=True, exist_ok=True)
    grey = Image.new("RGB", (40, 30), (128, 128, 128))
    palette = Image.new("P", (40, 30), 1)
    palette.putpalette([255, 0, 0, 128, 128, 128])
    sixteen = Image.fromarray(np.full((30, 40), 128 * 257, dtype=np.uint16))
    images: dict[str, Image.Image] = {
        "cmyk.jpg": grey.convert("CMYK"),
        "grey.jpg": grey.convert("L"),
        "16-bit.png": sixteen,
        "16-bit.tif": sixteen,
        "1x1.png": Image.new("RGB", (1, 1), (128, 128, 128)),
        "1x1.jpg": Image.new("RGB", (1, 1), (128, 128, 128)),
        "palette.png": palette,
        "bilevel.png": Image.new("1", (40, 30), 1),
        "transparent.png": Image.new("RGBA", (40, 30), (0, 0, 0, 0)),
        "grey-alpha.png": Image.new("LA", (40, 30), (0, 0)),
        "webp.webp": grey,
    }
    for name, image in images.items():
        image.save(folder / name)
        yield name
    palette.save(folder / "palette-transparent.png", transparency=1)
    yield "palette-transparent.png"


if __name__ == "__main__":
    made = {"domainnet": domainnet, "imagenet-r": imagenet_r, "imagenet": imagenet, "cifar100": cifar100, "cub": cub}
    made[sys.argv[1]](Path(sys.argv[2]))
