"""Class order, division of classes into tasks, and the fingerprint of a split: pure functions, no images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from janus_ext.errors import ArgumentError


def class_order(classes: int, seed: int | None = None) -> tuple[int, ...]:
    """Order in which ``classes`` class ids are learned: identity without a seed, else a permutation fixed by it.

    The permutation sorts SHA-256 digests, so it is the same for every Python, PyTorch and platform.
    """
    if seed is None:
        return tuple(range(classes))
    return tuple(sorted(range(classes), key=lambda c: hashlib.sha256(f"{seed}/{c}".encode()).digest()))


def split_classes(order: Sequence[int], tasks: int) -> tuple[tuple[int, ...], ...]:
    """Cuts ``order`` into ``tasks`` consecutive groups whose sizes differ by one at most, the larger ones first."""
    if not 1 <= tasks <= len(order):
        raise ArgumentError(f"--tasks must lie in 1..{len(order)} (the number of classes), got {tasks}")
    size, larger = divmod(len(order), tasks)
    starts = [t * size + min(t, larger) for t in range(tasks + 1)]
    return tuple(tuple(order[a:b]) for a, b in zip(starts, starts[1:], strict=False))


def split_sha256(train: Iterable[str], test: Iterable[str], tasks: Sequence[Sequence[int]]) -> str:
    """SHA-256 (hex) of a split: names of the training and test samples in any order, and the classes of each task."""
    digest = hashlib.sha256()
    for part, samples in (("train", train), ("test", test)):
        digest.update("".join(f"{part} {sample}\n" for sample in sorted(samples)).encode())
    for index, classes in enumerate(tasks):
        digest.update(f"task {index} {' '.join(map(str, classes))}\n".encode())
    return digest.hexdigest()
