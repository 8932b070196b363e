"""What the study tries: data sets, methods, and nine candidates for each method on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SELECTION_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
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


def _grid(rates: tuple[float, ...], *others: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"lr": lr} | other for lr in rates for other in others]


def _energies(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"energy_start": start, "energy_end": end} for start, end in pairs]


_RATES = [{"lr": v} for v in (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)]
_MEMORY = _grid((1e-3, 4e-3, 1.6e-2), *_energies((0.7, 0.9), (0.97, 0.99), (0.999, 0.9999)))
METHODS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "janus": ({"method": "janus"}, _MEMORY),
    "janus + guard": ({"method": "janus", "drift_budget": 0.1}, _MEMORY),
    "lora": ({"method": "lora"}, _RATES),
    "lora + guard": ({"method": "lora", "drift_budget": 0.1}, _RATES),
    "lora-gpm": ({"method": "lora-gpm"}, _MEMORY),
    "inflora": ({"method": "inflora"}, _grid((1e-3, 4e-3, 1.6e-2), *_energies((0.95, 1), (0.98, 1), (0.999, 1)))),
    "lora-drs": (
        {"method": "lora-drs", "head": "ncm"},
        _grid((2.5e-4, 1e-3, 4e-3), *({"margin_weight": w} for w in (0.0, 0.05, 0.2))),
    ),
    "bilora": ({"method": "bilora"}, [{"lr": v} for v in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 2e-2, 5e-2, 1e-1)]),
    "joint": ({"method": "joint"}, _RATES),
    "first task only": ({"method": "lora", "learn": "first"}, _RATES),  # in which the backbone learns
    "frozen": ({"learn": "none"}, [{}]),  # nothing to tune
}
OFF = {"drift_budget": 1e9}  # the guard, which --head aligned would bring along
ALIGNED: dict[str, dict[str, Any]] = {
    **{method: {"head": "aligned"} | OFF for method in ("janus", "lora", "inflora")},
    **{method: {"head": "aligned"} for method in ("joint", "frozen")},  # which have no guard
}

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
    "OE + GR + DML, exact, ridge of 2000": {"head": "ridge", "head_width": 2000} | OFF,  # random features
}


def ablation(chosen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configurations of the ablation's rows, from the one that was chosen for janus."""
    bare = {name: value for name, value in chosen.items() if not name.startswith("energy")}
    forgetful = {name for name, change in ABLATION.items() if "lora" in change.values() or "estimator" in change}
    return {name: (bare if name in forgetful else chosen) | change for name, change in ABLATION.items()}


def candidates(data: str, method: str) -> dict[str, dict[str, Any]]:
    """The configurations tried for `method` on a data set, by the name of their row."""
    fixed, changes = METHODS[method]
    return {
        " | ".join([method, ", ".join(f"{k} {v:g}" for k, v in change.items())]): TRAINED_BY
        | DATA[data]
        | fixed
        | change
        for change in changes
    }


def located(data: str, folder: Path | None) -> dict[str, Any]:
    """Where the images lie; the data sets but emoji need to be told."""
    if data == "emoji":
        return {}
    if folder is None:
        raise SystemExit(f"--data-dir: where do the images of {data} lie? See docs/benchmarks.md")
    return {"data_dir": str(folder)}
