"""What processes that train together send each other: a model of bytes and seconds, and a run of two that counts them.

    python benchmarks/traffic.py measure     # two processes on this machine, counted, beside what the model says
    python benchmarks/traffic.py plan        # the model for a ViT-B/16 on 8, 64 and 1024 GPUs

Bytes are what the first process hands over to torch.distributed, or takes from another one. Status 1 where the count is
not what the model says, or a transfer is of no kind that it knows: activations within the network would be such.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
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
FEW = 64  # numbers of a transfer that counts, adds up losses or agrees
KINDS = ("gradients", "statistics", "features")
OTHERS = {
    "labels": "labels of the features",
    "agreement": f"losses, counts, whether to stop: {FEW} numbers at most",
    "objects": "Python objects",
    "unknown": "anything else",
}
WIDE = 192  # of the run that is counted: inputs and features
RANK = 16  # of its sketches, where these are the statistics
OBJECT = 64_000  # bytes of a Python object: digests, random states and settings are less
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
    sketch: int = 0  # rank l of an incremental SVD; 0: Gram matrices

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(self.images / self.batch)

    def sent(self, tries: float = 0) -> dict[str, int]:
        """Bytes a task by kind: gradients every step; statistics once and behind every epoch; features of all.

        Sketches U [n, l] and S [l] go from process to process, and at the task's end from the first one to all. The
        guard may try some shares of the update (ten at most), and measures some features again for each.
        """
        sums = 4 * self.width**2 * (1 + self.epochs)
        factors = 4 * self.sketch * (self.width + 1) * (2 + self.epochs)
        head = self.classes * (self.width + 1)
        marks = 2 * self.layers + 2  # one a tensor: whether it has a gradient at all
        features = self.images + (2 + tries) * min(PROBED, self.images)
        return {
            "gradients": 4 * self.steps * (self.trained + head + marks),
            "statistics": self.layers * (factors if self.sketch else sums),
            "features": round(4 * self.width * features),
        }


# the count ------------------------------------------------------------------------------------------------------------
def kind_of(name: str, tensor: torch.Tensor) -> str:
    """What a transfer is for: gradients are one vector, statistics matrices, features rows that are gathered."""
    numbers = tensor.dtype == torch.float32
    shape = list(tensor.shape)
    if name == "all_gather" and (shape[1:] == [WIDE] if numbers else tensor.dtype == torch.int64 and len(shape) == 1):
        return "features" if numbers else "labels"
    if name in ("recv", "broadcast") and numbers and shape in ([WIDE, RANK], [RANK]):
        return "statistics"
    if name in ("all_reduce", "reduce") and numbers and (len(shape) == 1 or shape == [WIDE, WIDE]):
        return "gradients" if len(shape) == 1 else "statistics"
    return "agreement" if tensor.numel() <= FEW else "unknown"


def counting(name: str, send: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
    """``send``, with the bytes of its tensor added up."""

    def counted(first: Any, *rest: Any, **options: Any) -> Any:
        tensor = rest[0] if name == "all_gather" else first
        kind = kind_of(name, tensor)
        counts[kind] += tensor.nbytes * (RANKS if name == "all_gather" else 1)
        counts[f"{kind}, transfers"] += 1
        return send(first, *rest, **options)

    return counted


def counting_objects(name: str, send: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
    """The same of what sends Python objects, as it pickles them."""

    def counted(first: Any, *rest: Any, **options: Any) -> Any:
        size = len(pickle.dumps(rest[0] if name == "all_gather_object" else first))
        counts["objects" if size <= OBJECT else "unknown"] += size
        counts["objects, transfers"] += 1
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
    for name in ("all_reduce", "reduce", "all_gather", "broadcast", "send", "recv"):
        setattr(dist, name, counting(name, getattr(dist, name), counts))
    for name in ("all_gather_object", "broadcast_object_list"):
        setattr(dist, name, counting_objects(name, getattr(dist, name), counts))
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


def measure(epochs: int, limit: int, estimator: str) -> int:
    """The table of the count beside the model, of so many epochs of so many images a class."""
    flags = ["--epochs", str(epochs), "--limit-per-class", str(limit), "--estimator", estimator]
    sketch = {"gram": 0, "isvd": RANK}[estimator]
    flags += ["--estimator-rank", str(sketch), "--energy-start", "0.5", "--energy-end", "0.6"] if sketch else []
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train_and_count, args=(folder, flags), nprocs=RANKS)
        counts = Counter(json.loads(Path(folder, "counts.json").read_text()))
    shape = Shape(6, WIDE, trained=36_864, classes=50, images=50 * limit, batch=32, epochs=epochs, sketch=sketch)
    tries = counts["movements"] - TASKS  # of the guard: every task measures once what it has moved
    wanted = {kind: TASKS * size for kind, size in shape.sent(tries / TASKS).items()}
    print(f"The guard tried {tries} shares.\n")
    print(f"| sent by a process in {TASKS} tasks | model, bytes | counted, bytes | transfers |\n|---|---|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {wanted[kind]:,} | {counts[kind]:,} | {counts[f'{kind}, transfers']:,} |")
    for kind, what in OTHERS.items():
        print(f"| {what} | – | {counts[kind]:,} | {counts[f'{kind}, transfers']:,} |")
    return int(any(wanted[kind] != counts[kind] for kind in KINDS) or counts["unknown"] > 0)


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
            transfers = shape.steps + 2 * LAYERS * (1 + shape.epochs)  # a matrix a layer, and how many rows it is of
            waits = seconds(sum(sent.values()), transfers, gpus)
            row = f"| {name}, one of {number} tasks | {gpus} | {shape.batch / gpus:g} | {passes / busy / COMPUTED:.1f} "
            yield row + f"| {passes / busy / DECODED / CORES:.1f} | {waits:.2f} | {sum(sent.values()) / 1e6:,.0f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["measure", "plan"])
    parser.add_argument("--epochs", type=int, default=2, help="of the run that is counted")
    parser.add_argument("--limit-per-class", type=int, default=3, help="its images")
    parser.add_argument("--estimator", choices=["gram", "isvd"], default="gram", help="its statistics")
    arguments = parser.parse_args()
    counted = arguments.epochs, arguments.limit_per_class, arguments.estimator
    sys.exit(plan() if arguments.action == "plan" else measure(*counted))
