"""Every field of the configuration, out of range, of a wrong type, or a name that is none: refused by its flag."""

import dataclasses
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from janus_ext import ContinualLearner
from janus_ext.backbone.network import LARGEST
from janus_ext.config import LearnConfig, TrainConfig, flag
from janus_ext.config.checks import POSITIVE, RANGES
from janus_ext.errors import ArgumentError

HINTS = get_type_hints(TrainConfig)
CONFIGS = {LearnConfig, TrainConfig}
BY_ITSELF = {
    "validation": (0.0, 1.0),
    "milestones": ((0,), (-1, 4)),
    "seed": ((-1,), (0, 0), ()),
    "energy_power": (0, 3),
}
OUT_OF_RANGE = [
    *((name, value) for name, low, high in RANGES for value in (low - 1, 2 * high + 1)),
    *((name, value) for name in POSITIVE for value in (0, -1, -0.0, 1e-300, 1e39, 1e300)),
    *((name, value) for name, values in BY_ITSELF.items() for value in values),
    *(("save_every", value) for value in ("0", "", "-1", "1.5", "m", "0m", "10 m", "10h", "1e3")),
]
STRANGE = [object(), b"8", {1, 2}, print, 3 + 4j, [[1]]]
NAMES = [  # a slip, and what it should have been
    ("method", "januss", "janus"), ("benchmark", "domainet", "domainnet"), ("head", "lad", "lda"),
    ("targets", ("k", "fc11"), "fc1"), ("domains", "reel", "real"), ("split", "cods", "coda"),
    ("rectify", "exat", "exact"), ("estimator", "grm", "gram"), ("gpm", "duel", "dual"), ("learn", "frist", "first"),
    ("drift", "rigde", "ridge"), ("normalize", "modle", "model"), ("head_init", "smal", "small"),
    ("optimizer", "adan", "adam"), ("schedule", "cosin", "cosine"), ("amp", "bf6", "bf16"), ("preset", "papr", "paper"),
]  # fmt: skip


def _numbers(hint: Any) -> bool:
    return hint in (int, float) or any(map(_numbers, get_args(hint)))


def _choices(hint: Any) -> bool:
    return "Literal" in str(hint)


def test_every_number_has_a_range_and_every_choice_a_slip() -> None:
    """A new field needs a line here."""
    numbers = {name for name, hint in HINTS.items() if _numbers(hint)}
    assert numbers <= {name for name, _ in OUT_OF_RANGE}
    assert {name for name, hint in HINTS.items() if _choices(hint)} - {"energy_power"} <= {name for name, *_ in NAMES}


def test_integers_of_numpy_are_integers() -> None:
    config = TrainConfig(energy_power=np.int64(2), rank=np.int32(4)).resolved()
    assert (config.energy_power, config.rank) == (2, 4) and type(config.energy_power) is type(config.rank) is int


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_refused(name: str, value: Any) -> None:
    needed = {"schedule": "step"} if name == "milestones" else {}
    with pytest.raises(ArgumentError, match=rf"^{flag(name)}\b.*(must|needs).*got ") as refusal:
        TrainConfig(**{name: value}, **needed).resolved()
    assert "\n" not in str(refusal.value)


def test_no_image_is_larger_than_a_file_may_ask_for() -> None:
    assert next(high for name, _, high in RANGES if name == "image_size") == LARGEST


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400], ids=str)
@pytest.mark.parametrize("name", [name for name, hint in HINTS.items() if float in (hint, *get_args(hint))])
def test_numbers_are_finite(name: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=f"^{flag(name)} must "):
        TrainConfig(**{name: value}).resolved()


@pytest.mark.parametrize(
    "value", [object(), b"8", {1, 2}, print, 3 + 4j, [[1]]], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
def test_a_value_of_a_wrong_type_is_refused(name: str, value: Any) -> None:
    for config in CONFIGS:
        if name in config.__dataclass_fields__:
            with pytest.raises(ArgumentError, match=f"^{flag(name)} must be .*, got ") as refusal:
                config(**{name: value})
            assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("name", "value", "meant"), NAMES, ids=[name for name, *_ in NAMES])
def test_an_unknown_name_comes_with_the_nearest(name: str, value: Any, meant: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^{flag(name)} must be .*; similar: ({meant}|.*, {meant})\b"):
        TrainConfig(**{name: value}).resolved()


def test_an_unknown_setting_comes_with_the_nearest() -> None:
    for slip, meant in (("hed", "head"), ("epoch", "epochs"), ("estimator_rnk", "estimator_rank")):
        with pytest.raises(ArgumentError, match=f"a learner has no setting '{slip}'; similar: .*{meant}"):
            ContinualLearner(**{slip: 1})
