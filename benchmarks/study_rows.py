"""What the study tries: data sets, methods, and a grid of settings for each method."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study_cells import OFF

from janus_ext.config import presets

SELECTION_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
# No grid or rule of choice changes once one has been run. Ten of emoji: after a look at the first five.
FRESH_SEEDS = {"emoji": tuple(range(5, 15)), "glyphs": tuple(range(5, 10)), "fashion-mnist": tuple(range(5, 10))}
HEADS = ("linear", "ncm", "lda", "ridge")  # of every run

TRAINED_BY = {"head": "linear"}  # heads of closed form are fitted beside them
DATA: dict[str, dict[str, Any]] = {
    "emoji": {"benchmark": "emoji", "epochs": 6},
    "glyphs": {"benchmark": "folder", "backbone": "emoji", "epochs": 3, "cache_images": True, "workers": 0},
    "fashion-mnist": {
        "benchmark": "fashion-mnist",
        "backbone": "emoji",
        "epochs": 3,
        "limit_per_class": 250,
        "workers": 0,
    },
}
VALIDATION = {"emoji": 0.33, "glyphs": 0.2, "fashion-mnist": 0.2}  # emoji: two of six drawings, in all styles


Position = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """Settings of a method, each on a ladder of changes, lowest first; it starts with some rungs of each."""

    fixed: dict[str, Any]
    ladders: tuple[list[dict[str, Any]], ...] = ()
    first: tuple[range, ...] = ()

    def start(self) -> list[Position]:
        """The positions that are tried whatever comes out."""
        return list(itertools.product(*self.first))

    def every(self) -> list[Position]:
        """All positions that may come to be tried."""
        return list(itertools.product(*(range(len(ladder)) for ladder in self.ladders)))

    def beside(self, position: Position) -> list[Position]:
        """One rung down or up on one ladder."""
        known = set(self.every())
        steps = [(axis, step) for axis in range(len(position)) for step in (-1, 1)]
        moved = [tuple(at + step * (i == axis) for i, at in enumerate(position)) for axis, step in steps]
        return [place for place in moved if place in known]

    def change(self, position: Position) -> dict[str, Any]:
        """What stands at a position, without what is fixed."""
        return {k: v for ladder, at in zip(self.ladders, position, strict=True) for k, v in ladder[at].items()}


def _ladder(name: str, *values: float) -> list[dict[str, Any]]:
    return [{name: value} for value in values]


def _energies(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"energy_start": start, "energy_end": end} for start, end in pairs]


_OCTAVES = _ladder("lr", 6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
_RATES = {"ladders": (_OCTAVES,), "first": (range(1, 10),)}
_QUARTERS = _ladder("lr", 6.25e-5, 2.5e-4, 1e-3, 4e-3, 1.6e-2, 6.4e-2)
_SHARES = _energies((0.5, 0.7), (0.7, 0.9), (0.97, 0.99), (0.999, 0.9999), (0.9999, 0.99999))
_SHARES_TO_ALL = _energies((0.9, 1), (0.95, 1), (0.98, 1), (0.999, 1), (0.9999, 1))
_MEMORY = {"ladders": (_QUARTERS, _SHARES), "first": (range(2, 5), range(1, 4))}
_BILORA = _ladder("lr", 3.125e-5, 6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 2e-2, 5e-2, 1e-1, 2e-1)
SHIPPED = presets.GUARD | presets.GENTLE["janus", "emoji"]  # what the default head brings along
METHODS: dict[str, Grid] = {
    "janus": Grid({"method": "janus"}, **_MEMORY),
    "janus as shipped": Grid({"method": "janus", "epochs": None} | SHIPPED),  # nothing is tuned, epochs neither
    "lora": Grid({"method": "lora"}, **_RATES),
    "lora-gpm": Grid({"method": "lora-gpm"}, **_MEMORY),
    "inflora": Grid({"method": "inflora"}, (_QUARTERS, _SHARES_TO_ALL), (range(2, 5), range(1, 4))),
    "lora-drs": Grid(
        {"method": "lora-drs", "head": "ncm"} | OFF,
        (_QUARTERS, _ladder("margin_weight", 0.0, 0.05, 0.2, 0.8)),
        (range(1, 4), range(3)),
    ),
    "bilora": Grid({"method": "bilora"}, (_BILORA,), (range(3, 12),)),
    "joint": Grid({"method": "joint"}, **_RATES),
    "first task only": Grid({"method": "lora", "learn": "first"}, **_RATES),  # in which the backbone learns
    "frozen": Grid({"learn": "none"}),  # nothing to tune
    "frozen as shipped": Grid({"learn": "none", "epochs": None}),  # which only heads that are trained can tell from it
}


def _own_runs(change: dict[str, Any], frozen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A head in runs of its own, by method."""
    learners = {method: change | OFF for method in ("janus", "lora", "inflora", "joint", "first task only")}
    shipped = dict.fromkeys(("janus as shipped", "frozen as shipped"), change)
    return learners | shipped | {"frozen": change | frozen}


# Heads that not every run measures, and what their runs are told.
OWN_RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "aligned": _own_runs({"head": "aligned"}, {}),
    "lda 2000": _own_runs({"head": "lda", "head_width": 2000}, {"epochs": None}),
}
ALL_HEADS = (*HEADS, *OWN_RUNS)

# The rows of the paper's ablation but for plain LoRA, as changes of Janus-LoRA.
PAPER: dict[str, dict[str, Any]] = {
    "DML": {"rectify": "none", "estimator": "none"},
    "OE": {"rectify": "project", "margin_weight": 0.0},
    "GR": {"rectify": "tangent", "estimator": "none", "margin_weight": 0.0},
    "OE + GR": {"rectify": "tangent", "margin_weight": 0.0},
    "OE + DML": {"rectify": "project"},
    "OE + GR + DML": {"rectify": "tangent"},
}
# Those and more, each at the setting that was chosen for janus with a head.
ABLATION: dict[str, dict[str, Any]] = {
    "nothing": {"method": "lora"},
    **PAPER,
    "OE + GR, exact": {"margin_weight": 0.0},
    "OE + GR + DML, exact": {},
    "OE + preconditioner, exact": {"margin_weight": 0.0, "preconditioned": True},
    "nothing, drift": {"method": "lora", "drift": "ridge"},
    "OE + GR + DML, exact, drift": {"drift": "ridge"},
    "OE + GR + DML, exact, half merged": {"merge_scale": 0.5},
    "OE + GR + DML, exact, lda of 2000": {"head": "lda", "head_width": 2000} | OFF,  # random features
}


def ablation(chosen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configurations of the ablation's rows, from the one that was chosen for janus."""
    bare = {name: value for name, value in chosen.items() if not name.startswith("energy")}
    forgetful = {name for name, change in ABLATION.items() if "lora" in change.values() or "estimator" in change}
    return {name: (bare if name in forgetful else chosen) | change for name, change in ABLATION.items()}


def chosen_for(method: str, head: str) -> str | None:
    """The head whose trials choose what a method has with `head`; None where it is not measured with it.

    Its own; but "lda 2000" is "lda" of wider features, and where nothing is to tune, one trial is for all heads.
    """
    if head in OWN_RUNS and method not in OWN_RUNS[head]:
        return None
    if head == "aligned" and not METHODS[method].ladders:
        return "linear"
    return "lda" if head == "lda 2000" else head


def candidate(data: str, method: str, position: Position, head: str = "linear") -> tuple[str, dict[str, Any]]:
    """The name of a setting and the configuration that measures `head` there: one for all heads without own runs."""
    grid = METHODS[method]
    change = grid.change(position)
    row = " | ".join([method, ", ".join(f"{k} {v:g}" for k, v in change.items())])
    return row, TRAINED_BY | DATA[data] | grid.fixed | change | OWN_RUNS.get(head, {}).get(method, {})


def titled(row: str, head: str) -> str:
    """The row of a setting in runs for `head`: in its own, where it has such."""
    return f"{row} | {head}" if head in OWN_RUNS else row


def located(data: str, folder: Path | None) -> dict[str, Any]:
    """Where the images lie; the data sets but emoji need to be told."""
    if data == "emoji":
        return {}
    if folder is None:
        raise SystemExit(f"--data-dir: where do the images of {data} lie? See docs/benchmarks.md")
    return {"data_dir": str(folder)}
