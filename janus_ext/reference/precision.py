"""Products in full float32, whatever the process has set."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch


class _FullFloat32:
    """The process-wide setting behind `full_float32`: the first thread in changes it, the last one out restores it."""

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.saved: list[tuple[Any, str]] = []

    def enter(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.saved = []
                for matmul, parent in (
                    (torch.backends.cuda.matmul, torch.backends.cudnn),
                    (torch.backends.mkldnn.matmul, torch.backends.mkldnn),
                ):
                    if (precision := matmul.fp32_precision) not in ("ieee", "none"):
                        # What its parent has, it has from there, and goes on having: it is restored as not set.
                        inherited = precision == parent.fp32_precision
                        self.saved.append((matmul, "none" if inherited else precision))
                        matmul.fp32_precision = "ieee"
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for backend, precision in self.saved:
                    backend.fp32_precision = precision


_full_float32 = _FullFloat32()


def without_autocast(x: torch.Tensor) -> AbstractContextManager[None]:
    """Products inside are in the dtype of what is multiplied, whatever autocast says of the device of ``x``."""
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if known else nullcontext()


@contextmanager
def full_float32() -> Iterator[None]:
    """Products inside are IEEE float32, whatever TF32 or `set_float32_matmul_precision` settings say."""
    _full_float32.enter()
    try:
        yield
    finally:
        _full_float32.leave()
