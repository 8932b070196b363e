"""extend_basis (docs/method.md, properties 6 and 8): compare projectors, never singular vectors."""

import math

import pytest
import torch
from conftest import assert_close, needs_native, orthonormal, subspace

from janus_ext import ops, reference


def spectrum_gram(values: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """A symmetric matrix with these eigenvalues."""
    Q = orthonormal(len(values), len(values))
    return ((Q * values.double()) @ Q.mT).to(device)


def captured(V: torch.Tensor, gram: torch.Tensor, power: int = 1) -> float:
    C = torch.linalg.matrix_power(gram.double().cpu(), power)
    V = V.double().cpu()
    return float((V.mT @ C @ V).trace() / C.trace())


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("energy", [0.0, 0.3, 0.9, 0.99, 1.0])
def test_captures_the_energy_with_the_fewest_directions(device: str, energy: float, power: int) -> None:
    gram = spectrum_gram(torch.logspace(0, -6, 40), device)
    old = orthonormal(40, 5, device=device)
    V = ops.extend_basis(old, gram, energy, 40, power)
    assert captured(V, gram, power) >= energy - 1e-12
    if V.shape[1] > 5:
        assert captured(V[:, :-1], gram, power) < energy


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("protected", [0, 8])
def test_the_rounding_of_a_float32_gram_costs_no_energy_that_lies_above_it(device, power, protected) -> None:
    """C^2 is made in float64: what it holds of C's rounding is that rounding's square."""
    n = 256
    gram = spectrum_gram(1 / torch.arange(1, n + 1, dtype=torch.float64), device).float()
    old = orthonormal(n, protected, torch.float32, device)
    V = ops.extend_basis(old, gram, 0.9999, n, power)
    assert captured(V, gram, power) >= 0.9999 - 1e-6
    assert captured(V[:, :-1], gram, power) < 0.9999


@pytest.mark.parametrize("power", [1, 2])
def test_data_of_a_rank_give_as_many_directions_from_a_float32_gram(device: str, power: int) -> None:
    x = torch.randn(300, 5, device=device) @ torch.randn(5, 64, device=device)
    V = ops.extend_basis(torch.zeros(64, 0, device=device), x.mT @ x, 1.0, 64, power)
    assert V.shape[1] == 5


@pytest.mark.parametrize(("n", "q", "weakest", "least"), [(64, 8, -2, 8), (16, 4, -3, 3)])
@pytest.mark.parametrize("power", [1, 2])
def test_one_subspace_gives_no_more_directions_however_its_energies_change(device, power, n, q, weakest, least) -> None:
    """A basis of float32 is off by its weak directions' rounding; what is strong there next time shows through."""
    scales = torch.logspace(0, weakest, q, dtype=torch.float64, device=device)
    for _ in range(20):
        axes = orthonormal(n, q, device=device)
        V, plain = torch.zeros(n, 0, device=device), torch.zeros(n, 0, device=device)
        for spectrum in (scales, scales.flip(0), scales, scales.flip(0)):
            x = ((torch.randn(500, q, dtype=torch.float64, device=device) * spectrum) @ axes.mT).float()
            V = ops.extend_basis(V, x.mT @ x, 1.0, n, power)
            plain = reference.extend_basis(plain, x.mT @ x, 1.0, n, power)
            assert least <= V.shape[1] <= q and least <= plain.shape[1] <= q


def test_energy_power_two_needs_fewer_directions() -> None:
    gram = spectrum_gram(torch.logspace(0, -3, 30))
    empty = torch.zeros(30, 0, dtype=torch.float64)
    assert ops.extend_basis(empty, gram, 0.95, 30, 2).shape[1] < ops.extend_basis(empty, gram, 0.95, 30, 1).shape[1]


def test_first_basis_is_the_leading_eigenspace(device: str) -> None:
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    gram = spectrum_gram(values, device)
    V = ops.extend_basis(torch.zeros(6, 0, dtype=torch.float64, device=device), gram, float(11.9 / values.sum()), 6)
    assert V.shape == (6, 2)
    assert_close(subspace(V), subspace(torch.linalg.eigh(gram).eigenvectors[:, -2:]), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stays_orthonormal_and_nested_over_many_tasks(device: str, dtype: torch.dtype) -> None:
    V = torch.zeros(64, 0, dtype=dtype, device=device)
    for _ in range(20):
        directions = torch.randn(64, 3, dtype=torch.float64, device=device)
        grown = ops.extend_basis(V, (directions @ directions.mT).to(dtype), 0.999, 60)
        outside = V.double() - subspace(grown) @ V.double()
        assert outside.norm() <= 1e-6 * math.sqrt(max(V.shape[1], 1)), "the old span left the new one"
        V = grown
    defect = V.double().mT @ V.double() - torch.eye(V.shape[1], dtype=torch.float64, device=device)
    assert V.shape[1] > 50
    assert torch.linalg.matrix_norm(defect, 2) <= 1e-6


def test_rank_deficient_data_gives_its_rank_and_no_more(device: str) -> None:
    x = torch.randn(100, 4, dtype=torch.float64) @ torch.randn(4, 20, dtype=torch.float64)
    V = ops.extend_basis(torch.zeros(20, 0, dtype=torch.float64, device=device), (x.mT @ x).to(device), 1.0, 20)
    assert V.shape == (20, 4)


def test_rounding_of_a_float32_gram_is_no_direction(device: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(400, 6) @ torch.randn(6, 40)
    V = torch.zeros(40, 0, device=device)
    for _ in range(4):  # the same six directions, task after task
        gram = ops.gram_update_(torch.zeros(40, 40, device=device), x[torch.randperm(400)].to(device))
        V = ops.extend_basis(V, gram, 1.0, 40)
        assert V.shape == (40, 6)


@pytest.mark.parametrize("implementation", [ops, reference], ids=["op", "reference"])
@pytest.mark.parametrize("factor", [False, True], ids=["gram", "factor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_basis_in_half_precision_is_not_doubled(dtype: torch.dtype, factor: bool, implementation) -> None:
    """V is orthonormal to its own rounding only: its directions must not come again as new ones."""
    V = orthonormal(64, 20).to(dtype).float()
    x = torch.randn(300, 20) @ V.mT * 10 + torch.randn(300, 5) @ orthonormal(64, 5, torch.float32).mT
    U, S, _ = torch.linalg.svd(x.mT, full_matrices=False)
    total = x.double().square().sum()
    if factor:
        got = implementation.extend_basis_factor(V, U[:, :40].contiguous(), S[:40].contiguous(), total, 1.0, 64)
    else:
        got = implementation.extend_basis(V, x.double().mT @ x.double(), 1.0, 64)
    assert got.shape == (64, 25) and torch.equal(got[:, :20], V)
    new = got[:, 20:].double()
    assert_close(new.mT @ new, torch.eye(5), torch.float32)
    assert (V.double().mT @ new).norm() <= 1e-5


def test_nothing_to_add_is_a_copy() -> None:
    V = orthonormal(9, 4)
    got = ops.extend_basis(V, torch.eye(9, dtype=torch.float64), 0.0, 9)
    assert torch.equal(got, V) and got.data_ptr() != V.data_ptr()


def test_max_rank_caps() -> None:
    assert ops.extend_basis(torch.zeros(9, 0), torch.eye(9), 1.0, 4).shape == (9, 4)
    V = orthonormal(9, 4, torch.float32)
    assert torch.equal(ops.extend_basis(V, torch.eye(9), 1.0, 4), V)


def test_huge_and_tiny_scales_do_not_matter() -> None:
    gram = spectrum_gram(torch.logspace(0, -3, 12))
    empty = torch.zeros(12, 0, dtype=torch.float64)
    want = ops.extend_basis(empty, gram, 0.9, 12, 2)
    for scale in (1e-150, 1e150):
        assert_close(subspace(ops.extend_basis(empty, gram * scale, 0.9, 12, 2)), subspace(want), torch.float64, 10)


@needs_native
def test_compiled_agrees_with_reference(device: str) -> None:
    gram = spectrum_gram(torch.logspace(0, -4, 30), device)
    V = orthonormal(30, 6, device=device)
    got, want = ops.extend_basis(V, gram, 0.97, 25), reference.extend_basis(V, gram, 0.97, 25)
    assert got.shape == want.shape
    assert_close(subspace(got), subspace(want), torch.float64, 10)


@needs_native
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("protected", [0, 1, 17, 29, 30])
def test_the_complement_agrees_with_the_projected_whole(device: str, protected: int, power: int) -> None:
    """The op takes C apart in the complement of V, the reference as a whole: the same space, up to all of it; of a C
    that is not symmetric both take the symmetric part."""
    x = torch.randn(60, 30, dtype=torch.float64, device=device)
    V, skew = orthonormal(30, protected, device=device), torch.randn(30, 30, dtype=torch.float64, device=device)
    gram = x.mT @ x
    for energy, room, given in (
        (0.0, 30, gram),
        (0.9, 30, gram),
        (0.9, 30, gram + skew - skew.mT),
        (1.0, protected, gram),
    ):
        got = ops.extend_basis(V, given, energy, room, power)
        want = reference.extend_basis(V, gram, energy, room, power)
        assert got.shape == want.shape and torch.equal(got[:, :protected], V)
        assert_close(subspace(got), subspace(want), torch.float64, 10)
