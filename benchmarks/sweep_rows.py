"""What the sweeps try: rows of fixed sweeps, and the candidates of every method."""

from typing import Any

from study_rows import PAPER

# The seven rows of the paper's ablation, plain LoRA once more at the rate that suits it best, and two exact rows.
ABLATION: dict[str, dict[str, Any]] = {
    "nothing": {"method": "lora", "lr": 1.6e-2},  # Janus-LoRA's rate
    "nothing, at its own best rate": {"method": "lora", "lr": 1.5e-3},  # what the sweep of all methods chose
    **PAPER,
    "OE + GR, exact": {"rectify": "exact", "margin_weight": 0.0},
    "OE + GR + DML, exact": {"rectify": "exact"},
}

# Where the trials started, spelled out so that they stay what they were when the defaults move.
START: dict[str, Any] = {
    "lr": 1e-3,
    "head_lr": 1e-2,
    "epochs": 12,
    "energy_start": 0.7,
    "energy_end": 0.9,
    "damping": 0.1,
    "share": 0.5,
    "balance": True,
    "margin_weight": 0.0,
    "margin": 0.2,
    "temperature": 16.0,
}
PLAIN = {"method": "lora"} | {name: START[name] for name in ("lr", "head_lr", "epochs")}

# One change at a time from START, which is exact rectification without the margin loss; and plain LoRA beside it.
TUNING: dict[str, dict[str, Any]] = {
    "start": START,
    "plain LoRA": PLAIN,
    "head lr 0.005": START | {"head_lr": 5e-3},
    "plain LoRA, head lr 0.005": PLAIN | {"head_lr": 5e-3},
    **{
        f"energy {a:g} to {b:g}": START | {"energy_start": a, "energy_end": b}
        for a, b in ((0.5, 0.7), (0.9, 0.97), (0.97, 0.99))
    },
    **{f"lr {v:g}": START | {"lr": v} for v in (5e-4, 2e-3)},
    **{f"plain LoRA, lr {v:g}": PLAIN | {"lr": v} for v in (5e-4, 2e-3)},
    **{f"DML weight {w:g}": START | {"margin_weight": w} for w in (0.1, 0.5)},
    "DML weight 0.5, margin 0.4": START | {"margin_weight": 0.5, "margin": 0.4},
    "no balance": START | {"balance": False},
    **{f"share {v:g}": START | {"share": v} for v in (0.0, 1.0)},
    **{f"damping {v:g}": START | {"damping": v} for v in (0.01, 1.0)},
}
# Second round: the first showed factors that hardly move at lr 0.001, so every row came out alike.
for _lr in (4e-3, 8e-3):
    TUNING[f"plain LoRA, lr {_lr:g}"] = PLAIN | {"lr": _lr}
    for _start, _end in ((0.7, 0.9), (0.9, 0.97), (0.97, 0.99)):
        TUNING[f"lr {_lr:g}, energy {_start:g} to {_end:g}"] = START | {
            "lr": _lr,
            "energy_start": _start,
            "energy_end": _end,
        }
TUNING["lr 0.004, energy 0.9 to 0.97, DML weight 0.5"] = TUNING["lr 0.004, energy 0.9 to 0.97"] | {"margin_weight": 0.5}
TUNING["lr 0.004, energy 0.9 to 0.97, no balance"] = TUNING["lr 0.004, energy 0.9 to 0.97"] | {"balance": False}
_CHOSEN = TUNING["lr 0.008, energy 0.9 to 0.97"]
for _weight, _margin in ((0.2, 0.2), (0.5, 0.2), (0.5, 0.5)):
    _change = {"margin_weight": _weight, "margin": _margin}
    TUNING[f"lr 0.008, energy 0.9 to 0.97, DML weight {_weight:g}, margin {_margin:g}"] = _CHOSEN | _change
# Third round: the form of the rectification at the chosen rate and energies.
_FINAL = TUNING["lr 0.008, energy 0.9 to 0.97, DML weight 0.5, margin 0.2"]
for _name, _value in (("share", 0.0), ("share", 1.0), ("damping", 0.01), ("damping", 1.0), ("balance", False)):
    TUNING[f"chosen, {_name} {_value:g}"] = _FINAL | {_name: _value}
SWEEPS = {"ablation": ABLATION, "tuning": TUNING}

# Nine candidates for each method: the learning rate, and the setting that matters most beside it.
SELECTION_SEEDS = (100, 101)
_RATES = [{"lr": v} for v in (2.5e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 8e-3, 1.6e-2)]


def _grid(rates: tuple[float, ...], *others: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"lr": lr} | other for lr in rates for other in others]


def _energies(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"energy_start": start, "energy_end": end} for start, end in pairs]


_MEMORY = _grid((2e-3, 8e-3, 1.6e-2), *_energies((0.7, 0.9), (0.9, 0.97), (0.97, 0.99)))
_TRIPLET = _grid((5e-4, 1e-3, 4e-3, 8e-3), {"margin_weight": 0.05}, {"margin_weight": 0.2})
_TRIPLET += [{"lr": 2e-3, "margin_weight": 0.2}]
_GPM = _grid((1e-3, 4e-3, 8e-3, 1.6e-2), *_energies((0.9, 0.97), (0.97, 0.99)))
_GPM += [{"lr": 8e-3, "energy_start": 0.99, "energy_end": 0.999}]
METHODS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "janus": ({"method": "janus"}, _MEMORY),
    "lora": ({"method": "lora"}, _RATES),
    "joint": ({"method": "joint"}, [{"lr": v} for v in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2, 3.2e-2)]),
    "lora-gpm": ({"method": "lora-gpm"}, _GPM),
    "lora-gpm + GR": ({"method": "lora-gpm", "rectify": "exact"}, _MEMORY),
    "inflora": ({"method": "inflora"}, _grid((1e-3, 4e-3, 1.6e-2), *_energies((0.95, 1), (0.98, 1), (0.999, 1)))),
    "lora-drs": ({"method": "lora-drs"}, _TRIPLET),
    "lora-drs + GR": ({"method": "lora-drs", "rectify": "exact"}, _TRIPLET),
    "bilora": ({"method": "bilora"}, [{"lr": v} for v in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 2e-2, 5e-2, 1e-1, 2e-1)]),
    "janus, ncm": ({"method": "janus", "head": "ncm"}, _MEMORY),
    "lora, ncm": ({"method": "lora", "head": "ncm"}, _RATES),
    "frozen, ncm": ({"method": "lora", "head": "ncm", "epochs": 1}, [{"lr": 1e-12}]),  # nothing to tune
}


def candidates(method: str) -> dict[str, dict[str, Any]]:
    """The configurations tried for `method`, by the name of their row."""
    fixed, changes = METHODS[method]
    return {f"{method} | {', '.join(f'{k} {v:g}' for k, v in change.items())}": fixed | change for change in changes}
