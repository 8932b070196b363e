"""The plain-torch kernels by themselves, which the other tests take as the measure of the compiled ones."""

import pytest
import torch
from conftest import assert_close

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
