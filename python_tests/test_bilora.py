"""BiLoRA: the update from its double sum, supports that no two tasks share, and what it leaves alone."""

import math

import numpy as np
import pytest
import torch
from conftest import make_trainer, relative_error, weights_of
from torch import nn

from janus_ext.errors import ArgumentError
from janus_ext.methods import METHODS
from janus_ext.methods.bilora import SpectralQKV, positions
from janus_ext.runs import checkpoint

GRIDS = [(4, 4), (3, 5), (6, 4), (2, 7)]  # m, n


def layer_of(m: int, n: int, frequencies: int, dtype: torch.dtype = torch.float64) -> SpectralQKV:
    """A projection of random weights with random coefficients at positions of task 0."""
    layer = SpectralQKV(nn.Linear(n, 3 * m, dtype=dtype), frequencies, 7.0)
    layer.place(positions(0, (m, n), frequencies, seed=0))
    layer.coefficients = nn.Parameter(torch.randn(2, frequencies, dtype=dtype))
    return layer.requires_grad_(False)


def update_by_sum(coefficients: np.ndarray, places: np.ndarray, m: int, n: int, scale: float) -> np.ndarray:
    """s / (m n) sum c cos(2 pi (u i / m + v j / n)), element by element."""
    update = np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            for c, place in zip(coefficients, places, strict=True):
                u, v = divmod(int(place), n)
                update[i, j] += c * math.cos(2 * math.pi * (u * i / m + v * j / n))
    return scale / (m * n) * update


@pytest.mark.parametrize(("m", "n"), GRIDS)
def test_the_update_is_its_double_sum(m, n):
    layer = layer_of(m, n, 5)
    for update, coefficients in zip(layer.delta(), layer.coefficients.numpy(), strict=True):
        want = update_by_sum(coefficients, layer.positions.numpy(), m, n, 7.0)
        assert relative_error(update, torch.from_numpy(want)) <= 1e-12


@pytest.mark.parametrize(("m", "n"), GRIDS)
def test_coefficients_have_the_gradient_of_finite_differences(m, n):
    layer = layer_of(m, n, 5).requires_grad_(False)
    x = torch.randn(6, n, dtype=torch.float64)
    layer.coefficients.requires_grad_()

    def loss(coefficients):
        return torch.func.functional_call(layer, {"coefficients": coefficients}, (x,)).square().sum()

    assert torch.autograd.gradcheck(loss, layer.coefficients)
    assert torch.autograd.grad(loss(layer.coefficients), layer.coefficients)[0].abs().min() > 0


@pytest.mark.parametrize(("m", "n"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merging_adds_the_update_to_k_and_v_alone(m, n, dtype):
    layer = layer_of(m, n, 5, dtype)
    before, delta, x = layer.linear.weight.clone(), layer.delta(), torch.randn(3, n, dtype=dtype)
    output, plain = layer(x), layer.linear(x)
    layer.merge()
    after = layer.linear.weight
    assert torch.equal(after[:m], before[:m]) and not layer.coefficients.any()
    want = (before[m:].double() + delta.double().view(2 * m, n)).to(dtype)
    assert torch.equal(after[m:], want) and not torch.equal(after[m:], before[m:])
    assert relative_error(layer(x), output) <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert torch.equal(output[:, :m], plain[:, :m])


# positions -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("grid", "frequencies"), [((6, 4), 5), ((8, 8), 16), ((3, 5), 15), ((2, 7), 3)])
def test_no_two_tasks_share_positions_until_the_grid_is_used_up(grid, frequencies):
    size = grid[0] * grid[1]
    a_round = size // frequencies
    sets = [set(positions(task, grid, frequencies, seed=3).tolist()) for task in range(2 * a_round)]
    assert all(len(s) == frequencies and s <= set(range(size)) for s in sets)
    for rounds in (sets[:a_round], sets[a_round:]):
        assert len(set.union(*rounds)) == a_round * frequencies
    assert any(sets[a_round] & earlier for earlier in sets[:a_round])


def test_positions_depend_on_task_and_seed_alone():
    first = positions(2, (32, 32), 100, seed=5)
    torch.rand(10)
    positions(0, (32, 32), 100, seed=9)
    assert torch.equal(positions(2, (32, 32), 100, seed=5), first)
    for task, seed in ((3, 5), (2, 6), (12, 5), (2, -5), (2, 2**40), (2, 10**30)):
        assert not torch.equal(positions(task, (32, 32), 100, seed=seed), first)


# a whole run ---------------------------------------------------------------------------------------------------------
def support(update: torch.Tensor) -> set[int]:
    """Places, row by row, where the 2-D Fourier transform of an update [m, n] is not rounding."""
    spectrum = torch.fft.fft2(update).abs().flatten()
    return set((spectrum > 1e-4 * spectrum.max()).nonzero().flatten().tolist())


def mirrored(places: set[int], m: int, n: int) -> set[int]:
    return {(-(p // n) % m) * n + -(p % n) % n for p in places}


class Watched(METHODS["bilora"]):
    """Notes the weights around every task and that coefficients start at 0."""

    def begin_task(self, task):
        super().begin_task(task)
        assert not any(layer.coefficients.any() for layer in self.layers.values())

    def close_task(self, task):
        self.changes = getattr(self, "changes", [])
        before = {name: layer.linear.weight.double() for name, layer in self.layers.items()}
        report = super().close_task(task)
        self.changes.append({name: layer.linear.weight.double() - before[name] for name, layer in self.layers.items()})
        return report


@pytest.fixture(scope="module")
def run(patterns, weights, tmp_path_factory):
    """Three tasks with 100 of 1024 frequencies."""
    settings = {"method": "bilora", "frequencies": 100, "lr": 1e-2}
    trainer = make_trainer(patterns, weights, tmp_path_factory.mktemp("runs"), **settings)
    trainer.learner.method.__class__ = Watched
    trainer.start = weights_of(trainer)
    trainer.run()
    return trainer


def test_the_spectrum_of_a_task_lies_on_its_positions_and_their_mirrors(run):
    for task, changes in enumerate(run.learner.method.changes):
        places = set(positions(task, (32, 32), 100, seed=0).tolist())
        for change in changes.values():
            assert not change[:32].any()
            for update in (change[32:64], change[64:]):
                found = support(update)
                assert found <= places | mirrored(places, 32, 32)
                assert len(found) > 100  # mirrors included


def test_the_files_hold_what_was_added(run):
    for task, changes in enumerate(run.learner.method.changes):
        tensors, metadata = checkpoint.read_tensors(run.run_on_disk.factors_path(task))
        for name, change in changes.items():
            places = tensors[f"{name}.positions"]
            assert torch.equal(places, positions(task, (32, 32), 100, seed=0))
            spectrum = torch.zeros(2, 1024, dtype=torch.float64)
            spectrum[:, places] = tensors[f"{name}.coefficients"].double()
            update = float(metadata["scale"]) * torch.fft.ifft2(spectrum.view(2, 32, 32)).real
            assert relative_error(change[32:].view(2, 32, 32), update) <= 1e-4  # float32 weights' rounding


def test_nothing_else_of_the_backbone_moves(run):
    end = weights_of(run)
    moved = {name for name in run.start if not torch.equal(run.start[name], end[name])}
    assert moved == {f"backbone.blocks.{b}.attn.qkv.{part}" for b in (0, 1) for part in ("linear.weight", "positions")}
    assert [list(p.shape) for p in run.learner.method.trainable()] == [[2, 100]] * 2


def test_more_frequencies_than_the_grid_has_are_refused(patterns, weights, tmp_path):
    with pytest.raises(ArgumentError, match="--frequencies must be at most m n = 1024, got 1025"):
        make_trainer(patterns, weights, tmp_path / "run", method="bilora", frequencies=1025)
