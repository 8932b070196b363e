"""Settings from Python: brought to the types of their fields where the meaning is clear, else refused by name."""

import dataclasses
import re
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import numpy as np
import pytest

from janus_ext import train
from janus_ext.config import Domain, TrainConfig
from janus_ext.config.annotations import fit
from janus_ext.errors import ArgumentError

FIELDS = dataclasses.fields(TrainConfig)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"seed": 0}, (0,)),
        ({"seed": [0, 1]}, (0, 1)),
        ({"seed": range(3)}, (0, 1, 2)),
        ({"seed": np.int64(4)}, (4,)),
        ({"data_dir": "x"}, Path("x")),
        ({"output": "y"}, Path("y")),
        ({"split_files": ["a.yaml", Path("b.yaml")]}, (Path("a.yaml"), Path("b.yaml"))),
        ({"weights": Path("w.safetensors")}, "w.safetensors"),
        ({"domains": "real"}, ("real",)),
        ({"domains": ["real", "sketch"]}, ("real", "sketch")),
        ({"milestones": 4}, (4,)),
        ({"lr": 1}, 1.0),
        ({"lr": np.float32(0.5)}, 0.5),
        ({"rank": None}, None),
    ],
)
def test_what_is_clear_becomes_the_fields_type(given, wanted):
    [name] = given
    value = getattr(TrainConfig(**given), name)
    assert value == wanted and type(value) is type(wanted)
    if isinstance(value, tuple):
        assert [type(item) for item in value] == [type(item) for item in wanted]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": "8"}, "--rank must be a whole number, or None, got '8'"),
        ({"epochs": 2.5}, "--epochs must be a whole number, or None, got 2.5"),
        ({"rank": True}, "--rank must be a whole number, or None, got True"),
        ({"accumulate": None}, "--accumulate must be a whole number, got None"),
        ({"lr": "0.1"}, "--lr must be a number, or None, got '0.1'"),
        ({"seed": "0"}, "--seed must be a list, each item a whole number, or None, got '0'"),
        ({"seed": [0, None]}, "--seed must be a list, each item a whole number, or None, got [0, None]"),
        ({"compile": 1}, "--compile must be True or False, got 1"),
        ({"output": 3}, "--output must be a path, or None, got 3"),
        ({"device": 0}, "--device must be text, got 0"),
        ({"energy_power": 3}, "--energy-power must be one of 1, 2, or None, got 3"),
        ({"energy_power": True}, "--energy-power must be one of 1, 2, or None, got True"),
        ({"method": 3}, "--method must be text, got 3"),
        ({"own": {3: 4}}, "--own must be values by name, or None, got an object of type dict"),
        ({"domains": "reel"}, f"--domains must be a list, each item one of {', '.join(get_args(Domain))}, got 'reel'"),
    ],
)
def test_what_is_not_clear_is_refused_by_name(given, message):
    with pytest.raises(ArgumentError) as refusal:
        TrainConfig(**given)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


def test_every_fields_annotation_has_its_rule():
    """A value of no type at all is refused in every field, and every default is left as it is."""
    for hint in get_type_hints(TrainConfig).values():
        with pytest.raises(TypeError, match="must be "):
            fit(hint, object())
    assert all(getattr(TrainConfig(), field.name) == field.default for field in FIELDS)


def test_an_annotation_without_a_rule_is_the_programs_own_mistake():
    with pytest.raises(NotImplementedError, match="dict"):
        fit(dict[str, int], {})
    assert fit(Literal["a", 2] | None, 2) == 2


def test_no_seed_is_below_zero(tmp_path, capsys):
    assert train.main(["--seed", "0", "-1", "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "janus_ext.train: --seed needs one or more different numbers from 0 on, got [0, -1]\n"
    )


def test_help_says_what_holds_where_a_flag_is_left_out(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    words = " ".join(re.sub(r"[│\s]+", " ", capsys.readouterr().out).split())
    assert "None)" not in words and "(default: )" not in words
    assert "(default: emoji)" in words and "(default: 0.1)" in words
