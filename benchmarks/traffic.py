"""What processes that train together send each other: a model of bytes and seconds, and a run of two that counts them.

    python benchmarks/traffic.py measure     # two processes on this machine, counted, beside what the model says
    python benchmarks/traffic.py plan        # the model for a ViT-B/16 on 8, 64 and 1024 GPUs

Bytes are what one process hands over to torch.distributed. Status 1 where the count is not what the model says.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2
TASKS = 4
CALL = f"--tasks {TASKS} --amp off --no-plots --margin-weight 0 --drift-budget 0.1 --lr 0.05".split()
KINDS = ("gradients", "statistics", "features")
PROBED = 256  # images whose features are compared before and behind a task


@dataclass(frozen=True)
class Shape:
    """What a task of janus sends: its model, and how much of everything there is."""

    layers: int  # that observe an input
    width: int  # n, of their inputs, and of a feature
    trained: int  # numbers in the factors
    classes: int  # of a task
    images: int
    batch: int
    epochs: int

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(self.images / self.batch)

    def sent(self, tries: float = 0) -> dict[str, int]:
        """Bytes a task by kind: gradients every step; Gram matrices once and behind every epoch; features of all.

        The guard may try some shares of the update (ten at most), and measures some features again for each.
        """
        head = self.classes * (self.width + 1)
        marks = 2 * self.layers + 2  # one a tensor: whether it has a gradient at all
        features = self.images + (2 + tries) * min(PROBED, self.images)
        return {
            "gradients": 4 * self.steps * (self.trained + head + marks),
            "statistics": 4 * self.layers * self.width**2 * (1 + self.epochs),
            "features": round(4 * self.width * features),
        }


# the count ------------------------------------------------------------------------------------------------------------
def kind_of(name: str, tensor: torch.Tensor) -> str:
    """What a transfer is for: gradients are one vector, statistics matrices, features rows that are gathered."""
    if tensor.dtype != torch.float32:
        return "agreement"
    if name == "all_gather":
        return "features"
    return {1: "gradients", 2: "statistics"}.get(tensor.ndim, "agreement")


def counting(name: str, send: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
    """``send``, with the bytes of its tensor added up."""

    def counted(first: Any, *rest: Any, **options: Any) -> Any:
        tensor = rest[0] if name == "all_gather" else first
        kind = kind_of(name, tensor)
        counts[kind] += tensor.nbytes * (RANKS if name == "all_gather" else 1)
        counts[f"{kind}, transfers"] += 1
        return send(first, *rest, **options)

    return counted


def train_and_count(rank: int, folder: str, flags: list[str]) -> None:
    """One of the two processes; the first writes down what it sent."""
    from janus_ext.methods.base import Method
    from janus_ext.train import main

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    counts: Counter[str] = Counter()
    for name in ("all_reduce", "reduce", "all_gather"):
        setattr(dist, name, counting(name, getattr(dist, name), counts))
    look = Method._movement

    def looking(self: Method, *arguments: Any) -> float:
        counts["movements"] += 1
        return look(self, *arguments)

    Method._movement = looking
    if main([*CALL, *flags, "--output", f"{folder}/run"]):
        raise SystemExit("the run failed")
    if rank == 0:
        Path(folder, "counts.json").write_text(json.dumps(counts))
    dist.destroy_process_group()


def measure(epochs: int, limit: int) -> int:
    """The table of the count beside the model, of so many epochs of so many images a class."""
    flags = ["--epochs", str(epochs), "--limit-per-class", str(limit)]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train_and_count, args=(folder, flags), nprocs=RANKS)
        counts = Counter(json.loads(Path(folder, "counts.json").read_text()))
    shape = Shape(layers=6, width=192, trained=36_864, classes=50, images=50 * limit, batch=32, epochs=epochs)
    tries = counts["movements"] - TASKS  # of the guard: every task measures once what it has moved
    wanted = {kind: TASKS * size for kind, size in shape.sent(tries / TASKS).items()}
    print(f"The guard tried {tries} shares.\n")
    print(f"| sent by a process in {TASKS} tasks | model, bytes | counted, bytes | transfers |\n|---|---|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {wanted[kind]:,} | {counts[kind]:,} | {counts[f'{kind}, transfers']:,} |")
    print(f"| to agree | – | {counts['agreement']:,} | {counts['agreement, transfers']:,} |")
    return int(any(wanted[kind] != counts[kind] for kind in KINDS))


# the model for machines that we do not have ---------------------------------------------------------------------------
WIDTH, LAYERS, FACTORS = 768, 12, 12 * 2 * 10 * (768 + 768)  # of a ViT-B/16 with rank 10 on K and V
PLANS = {
    "DomainNet": (Shape(LAYERS, WIDTH, FACTORS, 69, 82_000, 128, 5), 5),
    "ImageNet-21k": (Shape(LAYERS, WIDTH, FACTORS, 109, 71_000, 1024, 5), 200),
}
GPUS = (8, 64, 1024)
COMPUTED = 4000  # images a second that a GPU trains: assumed
DECODED = 250  # images a second that a core decodes
CORES = 16  # for each GPU
BANDWIDTH, LATENCY = 25e9, 20e-6  # bytes a second between machines, and seconds a transfer: assumed


def seconds(size: float, transfers: float, gpus: int) -> float:
    """Of transfers of so many bytes in all: a ring moves 2 (P - 1) / P of each, in log2(P) waits."""
    return 2 * (gpus - 1) / gpus * size / BANDWIDTH + transfers * LATENCY * math.log2(gpus)


NETWORKS = {"ViT-S/16": (12, 384), "ViT-B/16": (12, 768), "ViT-L/16": (24, 1024)}  # layers, width
LORA_RANKS = (10, 64)


def plan() -> int:
    """What a step sends of each network, and what a task takes, by what it waits for."""
    print("\n".join([*steps(), "", *tasks()]))
    return 0


def steps() -> Iterator[str]:
    """Of a batch of 128 images of 69 classes: bytes and seconds of its gradients, and the sum of Gram matrices."""
    yield f"| | LoRA's rank | MB a step | ms a step, {', '.join(map(str, GPUS))} GPUs | MB of statistics a task |"
    yield "|---" * 5 + "|"
    for name, (layers, width) in NETWORKS.items():
        for rank in LORA_RANKS:
            sent = Shape(layers, width, layers * 2 * rank * 2 * width, 69, 128, 128, epochs=1).sent()
            waits = ", ".join(f"{1e3 * seconds(sent['gradients'], 1, gpus):.2f}" for gpus in GPUS)
            row = f"| {name} | {rank} | {sent['gradients'] / 1e6:.1f} | {waits} "
            yield row + f"| {4 * layers * width**2 / 1e6:,.0f} |"


def tasks() -> Iterator[str]:
    """Of two benchmarks, by what a task waits for."""
    yield "| | GPUs | images a step and GPU | to compute, s | to decode, s | to send, s | MB sent |"
    yield "|---" * 7 + "|"
    for name, (shape, number) in PLANS.items():
        for gpus in GPUS:
            busy = min(gpus, shape.batch)  # more have no image to compute
            sent, passes = shape.sent(), shape.images * (shape.epochs + 1)
            waits = seconds(sum(sent.values()), shape.steps + 2 * LAYERS, gpus)
            row = f"| {name}, one of {number} tasks | {gpus} | {shape.batch / gpus:g} | {passes / busy / COMPUTED:.1f} "
            yield row + f"| {passes / busy / DECODED / CORES:.1f} | {waits:.2f} | {sum(sent.values()) / 1e6:,.0f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["measure", "plan"])
    parser.add_argument("--epochs", type=int, default=2, help="of the run that is counted")
    parser.add_argument("--limit-per-class", type=int, default=3, help="its images")
    arguments = parser.parse_args()
    sys.exit(plan() if arguments.action == "plan" else measure(arguments.epochs, arguments.limit_per_class))
