"""The type every benchmark is: two splits of labelled images, class names, and the classes of each task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from janus_ext.arguments import are_integers, check_flag, check_tensor, check_text, shown
from janus_ext.data.layout import shorten
from janus_ext.data.tasks import draw_share, split_sha256
from janus_ext.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
FEW = 5  # images of a class by which one may tell how well it is known
Part = Callable[[Tensor], Tensor]  # of a batch's rows, those that this process is to compute


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _are_lists_of_integers(value: Any) -> bool:
    lists = (list, tuple, range)
    return isinstance(value, lists) and all(isinstance(item, lists) and all(map(_is_integer, item)) for item in value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are_pictures(images: Tensor) -> bool:
    return images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3


def _are_ids(labels: Tensor) -> bool:
    return are_integers(labels) and not bool((labels < 0).any())


def _are_integers_in_a_row(labels: Tensor) -> bool:
    return are_integers(labels) and labels.ndim == 1


def whole(rows: Tensor) -> Tensor:
    """All of them."""
    return rows


class Split(Dataset, ABC):
    """Labelled images, map-style: item i is (uint8 [3, H, W], class id).

    ``labels`` is int64 [N], ``samples`` names each image (its path inside the data set) for the split's fingerprint.
    """

    labels: Tensor
    samples: tuple[str, ...]
    margin = 1.0
    """How much larger than the model's square an image is made before its middle is taken; 1 shows all of it."""

    @property
    def crop_mode(self) -> str:
        """How images become squares, see `View`: what is in memory is squashed by the model if it is none yet."""
        images, _ = next(iter(self.stream([torch.tensor([0])])))
        return "center" if images.shape[-1] == images.shape[-2] else "squash"

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def stream(
        self, batches: Iterable[Tensor], generator: torch.Generator | None = None, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 [b, 3, H, W], int64 [b]) per int64 index tensor [b]; augmented if and only if a generator is given.

        The first ``skip`` of them are passed over; what they would have drawn from the generator is drawn.
        """

    def parts(
        self, batches: Iterable[Tensor], generator: torch.Generator | None, skip: int, part: Part
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same, but of each batch its ``part`` alone; a split that decodes need not decode the rest."""
        for images, labels in self.stream(batches, generator, skip):
            yield part(images), part(labels)

    @abstractmethod
    def take(self, indices: Tensor) -> Split:
        """The split of the samples at ``indices`` (int64 [n])."""

    def at(self, size: int) -> Split:
        """The split for a model of ``size`` x ``size`` pixels; images that are in memory are resized by the model."""
        return self

    def decoded(self) -> Split:
        """The split with all images in memory."""
        return self

    def of_classes(self, classes: Sequence[int]) -> Tensor:
        """Indices (int64 [n], ascending) of the samples whose class is among ``classes``."""
        return torch.isin(self.labels, torch.tensor(classes, dtype=torch.int64)).nonzero().flatten()

    def first_per_class(self, limit: int) -> Tensor:
        """Indices (int64 [n], ascending) of the first ``limit`` samples of each class."""
        kept = [(self.labels == c).nonzero().flatten()[:limit] for c in self.labels.unique().tolist()]
        return torch.cat([torch.empty(0, dtype=torch.int64), *kept]).sort().values


class MemorySplit(Split):
    """A split decoded into one uint8 tensor [N, 3, H, W]; a whole batch is gathered and augmented at once."""

    def __init__(
        self, images: Tensor, labels: Tensor, samples: Sequence[str], augmentation: Augmentation | None = None
    ) -> None:
        check_tensor("MemorySplit: images", images, "uint8 [N, 3, H, W]", _are_pictures)
        N = len(images)
        wanted = f"[{N}] integers, one an image, from 0 on"
        check_tensor("MemorySplit: labels", labels, wanted, lambda y: list(y.shape) == [N] and _are_ids(y))
        if not _are_texts(samples) or len(samples) != N:
            found = f"{len(samples)} names" if _are_texts(samples) else shown(samples)
            raise ArgumentError(f"MemorySplit: samples must be {N} names, one an image, got {found}")
        if augmentation is not None and not callable(augmentation):
            raise ArgumentError(f"MemorySplit: augmentation must be a function or None, got {shown(augmentation)}")
        self.images = images
        self.labels = labels.to(torch.int64)
        self.samples = tuple(samples)
        self.augmentation = augmentation

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def stream(
        self, batches: Iterable[Tensor], generator: torch.Generator | None = None, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for number, indices in enumerate(batches):
            images = self.images[indices]
            if generator is not None and self.augmentation is not None:
                images = self.augmentation(images, generator)
            if number >= skip:
                yield images, self.labels[indices]

    def take(self, indices: Tensor) -> MemorySplit:
        names = [self.samples[i] for i in indices.tolist()]
        return MemorySplit(self.images[indices], self.labels[indices], names, self.augmentation)


@dataclass(frozen=True)
class Selection:
    """Some images of a split, and the model's output for each of its class ids.

    ``rows`` int64 [n] are the images' places in ``split``, ``outputs`` int64 [classes] maps class ids.
    """

    split: Split
    rows: Tensor
    outputs: Tensor

    @classmethod
    def all_of(cls, split: Split, outputs: Sequence[int]) -> Selection:
        """Every image of a split; class id c is the model's ``outputs[c]``."""
        return cls(split, torch.arange(len(split)), torch.tensor(outputs, dtype=torch.int64))

    @classmethod
    def unlabelled(cls, split: Split) -> Selection:
        """Every image of a split, whatever its labels, as the model's output 0."""
        return cls.all_of(split, [0] * max(1, 1 + max(split.labels.tolist(), default=0)))

    def __len__(self) -> int:
        return len(self.rows)

    def spread(self, count: int) -> Selection:
        """At most ``count`` of them, evenly spread over all, or over so many classes that each may have `FEW`."""
        if len(self) <= count:
            return self
        _, labels = self.split.labels[self.rows].unique(return_inverse=True)
        first = torch.full((int(labels.max()) + 1,), len(self)).scatter_reduce(
            0, labels, torch.arange(len(self)), "amin"
        )
        places = first[labels].argsort(stable=True)  # class by class, in the order in which they come
        classes = first.sort().values
        if count < FEW * len(classes):
            taken = torch.linspace(0, len(classes) - 1, max(1, count // FEW)).round().to(torch.int64)
            places = places[torch.isin(first[labels][places], classes[taken])]
        kept = torch.linspace(0, len(places) - 1, min(count, len(places))).round().to(torch.int64)
        return replace(self, rows=self.rows[places[kept]])

    def part(self, part: Part) -> Selection:
        """A part of them."""
        return replace(self, rows=part(self.rows))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 [b, 3, H, W], int64 [b] outputs) of ``size`` images at most, in order and as they are."""
        if len(self):  # none are no batch
            yield from self._with_outputs(self.split.stream(self.rows.split(size)))

    def shuffled(self, size: int, seed: int, skip: int = 0, part: Part = whole) -> Iterator[tuple[Tensor, Tensor]]:
        """The same in random order, augmented, without the first ``skip`` batches; of each the ``part``, maybe none."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.rows[torch.randperm(len(self.rows), generator=generator)]
        return self._with_outputs(self.split.parts(rows.split(size), generator, skip, part))

    def _with_outputs(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in batches:
            yield images, self.outputs[labels.long()]  # uint8 would be taken for a mask


@dataclass(frozen=True)
class Benchmark:
    """A class-incremental benchmark: ``tasks`` holds the class ids of each task in the order of learning."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    tasks: tuple[tuple[int, ...], ...]
    validation: bool = False
    """Whether ``test`` is training images that were held out, and not the benchmark's test images."""
    family: Callable[[str], str] = str
    """Of a sample's name: one text for all samples that stay on one side of a split, as drawings of the same shapes."""

    def __post_init__(self) -> None:
        """ArgumentError unless the parts are of these types, and labels and tasks of the classes."""
        check_text("Benchmark: name", self.name, "text")
        if not _are_texts(self.class_names):
            raise ArgumentError(f"Benchmark: class_names must be a list of texts, got {shown(self.class_names)}")
        C = len(self.class_names)
        twice = [name for name, times in Counter(self.class_names).items() if times > 1]
        if twice:
            raise ArgumentError(f"Benchmark: class_names must differ, got {shown(twice[0])} more than once")
        for part in ("train", "test"):
            split = getattr(self, part)
            if not isinstance(split, Split):
                raise ArgumentError(f"Benchmark: {part} must be a Split, got {shown(split)}")
            check_tensor(f"Benchmark: {part}.labels", split.labels, "integers [N]", _are_integers_in_a_row)
            if part == "train" and not len(split):
                raise ArgumentError("Benchmark: train must have one image at least, got none")
            strange = split.labels[(split.labels < 0) | (split.labels >= C)]
            if len(strange):
                raise ArgumentError(f"Benchmark: {part} must have labels of {C} classes, got {int(strange[0])}")
        if not _are_lists_of_integers(self.tasks):
            raise ArgumentError(f"Benchmark: tasks must be lists of class ids, got {shown(self.tasks)}")
        if sorted(self.class_order) != list(range(C)):
            found = shown(list(self.class_order))
            raise ArgumentError(f"Benchmark: tasks must have each of the class ids 0 .. {C - 1} once, got {found}")
        object.__setattr__(self, "tasks", tuple(tuple(map(int, classes)) for classes in self.tasks))  # of any kind
        check_flag("Benchmark: validation", self.validation)
        if not callable(self.family):
            raise ArgumentError(f"Benchmark: family must be a function of a name, got {shown(self.family)}")

    @property
    def class_order(self) -> tuple[int, ...]:
        """Class ids in the order of learning; the model's output p stands for class ``class_order[p]``."""
        return tuple(c for classes in self.tasks for c in classes)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [classes]: the model's output for each class id, the inverse of ``class_order``."""
        order = torch.tensor(self.class_order, dtype=torch.int64)
        return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))

    def training(self, task: int) -> Selection:
        """The training images of a task."""
        return Selection(self.train, self.train.of_classes(self.tasks[task]), self.positions)

    def testing(self, task: int) -> Selection:
        """The test images of a task, or those held out."""
        return Selection(self.test, self.test.of_classes(self.tasks[task]), self.positions)

    @property
    def split_sha256(self) -> str:
        """Fingerprint of both splits and of the class order."""
        return split_sha256(self.train.samples, self.test.samples, self.tasks)

    def limited(self, per_class: int) -> Benchmark:
        """The same benchmark with at most ``per_class`` images of each class, in training and in test."""
        if per_class < 1:
            raise ArgumentError(f"--limit-per-class must be at least 1, got {per_class}")
        return self._each(lambda split: split.take(split.first_per_class(per_class)))

    def with_validation(self, share: float, seed: int) -> Benchmark:
        """The same benchmark with ``share`` of each class's training images held out, in the place of the test images.

        Which ones depends on ``seed`` and on the images' names, see :func:`~janus_ext.data.tasks.draw_share`.

        Raises:
            DataError: of a class none can be held out.
        """
        held, lacking = [], []
        for label, name in enumerate(self.class_names):
            rows = self.train.of_classes([label]).tolist()
            drawn = draw_share([self.train.samples[row] for row in rows], share, seed, self.family)
            held += [rows[place] for place in drawn]
            lacking += [] if drawn else [name]
        if lacking:
            raise DataError(
                "--validation needs two different training images of each class, one to hold out and one to learn; "
                f"{len(lacking)} of {len(self.class_names)} classes have fewer: {shorten(lacking)}"
            )
        kept = torch.ones(len(self.train), dtype=torch.bool)
        kept[held] = False
        train, test = (self.train.take(rows.nonzero().flatten()) for rows in (kept, ~kept))
        return replace(self, train=train, test=test, validation=True)

    def as_asked(self, config: TrainConfig) -> Benchmark:
        """What --limit-per-class leaves of the benchmark, with --validation images of that held out.

        Raises:
            ArgumentError: there is nothing to measure on.
            DataError: of a class none can be held out.
        """
        left = self if config.limit_per_class is None else self.limited(config.limit_per_class)
        asked = left if config.validation is None else left.with_validation(config.validation, config.seed[0])
        if not len(asked.test):
            raise ArgumentError("Benchmark: test must have one image at least, or --validation hold some out, got none")
        return asked

    def at(self, size: int) -> Benchmark:
        """The same benchmark for a model of ``size`` x ``size`` pixels."""
        return self._each(lambda split: split.at(size))

    def decoded(self) -> Benchmark:
        """The same benchmark with all images decoded into memory."""
        return self._each(lambda split: split.decoded())

    def _each(self, change: Callable[[Split], Split]) -> Benchmark:
        return replace(self, train=change(self.train), test=change(self.test))
