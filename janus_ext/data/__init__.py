"""Benchmarks by name: each entry builds a :class:`~janus_ext.data.benchmark.Benchmark` from the configuration."""

from __future__ import annotations

from collections.abc import Callable

from janus_ext import plugins
from janus_ext.config import TrainConfig
from janus_ext.config.foreign import BENCHMARK
from janus_ext.data import (
    cars,
    cifar100,
    cub,
    domainnet,
    elsewhere,
    emoji,
    fashion_mnist,
    folder,
    imagenet_100,
    imagenet_a,
    imagenet_r,
)
from janus_ext.data.benchmark import Benchmark

BENCHMARKS: dict[str, Callable[[TrainConfig], Benchmark]] = {
    "emoji": emoji.load,
    "imagenet-r": imagenet_r.load,
    "cifar100": cifar100.load,
    "fashion-mnist": fashion_mnist.load,
    "imagenet-100": imagenet_100.load,
    "imagenet-a": imagenet_a.load,
    "cub": cub.load,
    "cars": cars.load,
    "domainnet": domainnet.load,
    "folder": folder.load,
}


def load_benchmark(config: TrainConfig) -> Benchmark:
    """The images and tasks that a configuration asks for.

    Raises:
        ArgumentError, DataError: as its own function says; a function from elsewhere gives no `Benchmark`, or one whose
            classes and tasks do not fit together.
    """
    if config.benchmark in BENCHMARKS:
        return BENCHMARKS[config.benchmark](config)
    return elsewhere.load(plugins.find(BENCHMARK, config.benchmark), config)
