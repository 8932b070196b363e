"""``cifar100``: torchvision's files, checked by torchvision's MD5 sums and downloaded if they are not there.

The images are decoded as they come and fit into memory; workers bring them to the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_ext.backbone import prepare_torchvision
from janus_ext.data.benchmark import Benchmark
from janus_ext.data.fetched import Fetched

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
LAYOUT = """\
<data-dir>/cifar-100-python/train
<data-dir>/cifar-100-python/test
<data-dir>/cifar-100-python/meta

or <data-dir>/cifar-100-python.tar.gz, or any folder to download it to (161 MiB)"""
DATA_SET = Fetched("cifar100", tasks=10, layout=LAYOUT, page=PAGE)


def load(config: TrainConfig, dataset: type | None = None) -> Benchmark:
    """The 50,000 and 10,000 images; ``dataset`` is torchvision's CIFAR100 or a subclass with other MD5 sums."""
    folder = DATA_SET.folder(config)
    train, test = (_open(folder, training, dataset or _torchvisions()) for training in (True, False))
    return DATA_SET.benchmark(train.classes, {"train": _content(train), "test": _content(test)}, config)


def _torchvisions() -> type:
    prepare_torchvision()
    from torchvision.datasets import CIFAR100

    return CIFAR100


def _open(folder: Path, training: bool, dataset: type) -> Any:
    """torchvision's data set, which compares MD5 sums before it unpickles anything, and downloads what is not there."""
    with DATA_SET.fetching(folder, partial(_broken, folder, dataset)):
        return dataset(str(folder), train=training, download=True)


def _content(found: Any) -> tuple[Any, list[int]]:
    import numpy as np

    return np.ascontiguousarray(found.data), found.targets


def _broken(folder: Path, dataset: Any) -> Iterator[str]:
    """A phrase per file that is missing or is not the official one."""
    from torchvision.datasets.utils import check_integrity

    for name, md5 in (*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])):
        path = folder / dataset.base_folder / name
        if not path.is_file():
            yield f"{dataset.base_folder}/{name} is missing"
        elif not check_integrity(str(path), md5):
            yield f"{dataset.base_folder}/{name} is truncated or altered ({path.stat().st_size:,} bytes)"
