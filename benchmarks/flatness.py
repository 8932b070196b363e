"""Do time and memory of a step grow with the tasks? Twenty tasks of the embedded benchmark, measured task by task.

python benchmarks/flatness.py [--json FILE]

Per task: the median over its epochs of the seconds a step takes, the last epoch (which observes) apart, and the peak of
the resident memory while it trains. Every further task protects more directions and has more prototypes.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import peak_mb, reset_peak
from run import about, new_file, write

from janus_ext.backbone import load_backbone
from janus_ext.classifier import ContinualClassifier
from janus_ext.config import TrainConfig
from janus_ext.data import BENCHMARKS
from janus_ext.methods import METHODS
from janus_ext.methods.base import Task
from janus_ext.training.trainer import Trainer


class WatchedTrainer(Trainer):
    """Notes what every epoch took."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.epochs: list[dict[str, float]] = []

    def _train_epoch(self, task: Task, epoch: int, *rest: Any) -> None:
        reset_peak()
        started = time.perf_counter()
        super()._train_epoch(task, epoch, *rest)
        steps = -(-len(self.train_rows[task.index]) // self.config.batch_size)
        seconds = (time.perf_counter() - started) / steps
        self.epochs.append({"task": task.index, "epoch": epoch, "step_seconds": seconds, "peak_mb": peak_mb()})


def measure(tasks: int) -> list[dict[str, float]]:
    """One row a task."""
    config = TrainConfig(tasks=tasks, amp="off", device="cpu").resolved()
    benchmark = BENCHMARKS[config.benchmark](config)
    torch.manual_seed(0)
    model = ContinualClassifier(load_backbone(config.backbone, config.weights, config.image_size))
    with tempfile.TemporaryDirectory() as folder:
        trainer = WatchedTrainer(config, benchmark, model, METHODS[config.method](model, config), Path(folder))
        trainer.run()
    rows = []
    for task in range(tasks):
        plain = [row for row in trainer.epochs if row["task"] == task and row["epoch"] < config.epochs - 1]
        step = statistics.median(row["step_seconds"] for row in plain)
        rows.append({"task": task + 1, "step_ms": 1e3 * step, "peak_mb": max(row["peak_mb"] for row in plain)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=new_file)
    arguments = parser.parse_args()
    rows = measure(20)
    for row in rows:
        print(f"task {row['task']:2}: {row['step_ms']:.1f} ms a step, peak {row['peak_mb']:.0f} MB")
    first, last = rows[0], rows[-1]
    ratios = {name: last[name] / first[name] for name in ("step_ms", "peak_mb")}
    print("last over first: step {step_ms:.3f}, memory {peak_mb:.3f}".format(**ratios))
    if arguments.json is not None:
        write(arguments.json, {"about": about("cpu"), "tasks": rows, "last_over_first": ratios})


if __name__ == "__main__":
    main()
