"""States within a task whose seals are right and whose contents nobody wrote, as a stranger may hand them on: --resume
refuses them in a line. A tensor of another shape would have the optimizer read and write beside it.
"""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resuming_within import STEPS, signalled, trainer_of
from torch import Tensor

from janus_ext.errors import CheckpointError, Interrupted
from janus_ext.runs import checkpoint
from janus_ext.training.underway import State

CASES: dict[str, dict[str, Any]] = {
    "janus": {},
    "isvd, sgd": {"estimator": "isvd", "estimator_rank": 12, "optimizer": "sgd"},
    "fp16, adamw": {"amp": "fp16", "optimizer": "adamw"},
    "inflora": {"method": "inflora"},
    "lora-gpm": {"method": "lora-gpm"},
    "lora-drs": {"method": "lora-drs", "energy_start": 0.6, "energy_end": 0.6},
    "bilora": {"method": "bilora", "frequencies": 20},
}
TENSORS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda tensor: None,
    "scalar": lambda tensor: torch.zeros((), dtype=tensor.dtype),
    "longer": lambda tensor: torch.zeros(tensor.numel() + 1, dtype=tensor.dtype),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "integers": lambda tensor: tensor.to(torch.int16),
    "not finite": lambda tensor: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else None,
}
HUGE = 10**400  # JSON has such numbers, floats have not
NUMBERS: list[dict[str, Any]] = [
    *({"seconds": value} for value in (-1, HUGE, "5", None, float("nan"))),
    *({"progress": {"seconds": value}} for value in (-1e9, HUGE, "5", float("inf"))),
    *({"progress": {"totals": value}} for value in ([1, 1, -8], [0, 0, 0], [1, 9, 8], [1, -1, 8], [1e308, 0, 1e-300])),
    *({"progress": {"totals": value}} for value in ([HUGE, 1, 8], ["1", 1, 8], [1, 8], None)),
    *({"progress": {"step": value}} for value in (0, 3, -1, 1.0, "1", None)),
    *({"versions": value} for value in (7, "x", [])),
    *({"epoch": value} for value in (3, -1, True, "1")),
    *({"step": value} for value in (5, -1, 1.5)),
    {"epoch": 3, "step": 1},
]
OF_SCALER = [
    *({"scaler": {"scale": value}} for value in (0, -1, "x", HUGE, float("inf"), 10**300)),
    *({"scaler": {"_growth_tracker": value}} for value in (-1, 10**30, 1.5, "x", None)),
    {"scaler": None},
]


@pytest.fixture(scope="module")
def cut(patterns, weights, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a case's run, cut off behind the second step of its third epoch, the first that observes."""
    made: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp("cut") / "run"
            with pytest.MonkeyPatch.context() as patched:
                signalled(patched, STEPS - 2, signal.SIGTERM)
                with pytest.raises(Interrupted):
                    trainer_of(patterns, weights, made[case], **CASES[case]).run()
        return made[case]

    return folder


@pytest.fixture
def resumed(patterns, weights, tmp_path, cut) -> Callable[..., None]:
    """Goes on with a copy of a case's run, in whose state `change` has altered the tensors or the numbers."""

    def resume(case: str, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(cut(case), tmp_path / "run")
        path = tmp_path / "run" / "checkpoints" / "within.safetensors"
        tensors, about = checkpoint.read_tensors(path)
        state = json.loads(about["state"])
        change(tensors, state)
        del about[checkpoint.SHA256]
        checkpoint.write_tensors(path, tensors, about | {"state": json.dumps(state)})
        trainer = trainer_of(patterns, weights, tmp_path / "run", **CASES[case])
        trainer.restore()
        trainer.run()

    return resume


def merged(state: dict[str, Any], change: dict[str, Any]) -> None:
    for name, value in change.items():
        if isinstance(value, dict) and isinstance(state.get(name), dict):
            merged(state[name], value)
        else:
            state[name] = value


@pytest.mark.parametrize("case", CASES)
def test_as_it_was_written_it_is_taken(resumed, case):
    resumed(case, lambda tensors, state: None)


@pytest.mark.parametrize("how", TENSORS)
@pytest.mark.parametrize("case", CASES)
def test_a_tensor_of_another_kind_is_refused(cut, resumed, case, how):
    names = checkpoint.read_tensors(cut(case) / "checkpoints" / "within.safetensors")[0]
    taken = []
    for name, tensor in names.items():
        forged = TENSORS[how](tensor)
        if forged is not None and forged.shape == tensor.shape and forged.dtype == tensor.dtype:
            continue  # a scalar in a scalar's place
        if how in ("integers", "not finite") and name.startswith("method."):
            continue  # statistics are read as numbers, whatever holds them, and looked at with those of the steps
        if how == "missing" and name.endswith("momentum_buffer") or how == "not finite" and forged is None:
            continue  # a momentum begins with 0; random states are whole numbers
        changed = {} if forged is None else {name: forged}
        try:
            resumed(case, lambda tensors, _, name=name, changed=changed: (tensors.pop(name), tensors.update(changed)))
            taken.append(name)
        except CheckpointError as error:
            assert "\n" not in str(error) and "within" in str(error)
    assert not taken


def test_momenta_may_be_missing(resumed):
    """As of a parameter without a gradient; a fused step takes None of some parameters for an error."""
    resumed("isvd, sgd", lambda tensors, _: tensors.pop("optimizer.0.momentum_buffer"))


@pytest.mark.parametrize("change", NUMBERS, ids=lambda change: f"{change}"[:40])
def test_a_number_that_cannot_be_is_refused(resumed, change):
    with pytest.raises(CheckpointError, match="within") as caught:
        resumed("janus", lambda tensors, state: merged(state, change))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("change", OF_SCALER, ids=lambda change: f"{change}"[:40])
def test_a_scale_that_cannot_be_is_refused(resumed, change):
    with pytest.raises(CheckpointError, match="within"):
        resumed("fp16, adamw", lambda tensors, state: merged(state, change))


def test_settings_of_the_scaler_are_its_own(resumed):
    """They never change: what a file says of them is not read."""
    change = {"scaler": {"growth_factor": "x", "growth_interval": 0}}
    resumed("fp16, adamw", lambda tensors, state: merged(state, change))


def test_moments_of_no_parameter_are_refused(resumed):
    for index in ("-1", "99", "x"):
        with pytest.raises(CheckpointError, match="within"):
            resumed("janus", lambda state, _, name=f"optimizer.{index}.step": state.update({name: torch.zeros(())}))
    with pytest.raises(CheckpointError, match=r"optimizer\.0 has exp_avg, exp_avg_sq, max_exp_avg_sq, step"):
        resumed("janus", lambda state, _: state.update({"optimizer.0.max_exp_avg_sq": state["parameters.0"]}))


@pytest.mark.parametrize("name", ["optimizer.0.step", "optimizer.0.exp_avg_sq"])
def test_what_is_a_count_or_a_square_is_not_negative(resumed, name):
    with pytest.raises(CheckpointError, match=f"{name} is negative"):
        resumed("janus", lambda state, _: state.update({name: state[name] - 99}))


def test_a_state_that_is_nested_too_deep_is_none(patterns, weights, tmp_path, cut):
    shutil.copytree(cut("janus"), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "within.safetensors"
    tensors, about = checkpoint.read_tensors(path)
    del about[checkpoint.SHA256]
    checkpoint.write_tensors(path, tensors, about | {"state": "[" * 100_000})
    with pytest.raises(CheckpointError, match=r"within\.safetensors holds no state"):
        trainer_of(patterns, weights, tmp_path / "run").restore()


def test_a_task_without_epochs_has_no_state():
    with pytest.raises(CheckpointError, match="0 epochs"):
        State({}, {"epoch": 0, "step": 0, "seconds": 1.0}).check(0, 0)
