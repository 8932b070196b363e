"""How far may the first task move features? What more or less of its update does for all tasks, on held-out images.

    python benchmarks/first_task.py run --glyphs DATA/glyphs --fashion-mnist DATA/fashion-mnist --json FILE
    python benchmarks/first_task.py table FILE

The backbone learns the first task as shipped, but without the guard, and once more at four times the rate. Then
shares of the update are tried, and for each `lda` is fitted to the features of all training images and measured on the
held-out ones, as if nothing were learned in the tasks behind it. Held out is as in guard.py, by other seeds: no choice
has seen these splits. The file keeps every split that is finished, and a run goes on with it.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from guard import BY_FONT, change, hold_out_fonts
from random_features import accuracy, known_of, sides
from splits import Case, command, stored
from study_cells import OFF
from study_rows import located
from study_tables import counted, shown
from torch import Tensor

from janus_ext.assembly import make_learner
from janus_ext.config import TrainConfig
from janus_ext.data import load_benchmark
from janus_ext.data.benchmark import Benchmark, Selection
from janus_ext.devices import deterministic, pick_amp
from janus_ext.heads.drift import movement
from janus_ext.heads.statistics import FeatureStatistics
from janus_ext.methods.base import Task, TaskReport
from janus_ext.training.loop import PROBE, Learner
from janus_ext.training.progress import Progress, make_bar

SEEDS = {"emoji": range(126, 150), BY_FONT: range(126, 138), "fashion-mnist": range(126, 138)}
RATES = (0.004, 0.016)  # the default's, and four times as much
SHARES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0)
HEAD = "lda"
CPU = torch.device("cpu")
Point = dict[str, float]
Probed = tuple[Tensor, Tensor]


def measure(case: Case, folder: Path | None) -> Case:
    """What every share of the first task's update makes of one split."""
    lr, data, seed = case["lr"], case["data"], case["seed"]
    with tempfile.TemporaryDirectory() as fonts:
        place = located(data, hold_out_fonts(folder, seed, Path(fonts)) if data == BY_FONT else folder)
        own = {"lr": lr, "seed": (seed,), "shuffle_classes": True, "device": "cpu"}
        config = TrainConfig(**change(data, "first task only") | OFF, **place, **own).resolved()
        benchmark = load_benchmark(config)
        learner = make_learner(replace(config, amp=pick_amp(config.amp, CPU)), seed, len(benchmark.tasks))
        benchmark = benchmark.at(learner.model.input_size)
        with deterministic(CPU):
            return {"points": learned(learner, benchmark)}


def learned(learner: Learner, benchmark: Benchmark) -> list[Point]:
    """Learns the first task, and measures its update before it is merged."""
    close, points = learner.method.close_task, []
    probe = benchmark.training(0).spread(PROBE)
    before = probed(learner, probe)

    def measured(task: Task) -> TaskReport:
        points.extend(by_share(learner, benchmark, probe, before))
        return close(task)

    with mock.patch.object(learner.method, "close_task", measured):
        progress = Progress(make_bar(0, 0), 1, learner.config.epochs)
        learner.learn(benchmark.training(0), len(benchmark.tasks[0]), progress, lambda epoch: None)
    return points


def by_share(learner: Learner, benchmark: Benchmark, probe: Selection, before: Probed) -> Iterator[Point]:
    """Share, movement and ACC of `HEAD`, the update shrunk from share to share, to nothing at last."""
    within = FeatureStatistics(learner.model.feature_dim)
    within.observe(*before)
    S, last = within.spread(), 1.0
    for share in SHARES:
        learner.method.shrink_update(share / last)
        moved = movement(before[0], probed(learner, probe)[0], S)
        if not math.isfinite(moved):
            raise ValueError("rounding leaves the features no covariance within classes: nothing is measured")
        train, held_out = sides(learner, benchmark)
        yield {"share": share, "movement": moved, "acc": accuracy(HEAD, known_of(train, HEAD), held_out)}
        last = share


@torch.no_grad()
def probed(learner: Learner, probe: Selection) -> Probed:
    """Features and labels of these images in float32, whose rounding is no movement."""
    with mock.patch.object(learner.model, "amp", None):
        learner.model.eval()
        batches = [(learner.model.features(images), labels) for images, labels in learner.clean_batches(probe)]
    features, labels = zip(*batches, strict=True)
    return torch.cat(features), torch.cat(labels)


def table(path: Path) -> str:
    """By rate and share: how many deviations features move (mean), how many points ahead of the frozen backbone."""
    cases = stored(path)
    sets = [data for data in SEEDS if any(case["data"] == data for case in cases)]
    lines = [f"| rate | share merged | {' | '.join(f'{data}: deviations | points ahead' for data in sets)} |"]
    lines.append("|---" * (2 * len(sets) + 2) + "|")
    for lr in RATES:
        of = {data: [case["points"] for case in cases if (case["lr"], case["data"]) == (lr, data)] for data in sets}
        for number, share in enumerate(SHARES[:-1]):
            cells = [point(of[data], number, len(SEEDS[data])) for data in sets]
            lines.append(f"| {lr:g} | {share:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def point(splits: list[list[Point]], number: int, wanted: int) -> str:
    """Two cells of the table, and how many of the wanted splits there are where some are missing."""
    if not splits:
        return "– | –"
    moved = statistics.fmean(points[number]["movement"] for points in splits)
    gained = shown([points[number]["acc"] - points[-1]["acc"] for points in splits])
    return f"{moved:.2f} | {counted(gained, len(splits), wanted)}"


if __name__ == "__main__":
    splits = [{"lr": lr, "data": data, "seed": seed} for lr in RATES for data, seeds in SEEDS.items() for seed in seeds]
    command(__doc__, splits, measure, table)
