"""What a finished run shows: a table for the terminal and pictures, both made from ``results.json`` alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_ext.checkpoint import make_folder, replace_file
from janus_ext.metrics import mean_and_std, trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = dict[str, Any]
HEADLINES = {"acc": "ACC", "maa": "MAA", "bwt": "BWT", "forgetting": "forgetting", "plasticity": "plasticity"}
INK, MUTED, ACCENT = "#1f2a37", "#8a94a3", "#c2410c"
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


def format_table(results: Results) -> str:
    """Accuracy matrix, per-task measurements and headline numbers as text."""
    matrix = results["accuracy_matrix"]
    averages = trajectory(matrix)
    heading = "  ".join(f"{j + 1:>5}" for j in range(len(matrix)))
    lines = [
        f"{results['benchmark']}, method {results['method']}, seed {results['seed']}",
        "",
        "accuracy (%) on the test images of task j after learning task t, over all classes seen so far",
        f"  {'t':>5} \\ j   {heading}    mean",
    ]
    for t, row in enumerate(matrix):
        cells = "  ".join(f"{value:5.1f}" for value in row).ljust(len(heading))
        lines.append(f"  {t + 1:>5}       {cells}   {averages[t]:5.1f}")
    lines += ["", *_task_rows(results), "", *_headlines(results)]
    return "\n".join(lines)


def format_summary(runs: Sequence[Results]) -> str:
    """Mean and deviation over several seeds as text."""
    summary = summarize_runs(runs)
    cells = [f"{HEADLINES[key]} {_mean_std(summary[key])}" for key in HEADLINES]
    return f"{len(runs)} seeds, mean +- standard deviation:  " + "   ".join(cells)


def summarize_runs(runs: Sequence[Results]) -> Results:
    """What ``summary.json`` holds: per metric the mean, the sample deviation (null for one seed) and the values."""
    keys = [*HEADLINES, "acc_sample_weighted", "maa_sample_weighted"]
    head = {key: runs[0][key] for key in ("benchmark", "method")}
    return head | {"seeds": [run["seed"] for run in runs]} | {key: _spread([run[key] for run in runs]) for key in keys}


def save_plots(results: Results, folder: Path) -> list[Path]:
    """Draws every picture the results allow into ``folder`` and returns the files."""
    from matplotlib import style

    make_folder(folder)
    written = []
    with style.context(STYLE):
        for name, draw in PLOTS.items():
            with _figure() as figure:
                if draw(figure, results):
                    path = folder / f"{name}.png"
                    _save(figure, path)
                    written.append(path)
    return written


def draw_accuracy_matrix(figure: Figure, results: Results) -> bool:
    """Heat map of the accuracy matrix."""
    matrix = results["accuracy_matrix"]
    tasks = len(matrix)
    grid = [[row[j] if j < len(row) else float("nan") for j in range(tasks)] for row in matrix]
    figure.set_size_inches(max(5.2, 0.56 * tasks + 1.8), max(4.2, 0.5 * tasks + 1.2))
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    for t, row in enumerate(matrix):
        for j, value in enumerate(row):
            axes.text(j, t, f"{value:.0f}", ha="center", va="center", size=8, color="white" if value > 55 else INK)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(tasks), [str(j + 1) for j in range(tasks)])
    axes.set_yticks(range(tasks), [str(t + 1) for t in range(tasks)])
    axes.tick_params(length=0)
    axes.set(xlabel="tested on task", ylabel="after learning task", title=_title("Accuracy of every task", results))
    figure.colorbar(image, ax=axes, label="accuracy (%)").outline.set_visible(False)
    return True


def draw_trajectory(figure: Figure, results: Results) -> bool:
    """Accuracy over all seen classes, and on the newest task, after each task."""
    matrix = results["accuracy_matrix"]
    tasks = range(1, len(matrix) + 1)
    figure.set_size_inches(6.4, 4.0)
    axes = figure.add_subplot()
    axes.plot(tasks, [row[-1] for row in matrix], "o--", color=MUTED, ms=4, lw=1.3, label="newest task")
    axes.plot(tasks, trajectory(matrix), "o-", color=ACCENT, ms=5, lw=2, label="all tasks seen so far")
    axes.set(xlabel="tasks learned", ylabel="accuracy (%)", ylim=(0, 100), xticks=list(tasks))
    axes.set_title(_title("Accuracy as tasks arrive", results))
    axes.text(tasks[-1], results["acc"], f"  ACC {results['acc']:.1f}", color=ACCENT, va="center", weight="bold")
    axes.set_xlim(0.7, tasks[-1] + 0.16 * len(tasks))
    axes.legend(loc="upper right")
    return True


def draw_violation(figure: Figure, results: Results) -> bool:
    """How much of each layer's update reaches protected inputs, per task; nothing without a protected basis."""
    tasks = [(t, v) for t, v in enumerate(results["violation_per_layer"]) if v]
    if not tasks:
        return False
    names = list(tasks[0][1])
    figure.set_size_inches(6.8, 4.0)
    axes = figure.add_subplot()
    for t, violation in tasks:
        values = [max(violation[name], 1e-12) for name in names]
        axes.plot(
            range(len(names)), values, "o", ms=4.5, color=_task_color(t, len(results["accuracy_matrix"])), alpha=0.85
        )
    means = [max(sum(v[name] for _, v in tasks) / len(tasks), 1e-12) for name in names]
    axes.plot(range(len(names)), means, "_", ms=22, mew=2, color=INK, label="mean over tasks")
    axes.axhline(1.2e-7, color=MUTED, lw=1, ls="--", label="float32 rounding")
    axes.set_yscale("log")
    axes.set_ylim(min(1e-8, min(means) / 10), 3)
    axes.set_xticks(range(len(names)), [_short(name) for name in names])
    axes.set(
        xlabel="attention block",
        ylabel="violation |ΔW V| / |ΔW|",
        title=_title("Interference with protected inputs", results),
    )
    axes.legend(loc="best")
    _task_bar(figure, axes, len(results["accuracy_matrix"]))
    return True


def draw_similarity(figure: Figure, results: Results) -> bool:
    """Every new class: similarity to its own centre against similarity to the nearest old prototype."""
    points = [
        (own, old, t)
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
    axes.scatter(own, old, c=[_task_color(t, tasks) for t in task], s=22, alpha=0.85, linewidths=0)
    low = min(0.0, min(own), min(old)) - 0.03
    axes.set(xlim=(low, 1.02), ylim=(low, 1.02), xlabel="cosine to the class's own centre")
    axes.set_ylabel("cosine to the nearest old prototype")
    above = "above the line: nearer to an old class than to its own"
    axes.text(0.02, 0.98, above, transform=axes.transAxes, va="top", color=MUTED, size=8.5)
    danger = sum(old) / len(old)
    axes.axhline(danger, color=ACCENT, lw=1.2)
    axes.text(low + 0.015, danger + 0.01, f"danger {danger:.2f}", color=ACCENT, va="bottom")
    axes.set_title(_title("New classes among old ones", results))
    _task_bar(figure, axes, tasks)
    return True


PLOTS = {
    "accuracy_matrix": draw_accuracy_matrix,
    "trajectory": draw_trajectory,
    "violation": draw_violation,
    "similarity": draw_similarity,
}


def _task_rows(results: Results) -> list[str]:
    """One line per quantity measured after each task."""
    ranks = [_mean(list(rank.values())) if rank else None for rank in results["basis_rank"]]
    rows = {
        "violation": ("{:5.0e}", results["violation"]),
        "danger": ("{:5.2f}", results["danger"]),
        "basis rank": ("{:5.0f}", ranks),
        "seconds": ("{:5.1f}", results["seconds"]),
    }
    return [
        f"  {name:<10}  " + "  ".join("    -" if v is None else form.format(v) for v in values)
        for name, (form, values) in rows.items()
    ]


def _headlines(results: Results) -> list[str]:
    """The numbers people compare, on one line, and their sample-weighted kin on another."""
    cells = [f"{label} {_number(results[key])}" for key, label in HEADLINES.items()]
    violation, danger = (_mean_of_known(results[key]) for key in ("violation", "danger"))
    cells.append(f"violation {'-' if violation is None else format(violation, '.1e')}")
    cells.append(f"danger {'-' if danger is None else format(danger, '.3f')}")
    weighted = f"ACC {_number(results['acc_sample_weighted'])}   MAA {_number(results['maa_sample_weighted'])}"
    return ["  " + "   ".join(cells), f"  weighted by test images: {weighted}"]


def _spread(values: list[float | None]) -> dict[str, Any]:
    """Mean, deviation and values; all null if a run has no such number."""
    if any(value is None for value in values):
        return {"mean": None, "std": None, "values": values}
    mean, std = mean_and_std(values)
    return {"mean": mean, "std": std, "values": values}


def _mean_std(spread: dict[str, Any]) -> str:
    std = "" if spread["std"] is None else f" +- {spread['std']:.2f}"
    return _number(spread["mean"]) + std


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean_of_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _title(what: str, results: Results) -> str:
    return f"{what}  ({results['benchmark']}, {results['method']}, seed {results['seed']})"


def _short(layer: str) -> str:
    """ "blocks.3.attn.qkv" -> "4"; a name without a number stays as it is."""
    found = re.search(r"\d+", layer)
    return str(int(found.group()) + 1) if found else layer


def _task_color(task: int, tasks: int) -> Any:
    """Colour of a task on the common scale, first task dark."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.92 * task / max(tasks - 1, 1))


def _task_bar(figure: Figure, axes: Axes, tasks: int) -> None:
    """Legend of the task colours."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colors = ListedColormap([_task_color(t, tasks) for t in range(tasks)])
    scale = ScalarMappable(BoundaryNorm([t + 0.5 for t in range(tasks + 1)], tasks), colors)
    bar = figure.colorbar(scale, ax=axes, label="task", ticks=range(1, tasks + 1, max(1, tasks // 10)))
    bar.outline.set_visible(False)
    bar.minorticks_off()


@contextmanager
def _figure() -> Iterator[Figure]:
    """A figure on the Agg canvas, independent of any window system or global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.clear()


def _save(figure: Figure, path: Path) -> None:
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
