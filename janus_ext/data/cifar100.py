"""``cifar100``: torchvision's files, checked by torchvision's MD5 sums and downloaded if they are not there.

The images are decoded as they come and fit into memory; workers bring them to the model's size.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from janus_ext.backbone import prepare_torchvision
from janus_ext.data.benchmark import Benchmark
from janus_ext.data.files import assemble
from janus_ext.data.images import Arrays, ImageSplit, View, default_workers
from janus_ext.errors import DataError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

TASKS = 10
PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
LAYOUT = """\
<data-dir>/cifar-100-python/train
<data-dir>/cifar-100-python/test
<data-dir>/cifar-100-python/meta

or <data-dir>/cifar-100-python.tar.gz, or any folder to download it to (161 MiB)"""
PATIENCE = 30  # seconds without an answer after which a download is given up


def load(config: TrainConfig, dataset: type | None = None) -> Benchmark:
    """The 50,000 and 10,000 images; ``dataset`` is torchvision's CIFAR100 or a subclass with other MD5 sums."""
    if config.data_dir is None:
        raise DataError(f"--benchmark cifar100 needs --data-dir; wanted:\n\n{LAYOUT}\n\nThe data set: {PAGE}")
    parts = {part: _open(config.data_dir, part == "train", dataset or _torchvisions()) for part in ("train", "test")}
    workers = default_workers(config.device) if config.workers is None else config.workers
    splits = {part: _split(part, found, workers) for part, found in parts.items()}
    classes = parts["train"].classes
    return assemble("cifar100", classes, splits["train"], splits["test"], TASKS, config)


def _torchvisions() -> type:
    prepare_torchvision()
    from torchvision.datasets import CIFAR100

    return CIFAR100


def _open(folder: Path, training: bool, dataset: type) -> Any:
    """torchvision's data set, which compares MD5 sums before it unpickles anything, and downloads what is not there."""
    try:
        with _impatient():
            return dataset(str(folder), train=training, download=True)
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"--data-dir {folder}: {'; '.join(_broken(folder, dataset))}; not to be downloaded now: {reason}; "
            f"wanted:\n\n{LAYOUT}\n\nThe data set: {PAGE}"
        ) from error


def _broken(folder: Path, dataset: Any) -> Iterator[str]:
    """A phrase per file that is missing or is not the official one."""
    from torchvision.datasets.utils import check_integrity

    for name, md5 in (*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])):
        path = folder / dataset.base_folder / name
        if not path.is_file():
            yield f"{dataset.base_folder}/{name} is missing"
        elif not check_integrity(str(path), md5):
            yield f"{dataset.base_folder}/{name} is truncated or altered ({path.stat().st_size:,} bytes)"


@contextmanager
def _impatient() -> Iterator[None]:
    """Gives up a connection that says nothing; torchvision's download would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _split(part: str, found: Any, workers: int) -> ImageSplit:
    import numpy as np

    labels = torch.tensor(found.targets, dtype=torch.int64)
    names = [f"{part}/{number}" for number in range(len(labels))]
    view = View(margin=1.0)  # the published protocol resizes and does not crop
    return ImageSplit(Arrays(np.ascontiguousarray(found.data)), range(len(labels)), labels, names, view, workers)
