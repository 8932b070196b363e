"""What does a share of input energy protect? Of the frozen embedded backbone's inputs, on three data sets.

    python benchmarks/input_energy.py run --glyphs DATA/glyphs --fashion-mnist DATA/fashion-mnist [--json FILE]
    python benchmarks/input_energy.py table FILE

Energy is uncentred: E |V^T x|^2 / E |x|^2. What tells images apart is how inputs vary, E |x - E x|^2, and an update
moves features by what varies outside V. So for the smallest V that holds a share of the energy it is told how much of
what varies lies outside. Inputs are those of the attention layers that learn, of the training images of all tasks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from random_features import untrained
from run import about, new_file, write
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


def measure(data: str, folder: Path | None) -> list[dict[str, Any]]:
    """`spectrum` of every layer that learns, in float64."""
    learner, benchmark = untrained(data, folder, SEED, learn="all")
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
    return [{"layer": name, "width": len(sums[name][1])} | spectrum(*sums[name], rows[name]) for name in sums]


def table(path: Path) -> str:
    """Means over the layers, by data set, as Markdown."""
    cases = json.loads(path.read_text())["cases"]

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure all of them")
    run.add_argument("--glyphs", type=Path, required=True, help="folder of the images")
    run.add_argument("--fashion-mnist", type=Path, required=True, help="folder of the files")
    run.add_argument("--json", type=new_file, help="where to keep what was measured")
    commands.add_parser("table", help="print a JSON file as Markdown").add_argument("file", type=Path)
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.file))
        return
    result: dict[str, Any] = {"about": about("cpu"), "cases": []}
    for data, folder in (("emoji", None), ("glyphs", options.glyphs), ("fashion-mnist", options.fashion_mnist)):
        result["cases"].append({"data": data, "layers": measure(data, folder)})
        print(data, flush=True)
        if options.json is not None:
            write(options.json, result)


if __name__ == "__main__":
    main()
