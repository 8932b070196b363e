"""Benchmarks by name: each entry builds a :class:`~janus_ext.data.benchmark.Benchmark` from the configuration."""

from __future__ import annotations

from collections.abc import Callable

from janus_ext.config import TrainConfig
from janus_ext.data import (
    cars,
    cifar100,
    cub,
    domainnet,
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
