"""Data sets that torchvision fetches: what is said about their files, and their images, which fit into memory."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from janus_ext.data.benchmark import Benchmark
from janus_ext.data.files import assemble
from janus_ext.data.images import Arrays, ImageSplit, View, default_workers
from janus_ext.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from janus_ext.config import TrainConfig

PATIENCE = 30  # seconds without an answer after which a download is given up


@dataclass(frozen=True)
class Fetched:
    """A data set whose files are fetched if they are not there; ``layout`` and ``page`` are shown where that fails."""

    name: str
    tasks: int
    layout: str
    page: str

    def folder(self, config: TrainConfig) -> Path:
        """--data-dir, which need not exist yet; DataError if there is none."""
        if config.data_dir is None:
            raise DataError(f"--benchmark {self.name} needs --data-dir; {self._wanted()}")
        return config.data_dir

    @contextmanager
    def fetching(self, folder: Path, broken: Callable[[], Iterable[str]]) -> Iterator[None]:
        """Gives up a connection that says nothing (torchvision's download would wait for ever).

        What fails within it is a DataError with the reason and the phrases of ``broken``, one a file that is not fine.
        """
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(PATIENCE)
        try:
            yield
        except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"--data-dir {folder}: {'; '.join(broken())}; not to be downloaded now: {reason}; {self._wanted()}"
            ) from error
        finally:
            socket.setdefaulttimeout(before)

    def benchmark(
        self,
        classes: Sequence[str],
        parts: Mapping[str, tuple[np.ndarray, Sequence[int] | np.ndarray]],
        config: TrainConfig,
    ) -> Benchmark:
        """The benchmark of the ``parts`` "train" and "test": uint8 [N, H, W, 3] pixels and N class ids each."""
        workers = default_workers(config.device) if config.workers is None else config.workers
        splits = {part: _split(part, *found, workers) for part, found in parts.items()}
        return assemble(self.name, classes, splits["train"], splits["test"], self.tasks, config)

    def _wanted(self) -> str:
        return f"wanted:\n\n{self.layout}\n\nThe data set: {self.page}"


def _split(part: str, pixels: np.ndarray, labels: Sequence[int] | np.ndarray, workers: int) -> ImageSplit:
    ids = torch.tensor(labels, dtype=torch.int64)
    names = [f"{part}/{number}" for number in range(len(ids))]
    view = View(margin=1.0)  # the published protocol of CIFAR resizes and does not crop
    return ImageSplit(Arrays(pixels), range(len(ids)), ids, names, view, workers)
