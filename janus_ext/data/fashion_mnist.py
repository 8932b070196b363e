"""``fashion-mnist``: the four files of torchvision's FashionMNIST, packed or not, downloaded if they are not there.

torchvision's MD5 sums are of the archives of its server. The same files packed anew, as Debian's package has them, have
other sums; so those of the contents are what counts.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_ext.backbone import prepare_torchvision
from janus_ext.data.benchmark import Benchmark
from janus_ext.data.fetched import Fetched
from janus_ext.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from janus_ext.config import TrainConfig

SUMS = {  # MD5 of the contents; those of torchvision's archives unpack to them
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
PARTS = {"train": "train", "test": "t10k"}
SIDE = 28  # pixels
RAW = "FashionMNIST/raw"
PAGE = "https://github.com/zalandoresearch/fashion-mnist"
LAYOUT = f"""\
<data-dir>/{RAW}/train-images-idx3-ubyte
<data-dir>/{RAW}/train-labels-idx1-ubyte
<data-dir>/{RAW}/t10k-images-idx3-ubyte
<data-dir>/{RAW}/t10k-labels-idx1-ubyte

packed (.gz) or not, or these four in <data-dir> itself, or any folder to download them to (30 MiB)"""
DATA_SET = Fetched("fashion-mnist", tasks=5, layout=LAYOUT, page=PAGE)


def load(config: TrainConfig, dataset: Any = None, sums: Mapping[str, str] = SUMS) -> Benchmark:
    """The 60,000 and 10,000 grey images as RGB; ``dataset`` is torchvision's FashionMNIST or one like it."""
    dataset = dataset or _torchvisions()
    contents = _read(DATA_SET.folder(config), dataset, sums)
    parts = {
        part: (_pixels(contents[f"{name}-images-idx3-ubyte"]), _numbers(contents[f"{name}-labels-idx1-ubyte"], 1))
        for part, name in PARTS.items()
    }
    return DATA_SET.benchmark(dataset.classes, parts, config)


def _torchvisions() -> Any:
    prepare_torchvision()
    from torchvision.datasets import FashionMNIST

    return FashionMNIST


def _read(data_dir: Path, dataset: Any, sums: Mapping[str, str]) -> dict[str, bytes]:
    """The contents of the files by name; those that are missing or altered are downloaded."""
    direct = any(path.is_file() for name in sums for path in _places(data_dir, name))
    folder = data_dir if direct else data_dir / RAW
    with DATA_SET.fetching(data_dir, lambda: _broken(folder, sums)):
        return {
            name: _content(folder, name, md5) or _download(folder, name, md5, dataset) for name, md5 in sums.items()
        }


def _places(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / name, folder / f"{name}.gz"


def _content(folder: Path, name: str, md5: str) -> bytes | None:
    """What the file holds, packed or not; None if it is not there or holds anything else than it should."""
    for path in _places(folder, name):
        try:
            packed = path.read_bytes() if path.is_file() else b""
            content = gzip.decompress(packed) if path.suffix == ".gz" else packed
        except (gzip.BadGzipFile, EOFError, zlib.error):
            continue  # altered
        except OSError as error:
            raise DataError(f"--data-dir: {path} cannot be read: {error.strerror}") from error
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
            return content
    return None


def _download(folder: Path, name: str, md5: str, dataset: Any) -> bytes:
    """Fetches and unpacks one file, from the first of torchvision's mirrors that has it, and returns its content."""
    from torchvision.datasets.utils import download_and_extract_archive

    archive, reasons = f"{name}.gz", []
    for mirror in dataset.mirrors:
        try:
            packed = dict(dataset.resources)[archive]
            download_and_extract_archive(mirror + archive, str(folder), filename=archive, md5=packed)
        except (OSError, RuntimeError) as error:
            reasons.append(f"{mirror}{archive}: {error}")
        else:
            if content := _content(folder, name, md5):
                return content
    raise RuntimeError("; ".join(reasons) or f"{archive} does not hold what it should")


def _broken(folder: Path, sums: Mapping[str, str]) -> Iterator[str]:
    """A phrase per file that is missing or is not the official one."""
    for name, md5 in sums.items():
        if _content(folder, name, md5) is None:
            there = [path for path in _places(folder, name) if path.is_file()]
            yield from (f"{path.name} is truncated or altered ({path.stat().st_size:,} bytes)" for path in there)
            if not there:
                yield f"{name} is missing"


# contents ------------------------------------------------------------------------------------------------------------
def _numbers(content: bytes, dimensions: int) -> np.ndarray:
    """uint8 [n]: what follows the head of an idx file, four bytes and four more for each of its ``dimensions``."""
    import numpy as np

    return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions))


def _pixels(content: bytes) -> np.ndarray:
    """uint8 [N, 28, 28, 3], a view of the grey images that takes no memory of its own."""
    import numpy as np

    grey = _numbers(content, 3).reshape(-1, SIDE, SIDE, 1)
    return np.broadcast_to(grey, (*grey.shape[:3], 3))
