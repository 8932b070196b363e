"""How far features have moved, and the map for old statistics, against float64 (docs/method.md, property 14)."""

import math

import pytest
import torch
from conftest import assert_close, orthonormal, relative_error
from gaussians import gaussians, known_of
from torch import Tensor

from janus_ext.heads import HEADS
from janus_ext.heads.drift import drift_map, movement

DIM = 9


def plain(F0: Tensor, F1: Tensor) -> Tensor:
    """(F0^T F0 + lambda I)^-1 (F0^T F1 + lambda I) for the lambda whose hat matrix gives the least GCV, or I."""
    F0, F1 = F0.double(), F1.double()
    G, identity = F0.mT @ F0, torch.eye(F0.shape[1], dtype=torch.float64)
    found = [(float((F1 - F0).square().sum()) / len(F0) ** 2, identity)]
    for strength in torch.logspace(-5, 2, 20, dtype=torch.float64):
        penalty = strength * G.trace() / min(len(G), len(F0))
        R = torch.linalg.solve(G + penalty * identity, F0.mT @ F1 + penalty * identity)
        hat = F0 @ torch.linalg.solve(G + penalty * identity, F0.mT)
        found.append((float((F1 - F0 @ R).square().sum() / (len(F0) - hat.trace()) ** 2), R))
    return min(found, key=lambda pair: pair[0])[1]


def moved(rows: int, dim: int, map_size: float, noise: float) -> tuple[Tensor, Tensor]:
    before, _ = gaussians([rows // 2, rows - rows // 2], dim)
    R = torch.eye(dim) + map_size * torch.randn(dim, dim) / dim**0.5
    return before, before @ R + noise * torch.randn(rows, dim)


def test_movement_is_in_standard_deviations_within_classes() -> None:
    before, labels = gaussians([40, 30, 50], DIM)
    S = known_of(before, labels, [3]).statistics.covariance()
    after = before + 0.1 * torch.randn(120, DIM)
    D, root = (after - before).double(), torch.linalg.cholesky(S)
    want = torch.einsum("ni,ij,nj->n", D, torch.linalg.inv(S), D).mean().div(DIM).sqrt()
    assert movement(before, after, S) == pytest.approx(float(want), rel=1e-9)
    assert movement(before, before, S) == 0.0
    assert movement(before, before + root[:, 0], S) == pytest.approx(DIM**-0.5)  # one deviation in one direction
    R = torch.randn(DIM, DIM, dtype=torch.float64)  # no linear map of all features changes it
    assert movement(before.double() @ R, after.double() @ R, R.mT @ S @ R) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("counts", [[40, 30, 50], [1] * 20], ids=["many images", "one a class"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_movement_does_not_depend_on_the_scale_of_features(counts: list[int], scale: float) -> None:
    before, labels = gaussians(counts, DIM)
    after = before + 0.1 * torch.randn_like(before)
    want, got = (
        movement(c * before, c * after, known_of(c * before, labels, [len(counts)]).statistics.spread())
        for c in (1.0, scale)
    )
    assert got == pytest.approx(want, rel=1e-4) and 0 < want < 1


def test_movement_against_what_rounding_has_left_is_not_known_to_be_small() -> None:
    before = torch.randn(20, DIM)
    indefinite = torch.diag(torch.tensor([1.0] * (DIM - 1) + [-1e-12], dtype=torch.float64))
    assert movement(before, before + 1e-9, indefinite) == math.inf


@pytest.mark.parametrize(("rows", "dim"), [(60, DIM), (20, 40), (12, 12), (30, 1)])
@pytest.mark.parametrize(("size", "noise"), [(0.3, 0.05), (0.3, 1.0), (0.0, 0.5)])
def test_the_map_equals_a_direct_solve(device: str, rows: int, dim: int, size: float, noise: float) -> None:
    before, after = moved(rows, dim, size, noise)
    got = drift_map(before.to(device), after.to(device))
    assert got.dtype == torch.float64 and got.device.type == device
    assert_close(got, plain(before, after), torch.float64, 1e4)


def test_a_linear_map_is_found_again() -> None:
    before = torch.randn(200, DIM, dtype=torch.float64)
    R = torch.eye(DIM) + 0.3 * torch.randn(DIM, DIM, dtype=torch.float64)
    assert relative_error(drift_map(before, before @ R), R) < 1e-4


def test_features_that_stayed_have_the_identity() -> None:
    before = torch.randn(50, DIM)
    assert torch.equal(drift_map(before, before), torch.eye(DIM, dtype=torch.float64))


def test_what_is_no_map_of_the_features_moves_nothing_much() -> None:
    """Noise: old statistics would only be spoiled. The more images, the nearer to the identity."""
    maps = [drift_map(*moved(rows, DIM, 0.0, 1.0)) for rows in (30, 3000)]
    off = [float((R - torch.eye(DIM)).norm()) for R in maps]
    assert off[0] < 0.3 * DIM**0.5 and off[1] < 0.05 * DIM**0.5


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_features_does_not_matter(scale: float) -> None:
    before, after = moved(60, DIM, 0.3, 0.1)
    assert_close(
        drift_map(scale * before.double(), scale * after.double()), drift_map(before, after), torch.float64, 1e3
    )


def test_rotated_features_have_the_rotated_map() -> None:
    before, after = (f.double() for f in moved(60, DIM, 0.3, 0.1))
    Q = orthonormal(DIM, DIM)
    assert_close(drift_map(before @ Q, after @ Q), Q.mT @ drift_map(before, after) @ Q, torch.float64, 1e3)


@pytest.mark.parametrize("name", ["lda", "ncm", "ridge"])
def test_old_classes_are_found_again_by_images_of_new_ones(name: str) -> None:
    """The map comes from features of another class alone, and brings the knowledge of old ones to where they are."""
    features, labels = gaussians([80] * 4, DIM)
    at, truth = gaussians([100] * 4, DIM, seed=1)
    new, _ = gaussians([300], DIM, 2.0, seed=2)
    R = orthonormal(DIM, DIM).float()
    known = known_of(features, labels, [2, 2])

    def right(moved: Tensor) -> float:
        return float((HEADS[name](known).scores(moved).argmax(1) == truth).double().mean())

    at_home, stale = right(at), right(at @ R)
    known.move(drift_map(new, new @ R + 0.01 * torch.randn(300, DIM)))
    assert right(at @ R) > at_home - 0.02 > stale + 0.2
