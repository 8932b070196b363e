"""The picture of a confusion matrix, readable from 2 classes to hundreds."""

from __future__ import annotations

import warnings
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from janus_ext.reports.plots import INK, MUTED, STYLE, blank_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from janus_ext.reports.evaluation import Evaluation

MOST_NUMBERS = 24  # classes of which every share can be read in its cell
MOST_NAMES = 100  # classes whose names fit beside each other
LONGEST_NAME = 24  # characters
INCHES = (3.0, 10.0)  # least and largest side of the matrix
EMPTY = "#eef0f3"  # rows of classes without images
WHITE_FROM = 30  # per cent from which a number on its cell is white


def save_confusion(evaluation: Evaluation, path: Path) -> None:
    """Draws the matrix as PNG: each row is what the images of one class were taken for, in per cent of them."""
    from matplotlib import style

    with style.context(STYLE), blank_figure() as figure, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names in a script that the font lacks are seen to be boxes
        draw_confusion(figure, evaluation)
        save_figure(figure, path)


def draw_confusion(figure: Figure, evaluation: Evaluation) -> None:
    """Heat map; names where they fit, else numbers as in per_class.csv, from 1 on; lines between tasks."""
    counts = evaluation.confusion.double().numpy()
    classes = len(counts)
    images = counts.sum(1, keepdims=True)
    shares = np.divide(100 * counts, images, out=np.full_like(counts, np.nan), where=images > 0)
    side = min(max(INCHES[0], 0.3 * classes), INCHES[1])
    figure.set_size_inches(side + 2.6, side + 1.9)
    axes = figure.add_subplot()
    axes.set_facecolor(EMPTY)
    span = (0.5, classes + 0.5)
    image = axes.imshow(shares, extent=(*span, *span[::-1]), interpolation="nearest", **_scale())
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if classes <= MOST_NUMBERS:
        _write_shares(axes, shares)
    for last in list(accumulate(evaluation.task_sizes))[:-1]:
        axes.axhline(last + 0.5, color=MUTED, lw=0.6)
        axes.axvline(last + 0.5, color=MUTED, lw=0.6)
    _name_classes(axes, evaluation.class_names, 72 * side / classes)
    figure.suptitle(evaluation.headline().capitalize(), x=0.02, ha="left", size=11.5, weight="bold")
    bar = figure.colorbar(image, ax=axes, label="share of the true class's images (%)", shrink=0.8)
    bar.outline.set_visible(False)


def _scale() -> dict[str, Any]:
    """Colours on the scale of square roots, where a few per cent are seen beside a hundred."""
    from matplotlib.colors import PowerNorm

    return {"cmap": "YlGnBu", "norm": PowerNorm(0.5, 0, 100)}


def _write_shares(axes: Axes, shares: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:
            color = "white" if share > WHITE_FROM else INK
            axes.text(column + 1, row + 1, f"{share:.0f}", ha="center", va="center", size=7.5, color=color)


def _name_classes(axes: Axes, names: tuple[str, ...], height: float) -> None:
    """Names where a row, ``height`` points high, takes one; otherwise numbers of some classes."""
    axes.set(xlabel="taken for", ylabel="class")
    if len(names) > MOST_NAMES:
        axes.set(xlabel="taken for class number", ylabel="class number")
        return
    texts = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in names]
    texts = [text.encode("utf-8", "backslashreplace").decode() for text in texts]
    size = min(8.0, 0.85 * height)
    axes.set_xticks(range(1, len(names) + 1), texts, rotation=90, size=size, parse_math=False)
    axes.set_yticks(range(1, len(names) + 1), texts, size=size, parse_math=False)
