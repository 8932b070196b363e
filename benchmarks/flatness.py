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

from memory import peak_mb, reset_peak
from run import about, new_file, write

from janus_ext.assembly import make_learner
from janus_ext.config import TrainConfig
from janus_ext.data import BENCHMARKS
from janus_ext.data.benchmark import Selection
from janus_ext.methods.base import Task
from janus_ext.runs.run import Run
from janus_ext.training.loop import Learner
from janus_ext.training.trainer import Trainer


class Watched:
    """In the place of a learner's `_train_epoch`: notes what every epoch took."""

    def __init__(self, learner: Learner) -> None:
        self.train, self.batch_size = learner._train_epoch, learner.config.batch_size
        self.epochs: list[dict[str, float]] = []

    def __call__(self, task: Task, epoch: int, images: Selection, *rest: Any) -> dict[str, Any]:
        reset_peak()
        started = time.perf_counter()
        record = self.train(task, epoch, images, *rest)
        seconds = (time.perf_counter() - started) / -(-len(images) // self.batch_size)
        self.epochs.append({"task": task.index, "epoch": epoch, "step_seconds": seconds, "peak_mb": peak_mb()})
        return record


def measure(tasks: int) -> list[dict[str, float]]:
    """One row a task."""
    config = TrainConfig(tasks=tasks, head="linear", amp="off", device="cpu").resolved()
    benchmark = BENCHMARKS[config.benchmark](config)
    learner = make_learner(config, 0, tasks)
    learner._train_epoch = watched = Watched(learner)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(config, benchmark, learner, Run(Path(folder))).run()
    rows = []
    for task in range(tasks):
        plain = [row for row in watched.epochs if row["task"] == task and row["epoch"] < config.epochs - 1]
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
