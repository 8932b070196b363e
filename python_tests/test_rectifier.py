"""GradientRectifier: Gradient Rectification in a loop of one's own, for own layers and for pairs.

docs/method.md, properties 2 and 11.
"""

from typing import Any

import numpy
import pytest
import torch
from conftest import TOLERANCE, assert_close, orthonormal
from torch import nn

from janus_ext import (
    ArgumentError,
    GradientRectifier,
    LoRALinear,
    LoRAPair,
    StatisticsError,
    TaskBoundaryError,
    ops,
)
from janus_ext.errors import JanusWarning


class PlainLoRA(nn.Module):
    """Somebody else's adapter: W x + s B (A x)."""

    def __init__(self, n: int, m: int, r: int, scale: float) -> None:
        super().__init__()
        self.base = nn.Linear(n, m).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(r, n) / n**0.5), nn.Parameter(torch.zeros(m, r))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.A.T) @ self.B.T

    @torch.no_grad()
    def merge(self) -> None:
        self.base.weight += self.scale * self.B @ self.A
        self.B.zero_()


def two_tasks(rectifier: GradientRectifier, layers: list[nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    """Task one lives in six directions; outputs on it after task one, and after task two elsewhere."""
    first = torch.randn(200, 6) @ orthonormal(24, 6, torch.float32).T
    second = torch.randn(200, 24)
    outputs = []
    for x in (first, second):
        optimizer = torch.optim.AdamW([p for layer in layers for p in (layer.A, layer.B)], lr=1e-2)
        rectifier.attach(optimizer)
        target = torch.randn(200, 30)
        with rectifier.observe():
            for _ in range(40):
                optimizer.zero_grad()
                sum((layer(x) - target).square().mean() for layer in layers).backward()
                optimizer.step()
        for layer in layers:
            layer.merge()
        rectifier.commit(1.0 if x is first else 0.2)
        outputs.append(torch.stack([layer(first) for layer in layers]).detach())
    return tuple(outputs)


def test_plain_pairs_keep_their_old_outputs() -> None:
    layers = [PlainLoRA(24, 30, 3, 0.5), PlainLoRA(24, 30, 4, 2.0)]
    pairs = {f"adapter {i}": LoRAPair(layer.A, layer.B, layer.scale, layer) for i, layer in enumerate(layers)}
    before, after = two_tasks(GradientRectifier(pairs), layers)
    assert_close(after, before, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", ["singular vectors", "axes"])
def test_a_start_that_lies_in_what_is_protected_is_drawn_anew(what, dtype) -> None:
    """As starts from data do, PEFT's "eva" of inputs like the old ones; of axes nothing is left by the projection."""
    x = torch.randn(50, 4, dtype=dtype) @ orthonormal(16, 4, dtype).T
    if what == "axes":
        x[:, :4], x[:, 4:] = 5 * torch.eye(4, dtype=dtype).repeat(13, 1)[:50], 0
    start = 7 * torch.linalg.svd(x, full_matrices=False).Vh[:2]
    start[1] += torch.randn(16, dtype=dtype)
    A, B = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(5, 2, dtype=dtype))
    rectifier = GradientRectifier({"one": LoRAPair(A, B)})
    rectifier.estimators["one"].observe(x)
    rectifier.commit(energy=1.0)
    V = rectifier.estimators["one"].basis.double()
    assert V.shape == (16, 4)
    assert (A.double() @ V).norm() <= TOLERANCE[dtype] * A.norm()
    assert_close(A.norm(dim=1), start.norm(dim=1), dtype)
    rectifier.attach(optimizer := torch.optim.SGD([A, B], lr=0.1))
    for p in (A, B):
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert (B @ A).double().matmul(V).norm() <= TOLERANCE[dtype] * (B @ A).norm()


def test_own_layers_keep_their_old_outputs() -> None:
    layers = [LoRALinear(nn.Linear(24, 30), r, rectify_in="step") for r in (3, 4)]
    before, after = two_tasks(GradientRectifier(nn.ModuleList(layers)), layers)
    assert_close(after, before, torch.float32)


def test_without_the_rectifier_old_outputs_do_change() -> None:
    layers = [PlainLoRA(24, 30, 3, 0.5)]
    pairs = [LoRAPair(layer.A, layer.B, layer.scale, layer) for layer in layers]
    before, after = two_tasks(GradientRectifier(pairs, rectify="none"), layers)
    assert (after - before).norm() > 100 * TOLERANCE[torch.float32] * before.norm()


def test_a_layer_of_an_earlier_call_keeps_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU tells at the next call, whose layers may be others, and fewer."""
    layer = LoRALinear(nn.Linear(6, 5), 2, rectify_in="step")
    layer(torch.randn(3, 6)).sum().backward()

    def late(*_: Any, **__: Any) -> None:
        raise ValueError("rectify_: layer 17: got |A V| = 1; found in an earlier call, which set them to 0")

    monkeypatch.setattr(ops, "rectify_", late)
    with pytest.raises(ArgumentError, match="layer 17: .* found in an earlier call"):
        GradientRectifier([layer]).rectify()


def test_two_pairs_on_one_module_share_the_estimator() -> None:
    layer = PlainLoRA(24, 30, 3, 0.5)
    other = LoRAPair(nn.Parameter(torch.randn(2, 24)), nn.Parameter(torch.zeros(30, 2)), 1.0, layer)
    rectifier = GradientRectifier({"k": (layer.A, layer.B, 0.5, layer), "v": other})
    with rectifier.observe():
        layer(torch.randn(10, 24))
    assert rectifier.estimators["k"] is rectifier.estimators["v"]
    assert rectifier.estimators["k"].rows == 10


def test_commit_before_the_merge_raises() -> None:
    layer = PlainLoRA(24, 30, 3, 0.5)
    rectifier = GradientRectifier({"k": (layer.A, layer.B, 0.5, layer)})
    with rectifier.observe():
        layer(torch.randn(10, 24))
    with torch.no_grad():
        layer.B.fill_(1.0)
    with pytest.raises(TaskBoundaryError, match="k: commit.. came while B is not zero"):
        rectifier.commit()


SHARED, MODULE = torch.zeros(2, 8), nn.Identity()


def pair_of(*pair: Any, **options: Any) -> GradientRectifier:
    return GradientRectifier({"q": pair}, **options)


def pair_with(**options: Any) -> GradientRectifier:
    return pair_of(torch.zeros(2, 8), torch.zeros(8, 2), **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GradientRectifier(nn.Linear(3, 3)), "at least one LoRA layer"),
        (lambda: GradientRectifier([LoRALinear(nn.Linear(8, 8), 2)]), "layer 0: .*rectify_in='step'"),
        (
            lambda: GradientRectifier({"q": (torch.zeros(2, 8).half(), torch.zeros(8, 2))}),
            "q: A must be float32 or float64",
        ),
        (lambda: GradientRectifier({"q": (torch.zeros(2, 8), torch.zeros(2, 8))}), r"q: A and B must be \[r, n\]"),
        (lambda: GradientRectifier([], rectify="all"), "GradientRectifier: rectify must be one of none, project"),
        (lambda: GradientRectifier({"q": 3}), r"q: each of layers must be a LoRA layer or \(A, B"),
        (lambda: pair_with(energy=2), r"energy must be in \[0, 1\], got 2"),
        (lambda: pair_with(energy=float("nan")), r"energy must be in \[0, 1\], got nan"),
        (lambda: pair_with(energy="0.9"), r"energy must be a number, in \[0, 1\], got '0.9'"),
        (lambda: pair_with(energy=True), r"energy must be a number, in \[0, 1\], got True"),
        (lambda: pair_with(damping=None), "damping must be a number, positive and finite, got None"),
        (lambda: pair_with(share="0.5"), r"share must be a number, in \[0, 1\], got '0.5'"),
        (lambda: pair_with(balance="yes"), "balance must be True or False, got 'yes'"),
        (
            lambda: pair_with(estimator="isvd", estimator_rank="8"),
            "estimator_rank must be an integer, positive, got '8'",
        ),
        (lambda: pair_with(distributed=None), "distributed must be True or False, got None"),
        (lambda: pair_with().commit("0.9"), r"q: energy must be a number, in \[0, 1\], got '0.9'"),
        (lambda: pair_with().attach(None), "attach: optimizer must be a torch.optim.Optimizer, .* got None"),
        (lambda: pair_with().load_state_dict(None), r"state must hold layers \['q'\], got None"),
        (
            lambda: pair_with().load_state_dict({"q": None}),
            "q: state must be what .* gave, with .*, got None",
        ),
        (lambda: GradientRectifier(None), "layers must be a model, or a mapping or .*, got None"),
        (lambda: GradientRectifier("blocks"), "layers must be a model, or a mapping or .*, got 'blocks'"),
        (
            lambda: GradientRectifier({"q": (numpy.zeros((2, 8)), torch.zeros(8, 2))}),
            "q: A must be a tensor of float32 or float64, got an object of type ndarray",
        ),
        (lambda: pair_of(torch.zeros(2, 8), torch.zeros(8, 2), "2"), "q: scale must be a number, finite .*, got '2'"),
        (lambda: pair_of(torch.zeros(2, 8), torch.zeros(8, 2), float("nan")), "q: scale must be finite .*, got nan"),
        (
            lambda: pair_of(torch.zeros(2, 8), torch.zeros(8, 2), 1.0, "q"),
            "q: module must be a torch.nn.Module or None",
        ),
        (
            lambda: pair_of(torch.zeros(9, 8), torch.zeros(8, 9)),
            r"with r from 1 to n <= 1048576, got \[9, 8\] and \[8, 9\]",
        ),
        (
            lambda: pair_of(torch.zeros(2, 8), torch.zeros(8, 2).double()),
            "of one dtype on one device, got float32 on cpu",
        ),
        (
            lambda: GradientRectifier([(SHARED, torch.zeros(8, 2)), (SHARED, torch.zeros(8, 2))]),
            "layer 1: A must belong to one layer, got that of layer 0",
        ),
        (
            lambda: GradientRectifier([(torch.zeros(2, n), torch.zeros(8, 2), 1.0, MODULE) for n in (8, 9)]),
            r"layer 1: A must be \[r, 8\] as others on its module, got \[r, 9\]",
        ),
    ],
    ids=range(29),
)
def test_wrong_arguments_are_named(build: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build()


def test_attach_refuses_a_foreign_optimizer() -> None:
    layer = PlainLoRA(24, 30, 3, 0.5)
    with pytest.raises(ArgumentError, match="attach: optimizer must hold the factors"):
        GradientRectifier([(layer.A, layer.B)]).attach(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


def test_reduced_matmul_precision_reaches_neither_projection_nor_check() -> None:
    torch.manual_seed(2)
    layer = PlainLoRA(768, 32, 4, 1.0)
    rectifier = GradientRectifier({"k": (layer.A, layer.B, 1.0, layer)})
    with rectifier.observe():
        layer(torch.randn(600, 200) @ torch.randn(200, 768))
    rectifier.commit(1.0)
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=1e-2)
    rectifier.attach(optimizer)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(64, 768)).square().mean().backward()
            optimizer.step()
    finally:
        torch.set_float32_matmul_precision(before)
    basis = rectifier.estimators["k"].basis
    assert basis.shape[1] > 100
    assert (layer.A.double() @ basis.double()).norm() <= 1e-5 * layer.A.norm()


def test_each_factor_is_rectified_once_by_the_optimizer_that_holds_it() -> None:
    layers = [PlainLoRA(24, 30, 3, 0.5), PlainLoRA(24, 30, 4, 2.0)]
    rectifier = GradientRectifier({str(i): LoRAPair(m.A, m.B, m.scale, m) for i, m in enumerate(layers)})
    optimizers = [torch.optim.SGD([m.A, m.B], lr=0.0) for m in layers]
    for optimizer in optimizers:
        rectifier.attach(optimizer)
    for m in layers:
        nn.init.normal_(m.B)
        m.A.grad, m.B.grad = torch.randn_like(m.A), torch.randn_like(m.B)
    want = [g.clone() for g in (layers[0].A.grad, layers[0].B.grad)]
    untouched = layers[1].A.grad.clone()
    ops.rectify_([layers[0].A], [layers[0].B], want[:1], want[1:], [None], [0.5], balance=True)
    optimizers[0].step()
    assert_close(layers[0].A.grad, want[0], torch.float32)
    assert_close(layers[0].B.grad, want[1], torch.float32)
    assert torch.equal(layers[1].A.grad, untouched)


def test_attach_refuses_a_second_time_and_half_a_layer() -> None:
    layer = PlainLoRA(24, 30, 3, 0.5)
    rectifier = GradientRectifier({"k": (layer.A, layer.B)})
    with pytest.raises(ArgumentError, match="both factors of a layer, got one of k"):
        rectifier.attach(torch.optim.SGD([layer.A]))
    optimizer = torch.optim.SGD([layer.A, layer.B])
    rectifier.attach(optimizer)
    with pytest.raises(ArgumentError, match="attached already"):
        rectifier.attach(optimizer)


def test_the_callers_autocast_does_not_reach_the_projection() -> None:
    layer, _ = PlainLoRA(64, 32, 4, 1.0), torch.manual_seed(2)
    rectifier = GradientRectifier({"k": LoRAPair(layer.A, layer.B, 1.0, layer)})
    with rectifier.observe():
        layer(torch.randn(200, 22) @ torch.randn(22, 64))
    rectifier.commit(1.0)
    basis = rectifier.estimators["k"].basis.double()
    rectifier.attach(optimizer := torch.optim.AdamW([layer.A, layer.B], lr=1e-2))
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(torch.randn(64, 64)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert (layer.A.double() @ basis).norm() <= 1e-5 * layer.A.norm()


def test_where_no_factor_has_a_gradient_the_wrong_ones_are_trained() -> None:
    layer, other = PlainLoRA(24, 30, 3, 0.5), PlainLoRA(24, 30, 3, 0.5)
    rectifier = GradientRectifier({"k": LoRAPair(layer.A, layer.B, 0.5, layer)})
    rectifier.rectify()  # nothing is protected, so nothing is lost
    rectifier.estimators["k"].observe(torch.randn(200, 6) @ torch.randn(6, 24))
    rectifier.commit(1.0)
    other(torch.randn(5, 24)).sum().backward()
    optimizer = torch.optim.SGD([layer.A, layer.B], lr=0.1)
    with pytest.warns(JanusWarning, match=r"k: no rectified factor has a gradient, .* commit\(layers=...\) names them"):
        rectifier.rectify()
    rectifier.rectify()  # said once a task
    rectifier.estimators["k"].observe(torch.randn(200, 6) @ torch.randn(6, 24))
    rectifier.commit(1.0)
    rectifier.attach(optimizer)
    with pytest.warns(JanusWarning, match="k: no rectified factor has a gradient"):
        optimizer.step()


def test_one_missing_gradient_is_named() -> None:
    layer = PlainLoRA(24, 30, 3, 0.5)
    layer.B.grad = torch.zeros_like(layer.B)
    with pytest.raises(ArgumentError, match=r"k: rectification needs both gradients, A.grad is None"):
        GradientRectifier({"k": (layer.A, layer.B)}).rectify()


def test_commit_is_all_or_nothing_and_clears_the_optimizer() -> None:
    layers = [PlainLoRA(24, 30, 3, 0.5), PlainLoRA(24, 30, 4, 2.0)]
    rectifier = GradientRectifier({str(i): LoRAPair(m.A, m.B, m.scale, m) for i, m in enumerate(layers)})
    optimizer = torch.optim.Adam([p for m in layers for p in (m.A, m.B)])
    rectifier.attach(optimizer)
    for m in layers:
        m.A.grad, m.B.grad = torch.randn_like(m.A), torch.randn_like(m.B)
    optimizer.step()
    for m in layers:
        m.merge()
    rectifier.estimators["0"].observe(torch.randn(40, 24) * torch.logspace(0, -3, 24))
    rectifier.estimators["1"].observe(torch.full((4, 24), float("nan")))
    with pytest.raises(StatisticsError, match="1: .*finite"):
        rectifier.commit()
    assert rectifier.estimators["0"].rows == 40 and rectifier.estimators["0"].basis.shape[1] == 0
    assert optimizer.state[layers[0].A]
    rectifier.estimators["1"].statistics.gram.copy_(torch.diag(torch.logspace(0, -3, 24)))
    rectifier.commit()
    assert not optimizer.state[layers[0].A]


def test_state_dict_round_trip() -> None:
    layer = PlainLoRA(24, 30, 3, 0.5)
    rectifier = GradientRectifier({"k": (layer.A, layer.B, 0.5, layer)})
    with rectifier.observe():
        layer(torch.randn(40, 24))
    rectifier.commit(0.5)
    other = GradientRectifier({"k": (layer.A, layer.B, 0.5, layer)})
    other.load_state_dict(rectifier.state_dict())
    layer.A.grad, layer.B.grad = torch.randn_like(layer.A), torch.randn_like(layer.B)
    plain = layer.A.grad.clone()
    other.rectify()
    basis = other.estimators["k"].basis
    assert basis.shape[1] > 0 and not torch.equal(layer.A.grad, plain)
    with pytest.raises(ArgumentError, match=r"layers \['v'\], got \['k'\]"):
        GradientRectifier({"v": (layer.A, layer.B)}).load_state_dict(rectifier.state_dict())
