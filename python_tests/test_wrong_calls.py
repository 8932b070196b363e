"""Random calls of every public function, class and method, most of them wrong.

A call is refused by an exception of ours, or of PyTorch's dispatcher, that names the function or object and the
argument in one line; no input has changed, nor the memory around it, nor the object; and a right call behind it gives
the right value. Or it is accepted, and its result is that of plain copies of its inputs.

So many calls of each name as JANUS_EXT_CALLS says, the same ones in every run, by default a few. All 10,000, in some
hours of a core:

    JANUS_EXT_CALLS=10000 python -m pytest -q -n auto --dist worksteal python_tests/test_wrong_calls.py
"""

import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOLERANCE, relative_error
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from public_calls import ELSEWHERE, ON_GPU, RIGHT, Right, public_names
from strategies import HUGE, calls, difference, flat, picture, plain, readable, stored
from test_ops import sample_inputs
from torch import Tensor, nn

from janus_ext import FeatureStatistics, LoRALinear, ops, reference
from janus_ext.errors import ArgumentError, JanusError, on_one_line

CALLS = int(os.environ.get("JANUS_EXT_CALLS", "25"))
SETTINGS = settings(
    max_examples=CALLS,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    verbosity=Verbosity.quiet,
    suppress_health_check=list(HealthCheck),
)
WANTED = (
    r"must|needs?|presumes|belongs?|wanted|has no|no such|is no|is missing|(is|are) none|is a|name another"
    "|cannot be read|choose another|that count as"
)
FINITE = 1e12  # of inputs beyond it, and of NaN, nothing is asked but that they crash nothing


def test_every_public_name_is_called() -> None:
    """A new one needs a right call in public_calls.RIGHT, or a reason in ELSEWHERE."""
    assert not RIGHT.keys() & ELSEWHERE.keys()
    assert public_names() == RIGHT.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("name", RIGHT)
def test_random_calls(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where names of folders lead
    _examine_random_calls(name, RIGHT[name])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ON_GPU)
def test_random_calls_on_a_gpu(name: str) -> None:
    _examine_random_calls(name, ON_GPU[name])
    torch.cuda.synchronize()


def test_what_no_memory_holds_is_refused() -> None:
    x = torch.zeros(1, 12).expand(2**38, 12)
    for function in (torch.ops.janus_ext.gram_update_, reference.gram_update_):
        with pytest.raises(
            ValueError, match=r"^gram_update_: x must have fewer than 2\^40 elements, got \[27487790694"
        ):
            function(torch.eye(12), x)


def test_a_number_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ArgumentError, match="^LoRALinear: scale must be finite and .*, got an integer of 1,329"):
        LoRALinear(nn.Linear(4, 4), 2, scale=10**400)


def test_floats_of_eight_bits_are_refused() -> None:
    features = torch.ones(2, 4).to(torch.float8_e4m3fn)
    known = FeatureStatistics(4)
    with pytest.raises(ArgumentError, match="features must be floating"):
        known.observe(features, torch.tensor([0, 1]))
    assert known.rows == 0


def test_halves_of_pairs_are_escaped() -> None:
    assert on_one_line("a\udcff\n") == "a\\udcff\\n"


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ([1.0, 2.0], lambda value: value.pop()),
        ({"a": [1]}, lambda value: value["a"].append(2)),
        ({"a": 1, "b": 2}, lambda value: value.update(a=value.pop("a"))),  # the order
        ((np.zeros(3),), lambda value: value[0].fill(1)),
        ([torch.zeros(3)], lambda value: value.append(torch.zeros(3))),
        ([torch.zeros(3)], lambda value: value[0].requires_grad_()),
        (nn.Linear(2, 2), lambda value: value.eval()),
    ],
)
def test_a_change_of_any_kind_is_seen(value: Any, change: Callable[[Any], Any]) -> None:
    before = picture(value)
    assert not difference(before, picture(value))
    change(value)
    assert difference(before, picture(value))


@pytest.mark.parametrize("op", [op for op in ops.OPS if op != "rectify_"])
def test_none_for_the_first_tensor_is_refused(device: str, op: str) -> None:
    """On a GPU, too, where that is the tensor whose device an op runs on."""
    sample = sample_inputs(op, device)[0]
    name = next(iter(sample))
    with pytest.raises(TypeError, match=f"^{op}: {name} must be .*, got None$"):
        getattr(torch.ops.janus_ext, op)(**{**sample, name: None})


def _examine_random_calls(name: str, make: Callable[[], Right]) -> None:
    refused = accepted = 0

    @SETTINGS
    @given(st.data())
    def examine(data: st.DataObject) -> None:
        nonlocal refused, accepted
        right = _seeded(make)
        arguments, strange = data.draw(calls(right.arguments))
        try:
            was_refused = _examine(make, right, arguments)
        except Exception as error:
            raise AssertionError(f"{name}, {_described(arguments, strange)}: {error}") from error
        refused, accepted = refused + was_refused, accepted + (not was_refused)

    right = _seeded(make)
    right.call(**right.arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        examine()
    print(f"{name}: {refused} refused, {accepted} accepted")
    assert refused > 0


def _seed(number: int) -> None:
    """torch.manual_seed without the devices that are not there: for each of them it keeps a picture of the stack."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(number)


def _seeded(make: Callable[[], Right]) -> Right:
    _seed(0)
    return make()


def _examine(make: Callable[[], Right], right: Right, arguments: dict[str, Any]) -> bool:
    """Whether a call is refused; either way all that is asked of it holds."""
    held, copies = (arguments, right.owner), plain(arguments)
    before, memory = picture(held), [memory.clone() for memory in stored(held)]
    read = {key: value for key, value in arguments.items() if key not in right.written}
    read_before = picture(read)
    _seed(1)
    try:
        result = right.call(**arguments)
    except Exception as error:
        _assert_names_what_is_wrong(right, arguments, error)
        assert not (changed := difference(before, picture(held))), f"an input or the object has changed: {changed}"
        _assert_still_right(make, right)
        return True
    assert not (changed := difference(read_before, picture(read))), f"an input has changed: {changed}"
    _assert_written_within(right, arguments, copies, memory)
    if _is_comparable(right, arguments):
        _assert_as_on_plain_copies(make, right, arguments, copies, result)
    return False


# refused --------------------------------------------------------------------------------------------------------------
def _assert_names_what_is_wrong(right: Right, given: dict[str, Any], error: Exception) -> None:
    text, who = str(error), (*right.who, *_names_in(given))
    if _cannot_be_decoded(right, given, error):
        return
    arguments = "|".join(map(re.escape, (*right.arguments, *right.names)))
    assert re.search(rf"\b({arguments})\b", text), f"no argument is named in {text}"
    if any(f"janus_ext::{op}() " in text for op in right.who):  # PyTorch's dispatcher, before anything of ours has run
        return
    assert isinstance(error, JanusError | ValueError | TypeError), f"neither ours nor the dispatcher's: {error!r}"
    assert text.startswith(who), f"who refuses is not named in {text}"
    assert "\n" not in text, f"more than a line in {text}"
    assert re.search(WANTED, text), f"what was wanted is not said in {text}"


def _cannot_be_decoded(right: Right, given: dict[str, Any], error: Exception) -> bool:
    """Whether PyTorch's binding of a raw op was given bytes for a text that are none: of that it says nothing else."""
    is_raw = right.reference is not None
    return is_raw and isinstance(error, UnicodeDecodeError) and error.object in given.values()


def _names_in(given: dict[str, Any]) -> list[str]:
    """What a call names its layers."""
    return [on_one_line(str(name)) for value in given.values() if isinstance(value, dict) for name in value]


def _assert_still_right(make: Callable[[], Right], right: Right) -> None:
    """A right call of the same object gives what it gives of a new one."""
    results = []
    for used in (right, _seeded(make)):
        _seed(1)
        results.append(_outcome(right, used.arguments, used.call(**used.arguments), used.owner))
    assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*results, strict=True)), "no longer right"


# accepted -------------------------------------------------------------------------------------------------------------
def _assert_written_within(right: Right, arguments: dict[str, Any], copies: Any, before: list[Tensor]) -> None:
    """Of the memory behind what is written, nothing has changed but the elements themselves."""
    written = {id(tensor) for key in right.written for tensor in flat(arguments[key])}
    for tensor, old, memory in zip(readable(arguments), readable(copies), before, strict=False):
        if id(tensor) in written:
            memory_now = stored(tensor)[0].clone().untyped_storage()
            restored = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(memory_now)
            restored.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(old)
            assert torch.equal(stored(restored)[0], memory), "memory around an argument has changed"


def _is_comparable(right: Right, arguments: dict[str, Any]) -> bool:
    """Whether what was made strange is numbers, all of them finite, and no more than memory holds."""
    strange = [value for key, value in arguments.items() if value is not right.arguments[key]]
    tensors = [t for t in flat(strange) if t.numel()]
    return all(map(_is_data, strange)) and all(map(_is_moderate, tensors))


def _is_moderate(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() < HUGE and bool(_size(tensor) < FINITE)


def _size(tensor: Tensor) -> Tensor:
    return (tensor if tensor.is_complex() else tensor.double()).abs().amax()


def _is_data(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    return value is None or isinstance(value, (Tensor, int, float, str))


def _assert_as_on_plain_copies(
    make: Callable[[], Right], right: Right, arguments: dict[str, Any], copies: Any, result: Any
) -> None:
    """The result is that of the reference, or of the same call, on copies that lie in memory element after element."""
    fresh = _seeded(make)
    inputs = {k: fresh.arguments[k] if v is right.arguments[k] else copies[k] for k, v in arguments.items()}
    has_options = all(v is right.arguments[k] or _of_tensors(right.arguments[k]) for k, v in arguments.items())
    call = fresh.reference if fresh.reference and has_options else fresh.call
    shown = plain(inputs)
    _seed(1)
    outcome = _outcome(right, shown, result, right.owner, arguments)
    wanted = _outcome(right, shown, call(**inputs), fresh.owner, inputs)
    dtypes = [tensor.dtype for tensor in flat((arguments, result)) if tensor.is_floating_point()]
    tolerance = max((TOLERANCE.get(dtype, 0) for dtype in dtypes), default=0)
    for got, want in zip(outcome, wanted, strict=True):
        assert got.dtype == want.dtype
        error = relative_error(got, want)
        assert not error > 20 * tolerance, f"a result of {list(got.shape)} is off by {error:.2g}"


def _of_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and all(isinstance(item, Tensor) for item in value))


def _outcome(right: Right, shown: dict[str, Any], result: Any, owner: Any, arguments: Any = None) -> list[Tensor]:
    """What a call has made: its result, the object, and arguments that it writes."""
    if right.value is not None:
        return right.value(shown, result)
    written = [] if arguments is None else [arguments[key] for key in right.written]
    numbers = torch.tensor(result) if isinstance(result, (int, float)) else result
    return [tensor.detach().clone() for tensor in flat([numbers, owner, written])]


# in words -------------------------------------------------------------------------------------------------------------
def _described(arguments: dict[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name} = {_shown(arguments[name])}" for name in names)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout == torch.strided else value.layout
        return f"{value.dtype} {list(value.shape)} by {strides}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {_shown(item)}' for name, item in value.items())}}}"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, (list, tuple)) else repr(value)[:60]
