"""gram_update_ and the statistics of OnlineEstimator (docs/method.md, properties 5 and 8)."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import TOLERANCE, assert_close, needs_native, relative_error

from janus_ext import ArgumentError, OnlineEstimator, StatisticsError, ops, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 24), (3, 7, 24), (300, 200), (1, 1), (5, 97)], ids=str)
def test_equals_float64(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    n = shape[-1]
    start = torch.randn(n, n, dtype=torch.float64)
    start = (start + start.mT).float()
    want = 0.5 * start.double() + x.double().reshape(-1, n).mT @ x.double().reshape(-1, n)
    gram = ops.gram_update_(start.to(device), x.to(device), decay=0.5)
    assert_close(gram, want, torch.float32)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [4096, 5003])
@pytest.mark.parametrize("n", [40, 600])
def test_many_rows(device: str, dtype: torch.dtype, rows: int, n: int) -> None:
    """Their chunks, and the rows that are left over, add up; what C held below its diagonal does not matter."""
    x = torch.randn(rows, n).to(dtype)
    start = torch.eye(n, dtype=torch.float64)
    gram = start.float().to(device)
    if device == "cuda":
        gram.masked_fill_(torch.ones_like(gram, dtype=torch.bool).tril(-1), float("nan"))
    ops.gram_update_(gram, x.to(device), decay=0.25)
    assert_close(gram, 0.25 * start + x.double().mT @ x.double(), torch.float32)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 40])
def test_writing_counts_as_a_change(device: str, dtype: torch.dtype, rows: int) -> None:
    """Autograd must see that what it saved is another matrix now."""
    gram, x = torch.eye(24, device=device), torch.randn(rows, 24).to(device, dtype)
    weights = torch.ones_like(gram, requires_grad=True)
    loss = (weights * gram).sum()
    ops.gram_update_(gram, x, decay=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_mode(device: str, dtype: torch.dtype) -> None:
    """A matrix made there, contiguous, has no version to count, and is updated outside as well."""
    with torch.inference_mode():
        gram = torch.eye(24, device=device)
    x = torch.randn(40, 24).to(dtype)
    assert_close(ops.gram_update_(gram, x.to(device)), torch.eye(24) + x.double().mT @ x.double(), torch.float32)


@needs_native
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_bfloat16_without_its_instructions(capability: str) -> None:
    """What a processor does that has none of them; ATen's own switch forbids them here."""
    code = """
import torch
from janus_ext import ops
x = torch.randn(4099, 70).bfloat16()
gram, want = ops.gram_update_(torch.zeros(70, 70), x).double(), x.double().mT @ x.double()
assert torch.equal(gram, gram.mT) and (gram - want).norm() < 2e-5 * want.norm()
print(torch.backends.cpu.get_cpu_capability())
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == capability.upper()


def test_float64_gram_of_float32_input(device: str) -> None:
    x = torch.randn(50, 20, device=device)
    gram = ops.gram_update_(torch.zeros(20, 20, dtype=torch.float64, device=device), x)
    assert_close(gram, x.double().mT @ x.double(), torch.float64)


@pytest.mark.parametrize("n", [5, 130])
def test_non_contiguous(device: str, n: int) -> None:
    x = torch.randn(n, 33, device=device).mT
    gram = torch.zeros(2 * n, 2 * n, device=device)[::2, ::2]
    ops.gram_update_(gram, x)
    assert_close(gram, x.double().mT @ x.double(), torch.float32)
    assert torch.equal(gram, gram.mT)


def test_input_that_is_the_gram_matrix_itself(device: str) -> None:
    gram = torch.randn(200, 200, dtype=torch.float64)
    gram = (gram + gram.mT).to(device)
    want = gram + gram.mT @ gram
    assert_close(ops.gram_update_(gram, gram), want, torch.float64)


def test_empty_batch_only_decays(device: str) -> None:
    gram = torch.eye(4, device=device)
    ops.gram_update_(gram, torch.zeros(0, 4, device=device), decay=0.25)
    assert torch.equal(gram, 0.25 * torch.eye(4, device=device))


def test_split_order_and_merge_do_not_matter(device: str) -> None:
    x = torch.randn(120, 16, dtype=torch.float64, device=device)
    whole = OnlineEstimator(16, dtype=torch.float64, device=device)
    whole.observe(x)
    parts = [OnlineEstimator(16, dtype=torch.float64, device=device) for _ in range(3)]
    for i, chunk in enumerate(x[torch.randperm(120)].split([7, 50, 1, 30, 32])):
        parts[i % 3].observe(chunk)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert parts[0].rows == whole.rows == 120
    assert_close(parts[0].statistics.gram, whole.statistics.gram, torch.float64)


def test_commit_starts_new_statistics_and_grows_the_basis() -> None:
    estimator = OnlineEstimator(10, dtype=torch.float64)
    directions = torch.eye(10, dtype=torch.float64)
    estimator.observe(torch.randn(30, 3, dtype=torch.float64) @ directions[:3])
    assert estimator.commit(1.0).shape == (10, 3)
    assert estimator.rows == 0 and not estimator.statistics.gram.any()
    estimator.observe(torch.randn(30, 2, dtype=torch.float64) @ directions[2:4])
    assert estimator.commit(1.0).shape == (10, 4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 0.0])
def test_bad_statistics_name_the_layer_and_change_nothing(poison: float) -> None:
    estimator = OnlineEstimator(6, name="blocks.3.attn.qkv")
    estimator.observe(torch.randn(9, 6))
    before = estimator.commit(0.9)
    estimator.observe(torch.full((4, 6), poison))
    with pytest.raises(StatisticsError, match=r"blocks\.3\.attn\.qkv: .*previous basis stays"):
        estimator.commit(0.9)
    assert estimator.basis is before


def test_commit_without_observation_is_an_error() -> None:
    with pytest.raises(StatisticsError, match="needs observed inputs"):
        OnlineEstimator(6).commit(0.9)


def test_cap_warns_once_with_both_numbers() -> None:
    estimator = OnlineEstimator(8, name="blocks.0.attn.qkv")
    estimator.observe(torch.randn(50, 8))
    with pytest.warns(UserWarning, match=r"attn\.qkv: an energy of 1 wants 8 protected directions, the cap is 5 of 8"):
        assert estimator.commit(1.0, max_rank=5).shape == (8, 5)
    estimator.observe(torch.randn(50, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator.commit(1.0, max_rank=5)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: OnlineEstimator(6, decay=2.0), r"decay must be in \(0, 1\], got 2"),
        (lambda: OnlineEstimator(6, "svd"), "estimator must be one of gram, isvd, got 'svd'"),
        (lambda: OnlineEstimator(6, energy_power=3), "energy_power must be 1 or 2, got 3"),
        (lambda: OnlineEstimator(6).commit(2.0), r"energy must be in \[0, 1\], got 2"),
        (lambda: OnlineEstimator(6).commit(0.9, max_rank=7), "max_rank must be from k = 0 to dim = 6, got 7"),
        (lambda: OnlineEstimator(6).merge(OnlineEstimator(5)), "other must have dim 6, got 5"),
    ],
    ids=range(6),
)
def test_wrong_arguments_are_named(use: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        use()


def test_state_dict_round_trip() -> None:
    estimator = OnlineEstimator(6)
    estimator.observe(torch.randn(20, 6))
    estimator.commit(0.7)
    estimator.observe(torch.randn(5, 6))
    other = OnlineEstimator(6)
    other.load_state_dict(estimator.state_dict())
    assert torch.equal(other.commit(0.9), estimator.commit(0.9))
    with pytest.raises(ArgumentError, match=r"gram \[7, 7\], rows \[\], got gram \[6, 6\], rows \[\]$"):
        OnlineEstimator(7).load_state_dict(estimator.state_dict())


@needs_native
def test_reference_agrees_with_compiled(device: str) -> None:
    x = torch.randn(60, 30, device=device)
    a, b = torch.zeros(30, 30, device=device), torch.zeros(30, 30, device=device)
    ops.gram_update_(a, x)
    reference.gram_update_(b, x)
    assert_close(a, b, torch.float32)


@pytest.mark.parametrize("update", [ops.gram_update_, reference.gram_update_])
@pytest.mark.parametrize("rows", [0, 5])
def test_of_the_old_matrix_the_upper_triangle_is_read(device: str, rows: int, update: Callable[..., object]) -> None:
    gram, x = torch.randn(7, 7, device=device), torch.randn(rows, 7, device=device)
    symmetric = gram.triu() + gram.triu(1).mT
    wanted = 0.5 * symmetric.double() + x.double().mT @ x.double()
    update(gram, x, 0.5)
    assert relative_error(gram, wanted) < TOLERANCE[torch.float32]
    assert torch.equal(gram, gram.mT)
