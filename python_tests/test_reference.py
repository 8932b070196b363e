"""The plain-torch kernels by themselves, which the other tests take as the measure of the compiled ones."""

from copy import deepcopy

import pytest
import torch
from conftest import assert_close
from test_ops import sample_inputs

from janus_ext import reference


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("protected", [0, 5])
def test_of_a_gram_matrix_that_is_not_symmetric_the_symmetric_part_counts(power: int, protected: int) -> None:
    x, skew = torch.randn(60, 30, dtype=torch.float64), torch.randn(30, 30, dtype=torch.float64)
    V = torch.linalg.qr(torch.randn(30, protected, dtype=torch.float64)).Q.contiguous()
    want = reference.extend_basis(V, x.mT @ x, 0.9, 30, power)
    got = reference.extend_basis(V, x.mT @ x + 5 * (skew - skew.mT), 0.9, 30, power)
    assert got.shape == want.shape
    assert_close(got @ got.mT, want @ want.mT, torch.float64, 10)


@pytest.mark.parametrize("scale", [2**70, -(3**50), 4])
def test_a_scale_may_be_any_integer_that_a_float_holds(scale: int) -> None:
    """As of the ops, to which PyTorch's dispatcher hands a float; torch itself takes none beyond 2^63."""
    for op in ("lora_linear", "lora_qkv", "lora_backward", "rectify_"):
        found, inputs = [], dict(sample_inputs(op, "cpu", torch.float64)[2])
        for value in (scale, float(scale)):
            sample = deepcopy(inputs)
            sample["scale"] = [value] * len(sample["scale"]) if op == "rectify_" else value
            result = getattr(reference, op)(**sample)
            found.append(result if op != "rectify_" else (*sample["grad_A"], *sample["grad_B"]))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("scale", [10**400, 10**5000, 0, 1e-60, 1e39, float("inf"), float("nan")], ids=range(7))
def test_a_scale_that_no_float_holds_is_refused(scale: float) -> None:
    for op in ("lora_linear", "rectify_"):
        sample = dict(sample_inputs(op, "cpu", torch.float64)[2])
        sample["scale"] = [scale] * len(sample["scale"]) if op == "rectify_" else scale
        with pytest.raises(ValueError, match=f"^{op}: scale must be finite and not zero in float32, got"):
            getattr(reference, op)(**sample)
