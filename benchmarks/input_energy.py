"""What does a share of input energy protect? Of the frozen embedded backbone's inputs, on three data sets.

    python benchmarks/input_energy.py run --glyphs DATA/glyphs --fashion-mnist DATA/fashion-mnist --json FILE
    python benchmarks/input_energy.py table FILE

Energy is uncentred: E |V^T x|^2 / E |x|^2. What tells images apart is how inputs vary, E |x - E x|^2, and an update
moves features by what varies outside V. So for the smallest V that holds a share of the energy it is told how much of
what varies lies outside. Inputs are those of the attention layers that learn, of the training images of all tasks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from random_features import untrained
from splits import Case, command, stored
from study_rows import DATA
from torch import Tensor, nn

ENERGIES = (0.97, 0.99, 0.999, 0.9999)
SEED = 100


def spectrum(gram: Tensor, total: Tensor, rows: int) -> dict[str, Any]:
    """Of one layer, from sum x x^T, sum x and their number: what a direction, the mean and shares of energy hold."""
    energies, directions = torch.linalg.eigh(gram / rows)
    energies, directions = energies.flip(0), directions.flip(1)
    mean = total / rows
    varies = (directions * ((gram / rows - mean.outer(mean)) @ directions)).sum(0)  # in each direction
    held = energies.cumsum(0) / energies.sum()
    free = 1 - varies.cumsum(0) / varies.sum()
    found: dict[str, Any] = {
        "mean": float(mean.square().sum() / energies.sum()),
        "first": float(held[0]),
        "to_vary_3": float(held[int((free > 0.03).sum())]),
    }
    for energy in ENERGIES:
        last = int((held < energy).sum())
        found[str(energy)] = {"directions": last + 1, "free": float(free[last])}
    return found


def measure(case: Case, folder: Path | None) -> Case:
    """`spectrum` of every layer that learns, in float64."""
    learner, benchmark = untrained(case["data"], folder, SEED, learn="all")
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    rows: dict[str, int] = {}

    def watching(name: str, width: int) -> Callable[..., None]:
        sums[name], rows[name] = (torch.zeros(width, width).double(), torch.zeros(width).double()), 0

        def add(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].double().flatten(0, -2)
            sums[name][0].addmm_(x.mT, x)
            sums[name][1].add_(x.sum(0))
            rows[name] += len(x)

        return add

    for name, layer in learner.method.layers.items():
        layer.register_forward_pre_hook(watching(name, layer.in_features))
    with torch.no_grad():
        for task in range(len(benchmark.tasks)):
            for images, _ in learner.clean_batches(benchmark.training(task)):
                learner.model.eval().features(images)
    layers = [{"layer": name, "width": len(sums[name][1])} | spectrum(*sums[name], rows[name]) for name in sums]
    return {"layers": layers}


def table(path: Path) -> str:
    """Means over the layers, by data set, as Markdown."""
    cases = stored(path)

    def row(text: str, spec: str, *keys: str) -> str:
        """A line of the table: what stands under `keys` of a layer."""
        cells = [format(statistics.fmean(reduce(getitem, keys, layer) for layer in c["layers"]), spec) for c in cases]
        return f"| {text} | {' | '.join(cells)} |"

    lines = [f"| of {cases[0]['layers'][0]['width']} directions | {' | '.join(c['data'] for c in cases)} |"]
    lines.append("|" + "---|" * (len(cases) + 1))
    lines += [row("energy of the mean", ".1%", "mean"), row("energy of the first direction", ".1%", "first")]
    for energy in map(str, ENERGIES):
        lines.append(row(f"directions that hold {energy} of the energy", ".0f", energy, "directions"))
        lines.append(row("what varies outside them", ".3%", energy, "free"))
    lines.append(row("energy outside which 3 % of what varies lie", ".4f", "to_vary_3"))
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, [{"data": data} for data in DATA], measure, table)
