"""isvd_update and extend_basis_factor without the Gram matrix (docs/method.md, properties 5, 6 and 8)."""

import pytest
import torch
from conftest import TOLERANCE, assert_close, orthonormal, subspace

from janus_ext import ops, reference

DTYPES = [torch.float64, torch.float32]


def start(n: int, rank: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(n, rank, dtype=dtype, device=device), torch.zeros(rank, dtype=dtype, device=device)


def gram_of(U: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """What the sketch takes X^T X for."""
    return (U.double() * S.double() ** 2) @ U.double().mT


def low_rank(rows: int, n: int, rank: int) -> torch.Tensor:
    return torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, n, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [[90], [7, 50, 1, 32], [3] * 30], ids=["whole", "uneven", "threes"])
@pytest.mark.parametrize("n", [40, 8])
def test_exact_where_the_data_have_no_more_rank_than_the_sketch(device: str, n: int, split: list[int], dtype) -> None:
    x = low_rank(90, n, 6).to(dtype)
    state = start(n, 8, dtype, device)
    for chunk in x.to(device).split(split):
        state = ops.isvd_update(*state, chunk)
    U, S = state
    assert_close(gram_of(U, S), x.double().mT @ x.double(), dtype, 5)
    assert_close(U.mT @ U, torch.eye(8), dtype)
    assert bool((S[:-1] >= S[1:]).all()) and bool((S >= 0).all())


@pytest.mark.parametrize("n", [300, 2100])
def test_more_rows_than_a_block_takes(device: str, n: int) -> None:
    """Of a GPU's blocks, too: 2048 rows, or 24 Mi numbers where there are few columns."""
    rows = 84000 if n < 2048 else 2500
    x = low_rank(rows, n, 20).float()
    U, S = ops.isvd_update(*start(n, 32, torch.float32, device), x.to(device))
    assert_close(gram_of(U, S), x.double().mT @ x.double(), torch.float32, 5)
    assert_close(U.mT @ U, torch.eye(32), torch.float32, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_inputs_of_another_dtype_than_the_state(device: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 30, 12).to(device, dtype)
    state = ops.isvd_update(*start(12, 12, torch.float32, device), x)
    rows = x.reshape(-1, 12).double()
    assert_close(gram_of(*state), rows.mT @ rows, torch.float32, 5)


@pytest.mark.parametrize("scale", [1e-160, 1e160])
def test_no_square_overflows(scale: float) -> None:
    x = torch.randn(20, 6, dtype=torch.float64)
    U, S = ops.isvd_update(*start(6, 6, torch.float64, "cpu"), scale * x)
    assert_close(S / scale, torch.linalg.svdvals(x), torch.float64, 10)
    assert_close(U.mT @ U, torch.eye(6), torch.float64)


@pytest.mark.parametrize("l", [4, 9, 16])
def test_bound_of_frequent_directions(device: str, l: int) -> None:  # noqa: E741
    """For every unit v and j < l: 0 <= |M v|^2 - |diag(S) U^T v|^2 <= |M - M_j|_F^2 / (l - j)."""
    M = torch.randn(200, 24, dtype=torch.float64) * torch.logspace(0, -1, 24)
    state = start(24, l, torch.float64, device)
    for chunk in M.to(device).split([11, 60, 1, 128]):
        state = ops.isvd_update(*state, chunk, shrink=True)
    assert state[1][-1] == 0, "nothing was subtracted"
    lost = torch.linalg.eigvalsh(M.mT @ M - gram_of(*state).cpu())  # every unit v lies between the extremes
    tails = torch.linalg.svdvals(M).square().flip(0).cumsum(0).flip(0)  # |M - M_j|_F^2
    bound = min(float(tails[j]) / (l - j) for j in range(l))
    assert lost[0] >= -1e-9
    assert 0 < lost[-1] <= bound


def test_without_shrinking_nothing_is_counted_twice(device: str) -> None:
    M = torch.randn(150, 20, dtype=torch.float64)
    state = ops.isvd_update(*start(20, 5, torch.float64, device), M.to(device))
    assert torch.linalg.eigvalsh(M.mT @ M - gram_of(*state).cpu())[0] >= -1e-9


def test_decay_is_that_of_the_gram_matrix(device: str) -> None:
    first, second = low_rank(30, 12, 3), low_rank(30, 12, 3)
    state = ops.isvd_update(*start(12, 8, torch.float64, device), first.to(device))
    state = ops.isvd_update(*state, second.to(device), decay=0.25)
    assert_close(gram_of(*state), 0.25 * first.mT @ first + second.mT @ second, torch.float64, 10)


def test_merging_two_states_is_an_update_with_one_of_them(device: str) -> None:
    x = low_rank(60, 15, 4)
    one, two = (ops.isvd_update(*start(15, 6, torch.float64, device), part.to(device)) for part in x.split([25, 35]))
    merged = ops.isvd_update(*one, (two[0] * two[1]).mT)
    assert_close(gram_of(*merged), x.mT @ x, torch.float64, 10)


@pytest.mark.parametrize("update", [ops.isvd_update, reference.isvd_update], ids=["op", "reference"])
@pytest.mark.parametrize("shrink", [False, True])
def test_empty_batch_only_decays(device: str, update, shrink: bool) -> None:
    U, S = ops.isvd_update(*start(6, 3, torch.float64, device), torch.randn(9, 6, device=device))
    same_U, half_S = update(U, S, torch.zeros(0, 6, device=device), decay=0.25, shrink=shrink)
    assert torch.equal(same_U, U)
    assert_close(half_S, 0.5 * S, torch.float64)


def test_inputs_stay_as_they_are(device: str) -> None:
    U, S = orthonormal(9, 3, device=device), torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64, device=device)
    before = U.clone(), S.clone()
    ops.isvd_update(U, S, torch.randn(5, 9, device=device))
    assert torch.equal(U, before[0]) and torch.equal(S, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("energy", [0.0, 0.5, 0.95, 1.0])
def test_basis_equals_that_of_the_gram_matrix(device: str, energy: float, dtype: torch.dtype) -> None:
    x = low_rank(80, 30, 10)
    V = orthonormal(30, 4, dtype, device)
    U, S = ops.isvd_update(*start(30, 12, dtype, device), x.to(device, dtype))
    gram = (x.mT @ x).to(device)
    got = ops.extend_basis_factor(V, U, S, x.square().sum().to(device), energy, 30)
    want = ops.extend_basis(V, gram, energy, 30)
    assert got.shape == want.shape
    assert_close(subspace(got), subspace(want), dtype, 20)
    assert torch.equal(got[:, :4], V), "the old columns moved"


def test_all_of_a_sketch_is_taken_where_it_cannot_reach_the_energy(device: str) -> None:
    x = torch.randn(100, 20, dtype=torch.float64, device=device)
    U, S = ops.isvd_update(*start(20, 5, torch.float64, device), x)
    V = ops.extend_basis_factor(
        torch.zeros(20, 0, dtype=torch.float64, device=device), U, S, x.square().sum(), 0.99, 20
    )
    assert V.shape == (20, 5)
    assert_close(subspace(V), subspace(U), torch.float64, 10)


def test_full_precision_whatever_the_setting() -> None:
    V, x = orthonormal(300, 60, torch.float32), torch.randn(200, 300) * torch.logspace(0, -2, 300)
    U, S = ops.isvd_update(*start(300, 64, torch.float32, "cpu"), x)
    arguments = V, U, S, float(x.double().square().sum()), 0.9, 300
    want = ops.extend_basis_factor(*arguments)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(ops.extend_basis_factor(*arguments), want)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_total_may_be_a_number() -> None:
    U, S = orthonormal(8, 3), torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    V = ops.extend_basis_factor(torch.zeros(8, 0, dtype=torch.float64), U, S, 5.25, 0.9, 8)
    assert V.shape == (8, 2)
    assert torch.linalg.matrix_norm(subspace(V) - subspace(U[:, :2])) <= TOLERANCE[torch.float64]
    with pytest.raises(ValueError, match="^extend_basis_factor: total must be finite, got an integer that no float"):
        ops.extend_basis_factor(torch.zeros(8, 0, dtype=torch.float64), U, S, 10**400, 0.9, 8)
