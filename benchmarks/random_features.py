"""Which random features help which head? With the frozen backbone, on held-out training images of three data sets.

    python benchmarks/random_features.py run --glyphs DATA/glyphs --fashion-mnist DATA/fashion-mnist --json FILE
    python benchmarks/random_features.py table FILE

Every seed holds out other images and draws another order of the classes and other directions. Features come task by
task, as in a run with `--learn none`; what `--head-width` makes of them stands beside what RanPAC does, and beside what
lies between the two. (RanPAC itself has up to 10,000, and finds the penalty on images that it holds out; here `ridge`
finds it, as ever.) One row has ridge regression of unit features that are not centred.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from splits import Case, command, stored
from study_rows import DATA, VALIDATION, located
from study_tables import counted, shown
from torch import Tensor, nn

from janus_ext.assembly import make_learner
from janus_ext.config import TrainConfig
from janus_ext.data import load_benchmark
from janus_ext.data.benchmark import Benchmark
from janus_ext.heads import HEADS
from janus_ext.heads.expansion import OWN_WEIGHT, Expansion
from janus_ext.heads.knowledge import Knowledge
from janus_ext.heads.ridge import ridge
from janus_ext.heads.statistics import FeatureStatistics
from janus_ext.training.loop import Learner

SEEDS = (100, 101, 102, 103, 104)
Features = list[tuple[Tensor, Tensor]]
Expands = Callable[[Tensor], Tensor]


def ours(first: FeatureStatistics, width: int, seed: int, weight: float = OWN_WEIGHT) -> Expands:
    """Of whitened features; the features themselves with another weight."""
    made = Expansion.of(first, width, seed)
    dim = first.dim

    def expand(f: Tensor) -> Tensor:
        x = made(f)
        return torch.cat([weight / OWN_WEIGHT * x[:, :dim], x[:, dim:]], dim=1) if weight else x[:, dim:]

    return expand


def of_unit_length(first: FeatureStatistics, width: int, seed: int, weight: float = 0.0) -> Expands:
    """relu(f / |f| P); ``weight``: beside f / |f|, brought to the same scale."""
    P = torch.randn(first.dim, width, generator=torch.Generator().manual_seed(seed))

    def expand(f: Tensor) -> Tensor:
        u = F.normalize(f, dim=1)
        x = F.relu(u @ P)
        return torch.cat([weight * first.dim**0.5 * u, x], dim=1) if weight else x

    return expand


def ranpacs(first: FeatureStatistics, width: int, seed: int) -> Expands:
    """relu(f P), as RanPAC has it."""
    P = torch.randn(first.dim, width, generator=torch.Generator().manual_seed(seed))
    return lambda f: F.relu(f @ P)


# name: head, width, what makes the features
VARIANTS: dict[str, tuple[str, int, Callable[..., Expands]]] = {
    "ridge, 2000 (RanPAC's)": ("ridge", 2000, ranpacs),
    "lda, 2000 (RanPAC's)": ("lda", 2000, ranpacs),
    "ridge, 2000 of unit features": ("ridge", 2000, of_unit_length),
    "lda, 2000 of unit features": ("lda", 2000, of_unit_length),
    "lda, 2000 and unit features ten times": ("lda", 2000, lambda *made: of_unit_length(*made, weight=10.0)),
    "lda, 2000 of whitened features alone": ("lda", 2000, lambda *made: ours(*made, weight=0.0)),
    "lda, 2000 and whitened features once": ("lda", 2000, lambda *made: ours(*made, weight=1.0)),
    "**lda, 2000 and whitened features ten times**": ("lda", 2000, ours),
    "lda, 2000 and whitened features thirty times": ("lda", 2000, lambda *made: ours(*made, weight=30.0)),
    "**ridge, 2000 and whitened features ten times**": ("ridge", 2000, ours),
    "lda, 500 and whitened features ten times": ("lda", 500, ours),
    "lda, 4000 and whitened features ten times": ("lda", 4000, ours),
}


CONSTANT = "ridge of unit features and a constant"
ROWS = ["lda", "ridge", CONSTANT, *VARIANTS]


def untrained(data: str, folder: Path | None, seed: int, learn: str = "none") -> tuple[Learner, Benchmark]:
    """A learner of a study's data set that has learned nothing yet, in float32, and its split of the seed."""
    settings = {name: value for name, value in DATA[data].items() if name != "epochs"}
    own = {"validation": VALIDATION[data], "seed": (seed,), "shuffle_classes": True}
    config = TrainConfig(**settings, **located(data, folder), **own, learn=learn, device="cpu", amp="off").resolved()
    benchmark = load_benchmark(config)
    learner = make_learner(config, seed, len(benchmark.tasks))
    return learner, benchmark.at(learner.model.input_size)


@torch.no_grad()
def sides(learner: Learner, benchmark: Benchmark) -> tuple[Features, Features]:
    """The same of a learner's present features; the benchmark's images have its model's size."""
    model = learner.model.eval()
    found = []
    for images_of in (benchmark.training, benchmark.testing):
        batches = [list(learner.clean_batches(images_of(task))) for task in range(len(benchmark.tasks))]
        found.append([(torch.cat([model.features(x) for x, _ in b]), torch.cat([y for _, y in b])) for b in batches])
    return found[0], found[1]


def accuracy(head: str, known: Knowledge, held_out: Features) -> float:
    """ACC of ``head`` behind the last task: the mean over the tasks of the per cent of held-out images it has right."""
    decision = HEADS[head](known)
    return statistics.fmean(100 * float((decision.scores(f).argmax(1) == y).double().mean()) for f, y in held_out)


def ridge_with_a_constant(train: Features, held_out: Features) -> float:
    """ACC of ridge regression of one-hot targets on [f / |f|, 1], whose constant is penalised like the features."""

    def inputs(f: Tensor) -> Tensor:
        return F.pad(F.normalize(f, dim=1), (0, 1), value=1.0).double()

    X = torch.cat([inputs(f) for f, _ in train])
    Y = F.one_hot(torch.cat([y for _, y in train])).double()
    W = ridge(X.mT @ X, X.mT @ Y, total=len(X), rows=len(X)).W
    return statistics.fmean(100 * float(((inputs(f) @ W).argmax(1) == y).double().mean()) for f, y in held_out)


def known_of(train: Features, head: str, width: int | None = None, expand: Expands | None = None, seed: int = 0) -> Any:
    """What is known behind the last task."""
    dim = train[0][0].shape[1]
    known = Knowledge(nn.ModuleList(), dim, torch.device("cpu"), width, head)
    if expand is not None:
        known.expansion = expand
        known.expanded = FeatureStatistics(expand(train[0][0][:1]).shape[1])
    for features, labels in train:
        known.heads.append(nn.Linear(dim, len(labels.unique())))
        known.add(features, labels, seed)
    return known


def measure(case: Case, folder: Path | None) -> Case:
    """ACC of every variant, and of the heads without random features."""
    seed = case["seed"]
    train, held_out = sides(*untrained(case["data"], folder, seed))
    first = known_of(train[:1], "lda").statistics
    plain = known_of(train, "lda")
    found = {head: accuracy(head, plain, held_out) for head in ("lda", "ridge")}
    found[CONSTANT] = ridge_with_a_constant(train, held_out)
    for name, (head, width, expansion) in VARIANTS.items():
        known = known_of(train, head, width, expansion(first, width, seed), seed)
        found[name] = accuracy(head, known, held_out)
    return {"acc": found}


def table(path: Path) -> str:
    """ACC of ``lda``, and how far each of the others is ahead of it, by data set."""
    of = {data: [case["acc"] for case in stored(path) if case["data"] == data] for data in DATA}
    lines = [f"| head, features | {' | '.join(of)} |", "|" + "---|" * (len(of) + 1)]
    for name in ROWS:
        known = [[found for found in splits if name in found] for splits in of.values()]
        cells = [counted(cell(name, splits), len(splits), len(SEEDS)) for splits in known]
        lines.append(f"| {name}{', ACC' if name == 'lda' else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(name: str, splits: list[dict[str, float]]) -> str:
    """A mean for ``lda``, a difference to it for the others."""
    if name == "lda" and splits:
        return f"{statistics.fmean(found[name] for found in splits):.2f}"
    return shown([found[name] - found["lda"] for found in splits])


if __name__ == "__main__":
    command(__doc__, [{"data": d, "seed": seed, "rows": ROWS} for d in DATA for seed in SEEDS], measure, table)
