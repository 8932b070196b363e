"""Pictures of a finished run, made from ``results.json`` alone, of one size for any number of tasks and layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from janus_ext.reports.table import mean_of_known, measured
from janus_ext.runs.checkpoint import make_folder, replace_file
from janus_ext.runs.metrics import trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

Results = dict[str, Any]
INK, MUTED, ACCENT = "#1f2a37", "#8a94a3", "#c2410c"
TEAL, VIOLET = "#0f766e", "#6d28d9"
FLOOR = 1e-12  # of a logarithmic axis: violations may be 0
MOST_CELLS = 20  # tasks of an accuracy matrix whose numbers can be read
MOST_LABELS = 20  # names beside each other on an axis
TRAJECTORIES = (  # key of the results, what it is called, colour, line width
    ("accuracy_matrix", "all tasks seen so far", ACCENT, 2.0),
    ("accuracy_matrix_task_known", "with the task known", TEAL, 1.4),
    ("task_recognition_matrix", "right task recognised", VIOLET, 1.4),
)
STYLE = {
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e8ec",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def save_plots(results: Results, folder: Path) -> list[Path]:
    """Draws every picture the results allow into ``folder`` and returns the files."""
    from matplotlib import style

    make_folder(folder)
    written = []
    with style.context(STYLE):
        for name, draw in PLOTS.items():
            with blank_figure() as figure:
                if draw(figure, results):
                    path = folder / f"{name}.png"
                    save_figure(figure, path)
                    written.append(path)
    return written


def draw_accuracy_matrix(figure: Figure, results: Results) -> bool:
    """Heat map of the accuracy matrix, with its numbers where they can be read."""
    matrix = results["accuracy_matrix"]
    tasks = len(matrix)
    grid = np.full((tasks, tasks), np.nan)
    grid[np.tril_indices(tasks)] = np.concatenate(matrix)
    columns = min(tasks, MOST_CELLS)
    figure.set_size_inches(max(5.2, 0.56 * columns + 1.8), max(4.2, 0.5 * columns + 1.2))
    axes = figure.add_subplot()
    span = (0.5, tasks + 0.5)
    image = axes.imshow(grid, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto", extent=(*span, *span[::-1]))
    if tasks <= MOST_CELLS:
        for (t, j), value in np.ndenumerate(grid):
            if j <= t:
                color = "white" if value > 55 else INK
                axes.text(j + 1, t + 1, f"{value:.0f}", ha="center", va="center", size=8, color=color)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    _count_tasks(axes.xaxis, tasks)
    _count_tasks(axes.yaxis, tasks)
    axes.tick_params(length=0)
    axes.set(
        xlabel=f"{measured(results)} of task",
        ylabel="after learning task",
        title=_title("Accuracy of every task", results),
    )
    figure.colorbar(image, ax=axes, label="accuracy (%)").outline.set_visible(False)
    return True


def draw_trajectory(figure: Figure, results: Results) -> bool:
    """After each task: accuracy over all seen classes, what it is made of where that is known, and the newest task's.

    With the task known is where the features still tell classes apart; recognition is which task's head wins.
    """
    matrix = results["accuracy_matrix"]
    tasks = range(1, len(matrix) + 1)
    many = len(tasks) > 2 * MOST_CELLS
    dot = "" if many else "o"
    figure.set_size_inches(6.4, 4.4)
    axes = figure.add_subplot()
    ends = []
    for key, label, color, lw in TRAJECTORIES:
        if key in results:
            share = trajectory(results[key])
            axes.plot(tasks, share, color=color, marker=dot, ms=2 * lw + 1, lw=lw, zorder=2 + lw, label=label)
            ends.append((share[-1], color))
    style = {"color": MUTED, "marker": dot, "ms": 3.5, "ls": "-" if many else "--", "lw": 0.5 if many else 1.2}
    axes.plot(tasks, [row[-1] for row in matrix], zorder=1, label="newest task", **style)
    axes.set(xlabel="tasks learned", ylabel=f"share of {measured(results)} (%)", ylim=(0, 103))
    axes.set_title(_title("Accuracy as tasks arrive", results))
    _count_tasks(axes.xaxis, len(tasks))
    axes.set_xlim(1 - 0.03 * len(tasks), len(tasks) * 1.16)
    for (value, color), height in zip(ends, _apart([value for value, _ in ends], 5), strict=True):
        name, weight = ("ACC ", "bold") if color == ACCENT else ("", "normal")
        axes.text(1.02 * len(tasks) + 0.1, height, f"{name}{value:.1f}", color=color, va="center", weight=weight)
    figure.legend(loc="outside lower center", ncols=2)
    return True


def draw_violation(figure: Figure, results: Results) -> bool:
    """How much of each layer's update reaches protected inputs, per task; nothing without a protected basis."""
    tasks = results["violation_per_layer"]
    names = list(dict.fromkeys(name for violation in tasks for name in violation))
    if not names:
        return False
    place = {name: i for i, name in enumerate(names)}
    points = [(place[name], max(v, FLOOR), t + 1) for t, violation in enumerate(tasks) for name, v in violation.items()]
    figure.set_size_inches(6.8, 4.0)
    axes = figure.add_subplot()
    layer, value, task = zip(*points, strict=True)
    dots = axes.scatter(layer, value, c=task, s=20, alpha=0.85, linewidths=0, **_task_scale(len(tasks)))
    means = _means(layer, value, len(names))
    axes.plot(range(len(names)), means, "_", ms=_dash(len(names)), mew=2, color=INK, label="mean over tasks")
    _draw_rounding(axes, results, place)
    axes.set_yscale("log")
    axes.set_ylim(min(1e-8, min(value) / 3), 3)
    _name_layers(axes, names)
    axes.set(
        xlabel="attention block",
        ylabel="violation |ΔW V| / |ΔW|",
        title=_title("Interference with protected inputs", results),
    )
    axes.legend(loc="best")
    _task_bar(figure, axes, dots, len(tasks))
    return True


def draw_similarity(figure: Figure, results: Results) -> bool:
    """Every new class: similarity to its own centre against similarity to the nearest old prototype."""
    points = [
        (own, old, t + 1)
        for t, (owns, olds) in enumerate(zip(results["similarity_own"], results["similarity_old"], strict=True))
        for own, old in zip(owns, olds or [], strict=False)
    ]
    if not points:
        return False
    figure.set_size_inches(6.0, 4.8)
    axes = figure.add_subplot()
    own, old, task = zip(*points, strict=True)
    tasks = len(results["accuracy_matrix"])
    axes.plot([-1, 1], [-1, 1], color=MUTED, lw=1, ls="--")
    dots = axes.scatter(own, old, c=task, s=22, alpha=0.85, linewidths=0, **_task_scale(tasks))
    low = min(0.0, min(own), min(old)) - 0.03
    axes.set(xlim=(low, 1.02), ylim=(low, 1.02), xlabel="cosine to the class's own centre")
    axes.set_ylabel("cosine to the nearest old prototype")
    above = "above the line: nearer to an old class than to its own"
    axes.text(0.02, 0.98, above, transform=axes.transAxes, va="top", color=MUTED, size=8.5)
    danger = mean_of_known(results["danger"])  # of a task over its images, as the table has it
    if danger is not None:
        axes.axhline(danger, color=ACCENT, lw=1.2)
        axes.text(low + 0.015, danger + 0.01, f"danger {danger:.2f}", color=ACCENT, va="bottom")
    axes.set_title(_title("New classes among old ones", results))
    _task_bar(figure, axes, dots, tasks)
    return True


PLOTS = {
    "accuracy_matrix": draw_accuracy_matrix,
    "trajectory": draw_trajectory,
    "violation": draw_violation,
    "similarity": draw_similarity,
}


def short_name(layer: str) -> str:
    """ "blocks.3.attn.qkv" -> "4", "layers.2.blocks.3.attn.qkv" -> "3.4"; a name without a number stays as it is."""
    numbers = [str(int(part) + 1) for part in layer.split(".") if part.isdecimal()]
    return ".".join(numbers) or layer


def _draw_rounding(axes: Axes, results: Results, place: dict[str, int]) -> None:
    """What of each layer's violation the rounding of its weights can be; float32's share of an update where unknown."""
    roundings = results.get("violation_rounding_per_layer", [])
    points = [(place[name], value) for rounding in roundings for name, value in rounding.items() if value > 0]
    if not points:
        axes.axhline(1.2e-7, color=MUTED, lw=1, ls="--", label="float32 rounding")
        return
    means = _means(*zip(*points, strict=True), len(place))
    style = {"ms": _dash(len(place)), "mew": 1.5, "color": MUTED}
    axes.plot(range(len(place)), means, "_", label="rounding of the weights, at most", **style)


def _means(places: tuple[int, ...], values: tuple[float, ...], count: int) -> Any:
    """Mean value of each of ``count`` places, NaN where there is none."""
    sums, counts = (np.bincount(places, weights, count) for weights in (values, None))
    return np.divide(sums, counts, out=np.full(count, np.nan), where=counts > 0)


def _dash(layers: int) -> float:
    """Width of a dash in points, so that those of neighbouring layers do not touch."""
    return min(22.0, 280 / layers)


def _name_layers(axes: Axes, names: list[str]) -> None:
    """Ticks of as many layers as there is room for."""
    every = -(-len(names) // MOST_LABELS)
    axes.set_xticks(range(0, len(names), every), [short_name(name) for name in names[::every]])
    if max(len(short_name(name)) for name in names) > 2:
        axes.tick_params(axis="x", labelsize=7.5, rotation=45)


def _count_tasks(axis: Any, tasks: int) -> None:
    """Every task's number on an axis, or round ones of many."""
    from matplotlib.ticker import MaxNLocator

    numbers = MaxNLocator(10, integer=True).tick_values(1, tasks) if tasks > MOST_CELLS else range(1, tasks + 1)
    axis.set_ticks([int(number) for number in numbers if 1 <= number <= tasks])


def _apart(heights: list[float], least: float) -> list[float]:
    """``heights``, moved upwards as far as it takes to be ``least`` apart: texts beside each other."""
    moved, floor = dict[int, float](), float("-inf")
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        moved[index] = floor = max(heights[index], floor + least)
    return [moved[index] for index in range(len(heights))]


def _title(what: str, results: Results) -> str:
    return f"{what}  ({results['benchmark']}, {results['method']}, seed {results['seed']})"


def _task_scale(tasks: int) -> dict[str, Any]:
    """How a scatter plot colours tasks 1, 2, ...: first task dark."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colors = ListedColormap(colormaps["viridis"](0.92 * np.arange(tasks) / max(tasks - 1, 1)))
    return {"cmap": colors, "norm": BoundaryNorm(np.arange(tasks + 1) + 0.5, tasks)}


def _task_bar(figure: Figure, axes: Axes, dots: PathCollection, tasks: int) -> None:
    """Legend of the task colours."""
    bar = figure.colorbar(dots, ax=axes, label="task", ticks=range(1, tasks + 1, max(1, tasks // 10)))
    bar.solids.set_alpha(1)
    bar.outline.set_visible(False)
    bar.minorticks_off()


@contextmanager
def blank_figure() -> Iterator[Figure]:
    """A figure on the Agg canvas, independent of any window system or global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.clear()


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the picture as PNG."""
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
