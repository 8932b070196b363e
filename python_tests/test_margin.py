"""margin_loss, DecoupledMarginLoss and ClassPrototypes (docs/method.md, properties 7 and 8)."""

import math
from typing import Any

import numpy
import pytest
import torch
from conftest import TOLERANCE, assert_close
from torch.nn import functional as F

from janus_ext import ArgumentError, ClassPrototypes, DecoupledMarginLoss, StatisticsError, ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def eager(features: torch.Tensor, prototypes: torch.Tensor, margin: float, temperature: float) -> torch.Tensor:
    """The formula, left to autograd."""
    z = temperature * (F.normalize(features, dim=1) @ prototypes.mT - margin)
    return torch.log1p(z.exp().sum(1)).mean() / temperature


def samples(n: int, d: int, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, d, dtype=torch.float64), F.normalize(torch.randn(c, d, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("scale", [1.0, 1024.0, 65536.0])
def test_a_loss_scale_reaches_half_precision_before_it_is_rounded(device: str, scale: float) -> None:
    """65536 is a GradScaler's first one; without one most entries would be subnormal."""
    f, p = samples(128, 768, 50)
    f = f.half().double().requires_grad_()
    eager(f, p, 0.0, 16.0).backward()
    x = f.detach().to(device, torch.float16).requires_grad_()
    (scale * ops.margin_loss(x, p.to(device, torch.float32), 0.0, 16.0)).backward()
    assert bool(x.grad.isfinite().all())
    if scale > 1:
        assert_close(x.grad.double() / scale, f.grad, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 16, 5), (1, 3, 1), (33, 192, 345)], ids=str)
def test_loss_and_gradient_equal_float64(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    f, p = samples(*shape)
    f = f.to(dtype).double().requires_grad_()
    want = eager(f, p, 0.2, 16.0)
    want.backward()
    x = f.detach().to(device, dtype).requires_grad_()
    got = ops.margin_loss(x, p.to(device, torch.promote_types(dtype, torch.float32)), 0.2, 16.0)
    (3 * got).backward()
    assert_close(got, want, torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(x.grad, 3 * f.grad, dtype)
    assert x.grad.dtype == dtype


def test_gradcheck(device: str) -> None:
    f, p = samples(6, 9, 4)
    f, p = f.to(device).requires_grad_(), p.to(device)
    assert torch.autograd.gradcheck(lambda f: ops.margin_loss(f, p, 0.1, 8.0), (f,))


def test_prototypes_that_ask_for_a_gradient_are_refused(device: str) -> None:
    f, p = (t.to(device) for t in samples(6, 9, 4))
    with pytest.raises(ValueError, match="margin_loss: prototypes must be frozen"):
        ops.margin_loss(f, p.requires_grad_(), 0.1, 8.0)
    with torch.no_grad():
        ops.margin_loss(f, p, 0.1, 8.0)


def test_a_second_derivative_is_refused_not_wrong(device: str) -> None:
    f, p = (t.to(device) for t in samples(6, 9, 4))
    loss = ops.margin_loss(f.requires_grad_(), p, 0.1, 8.0).square()
    (grad,) = torch.autograd.grad(loss, f, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_hinge_as_sharp_as_a_step_stays_finite(device: str, dtype: torch.dtype) -> None:
    f, p = (t.to(device, dtype) for t in samples(64, 16, 40))
    for temperature in (1e6, 1e10, 1e20):
        f.requires_grad_().grad = None
        loss = ops.margin_loss(f, p, 0.1, temperature)
        loss.backward()
        assert_close(loss, (F.normalize(f, dim=1) @ p.mT - 0.1).amax(1).clamp_min(0).mean(), dtype, 50)
        assert f.grad.isfinite().all()


def test_no_prototypes_is_exactly_zero_without_gradient(device: str) -> None:
    f = torch.randn(5, 8, device=device, requires_grad=True)
    loss = ops.margin_loss(f, torch.zeros(0, 8, device=device), 0.2, 16.0)
    loss.backward()
    assert loss.item() == 0.0
    assert not f.grad.any()


def test_no_features(device: str) -> None:
    loss = ops.margin_loss(torch.zeros(0, 8, device=device), torch.ones(3, 8, device=device), 0.2, 16.0)
    assert loss.item() == 0.0


def test_invariant_to_feature_scale(device: str) -> None:
    f, p = (t.to(device) for t in samples(10, 12, 6))
    scales = torch.logspace(-3, 3, 10, dtype=torch.float64, device=device)[:, None]
    assert_close(ops.margin_loss(f * scales, p, 0.2, 16.0), ops.margin_loss(f, p, 0.2, 16.0), torch.float64)


def test_gradient_is_orthogonal_to_the_feature(device: str) -> None:
    f, p = (t.to(device) for t in samples(10, 12, 6))
    f.requires_grad_()
    ops.margin_loss(f, p, 0.2, 16.0).backward()
    assert (f.grad * f).sum(1).abs().max() <= TOLERANCE[torch.float64]


def test_a_feature_far_from_every_prototype_is_left_alone(device: str) -> None:
    p = torch.eye(1, 8, dtype=torch.float64, device=device)
    f = (-torch.eye(1, 8, dtype=torch.float64, device=device) + 0.1).requires_grad_()
    ops.margin_loss(f, p, 0.3, 64.0).backward()
    assert f.grad.norm() < 1e-12


def test_extreme_temperature_and_zero_feature_stay_finite(device: str) -> None:
    f = torch.cat([torch.zeros(1, 8), torch.randn(3, 8)]).to(device).requires_grad_()
    loss = ops.margin_loss(f, F.normalize(torch.randn(4, 8), dim=1).to(device), -1.0, 1e4)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(f.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_feature_without_direction_has_cosine_zero_and_no_gradient(device: str, dtype: torch.dtype) -> None:
    f, p = (t.to(dtype).to(device) for t in samples(3, 12, 5))
    f[1] = 0
    f.requires_grad_()
    loss = ops.margin_loss(f, p, 0.2, 16.0)
    loss.backward()
    assert not f.grad[1].any() and f.grad[0].any()
    hinge = math.log1p(5 * math.exp(-16 * 0.2)) / 16
    others = ops.margin_loss(f.detach()[[0, 2]], p, 0.2, 16.0)
    assert_close(3 * loss.detach(), 2 * others + hinge, dtype)


def test_non_contiguous(device: str) -> None:
    f, p = (t.to(device) for t in samples(10, 12, 6))
    got = ops.margin_loss(f.mT.contiguous().mT, p.mT.contiguous().mT, 0.2, 16.0)
    assert_close(got, ops.margin_loss(f, p, 0.2, 16.0), torch.float64)


def test_module_weights_the_loss() -> None:
    f, p = samples(10, 12, 6)
    assert_close(DecoupledMarginLoss(0.2, 16.0, weight=0.5)(f, p), 0.5 * eager(f, p, 0.2, 16.0), torch.float64)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("margin", 2.0, "2"),
        ("temperature", 0.0, "0"),
        ("weight", -1.0, "-1"),
        ("margin", float("nan"), "nan"),
        ("margin", "0.2", "'0.2'"),
        ("temperature", None, "None"),
        ("weight", True, "True"),
        ("weight", numpy.zeros(2), "an object of type ndarray"),
    ],
)
def test_module_names_the_wrong_argument(name: str, value: Any, found: str) -> None:
    arguments = {"margin": 0.2, "temperature": 16.0, "weight": 1.0, name: value}
    with pytest.raises(ArgumentError, match=f"DecoupledMarginLoss: {name} must be .*, got {found}"):
        DecoupledMarginLoss(**arguments)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: ClassPrototypes("6"), "ClassPrototypes: dim must be an integer, from 1 to 1048576, got '6'"),
        (lambda: ClassPrototypes(-6), "ClassPrototypes: dim must be from 1 to 1048576, got -6"),
        (lambda: ClassPrototypes(True), "ClassPrototypes: dim must be an integer, from 1 to 1048576, got True"),
        (
            lambda: ClassPrototypes(6).add(numpy.zeros((2, 6)), torch.zeros(2)),
            r"features must be a tensor \[N, 6\], got an",
        ),
        (
            lambda: ClassPrototypes(6).add(torch.zeros(2, 6), [0, 1]),
            r"labels must be a tensor \[2\] of integers, one a feature, got \[0, 1\]",
        ),
        (
            lambda: ClassPrototypes(6).add(torch.zeros(2, 6), torch.zeros(2)),
            "of integers, one a feature, got .*float32",
        ),
        (
            lambda: ClassPrototypes(6).add(torch.randn(2, 6), torch.tensor([0, -100])),
            "labels must not be negative, got -100",
        ),
        (
            lambda: ClassPrototypes(6).load_state_dict({"matrix": torch.eye(6)[:2], "classes": torch.tensor([3, 3])}),
            "state must have every class once",
        ),
        (
            lambda: ClassPrototypes(6).load_state_dict({"matrix": torch.eye(6)[:2], "classes": torch.tensor([0, -1])}),
            "state must have no negative class, got -1",
        ),
        (lambda: ClassPrototypes(6).nearest(None), r"features must be a tensor \[N, 6\], got None"),
        (lambda: ClassPrototypes(6).load_state_dict(None), "state must be what state_dict.. gave"),
        (lambda: DecoupledMarginLoss(0.2, 16.0)(torch.zeros(2, 6), None), r"ClassPrototypes or a tensor .*, got None"),
        (
            lambda: DecoupledMarginLoss(0.2, 16.0)([1.0], torch.zeros(2, 6)),
            r"features must be a tensor \[N, d\], got \[1\]",
        ),
    ],
    ids=range(13),
)
def test_wrong_types_are_named(use: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        use()


def test_prototypes_keep_nothing_that_autograd_knows() -> None:
    prototypes = ClassPrototypes(4)
    prototypes.add(torch.randn(6, 4, requires_grad=True).square(), torch.arange(6) % 2)
    assert not prototypes.matrix.requires_grad
    prototypes.transform(torch.eye(4, requires_grad=True))
    assert not prototypes.matrix.requires_grad
    prototypes.load_state_dict({"matrix": prototypes.matrix.clone().requires_grad_(), "classes": torch.tensor([3, 4])})
    assert not prototypes.matrix.requires_grad


def test_prototypes_of_inference_mode_serve_the_loss_outside_of_it() -> None:
    with torch.inference_mode():
        prototypes, loaded = ClassPrototypes(4), ClassPrototypes(4)
        prototypes.add(torch.randn(6, 4), torch.arange(6) % 2)
        prototypes.transform(torch.eye(4) + 0)
        loaded.load_state_dict(prototypes.state_dict())
    for one in (prototypes, loaded):
        f = torch.randn(3, 4, requires_grad=True)
        DecoupledMarginLoss(0.2, 16.0)(f, one).backward()
        assert f.grad.any() and not one.matrix.is_inference()


def test_prototypes_are_unit_class_means() -> None:
    f = torch.randn(20, 6)
    labels = torch.tensor([3, 5] * 10)
    prototypes = ClassPrototypes(6)
    prototypes.add(f, labels)
    assert prototypes.classes == [3, 5] and len(prototypes) == 2
    for row, c in zip(prototypes.matrix, (3, 5), strict=True):
        assert_close(row, F.normalize(f[labels == c].double().mean(0), dim=0), torch.float32)
    cosines = F.normalize(f, dim=1) @ prototypes.matrix.T
    assert_close(prototypes.nearest(f), cosines.amax(1), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(prototypes.nearest(f), cosines.amax(1), torch.float32)


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1e5, 1e30])
def test_prototypes_depend_on_directions_alone(scale: float) -> None:
    f, labels = torch.randn(20, 6), torch.arange(20) % 3
    scaled, plain = ClassPrototypes(6), ClassPrototypes(6)
    scaled.add(f * scale, labels)
    plain.add(f, labels)
    assert_close(scaled.matrix, plain.matrix.double(), torch.float32)
    assert_close(scaled.cosines(f * scale), plain.cosines(f).double(), torch.float32)
    scaled.transform(torch.eye(6).double() * scale**5)
    assert_close(scaled.matrix, plain.matrix.double(), torch.float32)


@pytest.mark.parametrize("features", [torch.zeros(0, 4), torch.full((2, 4), float("nan"))], ids=["none", "nan"])
def test_prototypes_of_bad_features_are_refused(features: torch.Tensor) -> None:
    prototypes = ClassPrototypes(4)
    with pytest.raises(StatisticsError, match="features must be finite"):
        prototypes.add(features, torch.zeros(len(features), dtype=torch.int64))
    assert len(prototypes) == 0


def test_prototypes_are_never_updated() -> None:
    prototypes = ClassPrototypes(4)
    prototypes.add(torch.randn(2, 4), torch.tensor([0, 1]))
    before = prototypes.matrix.clone()
    with pytest.raises(ArgumentError, match=r"classes \[1\] that have prototypes already"):
        prototypes.add(torch.randn(2, 4), torch.tensor([1, 2]))
    assert torch.equal(prototypes.matrix, before)
    other = ClassPrototypes(4)
    other.load_state_dict(prototypes.state_dict())
    assert other.classes == [0, 1] and torch.equal(other.matrix, before)
