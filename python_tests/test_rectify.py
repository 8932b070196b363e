"""rectify_ and GradientRectifier: the batched form of Gradient Rectification (properties 2, 4 and 8)."""

import subprocess
import sys

import pytest
import torch
from conftest import TOLERANCE, assert_close, orthonormal
from torch import nn

from janus_ext import (
    ArgumentError,
    GradientRectifier,
    LoRALinear,
    LoRAPair,
    LoRAQKV,
    StatisticsError,
    TaskBoundaryError,
    _native,
    ops,
    reference,
)

SHAPES = [(20, 24, 3, 6), (30, 10, 1, 0), (16, 16, 4, 12), (8, 40, 8, 0)]  # n, m, r, k; the third has k = n - r


def layers_of(dtype: torch.dtype, device: str, mode: str) -> list[list[torch.Tensor]]:
    """Lists A, B, grad_A, grad_B, basis of float64 values rounded to dtype, A V = 0."""
    rows = []
    for n, m, r, k in SHAPES:
        V = orthonormal(n, 0 if mode == "tangent" else k)
        A = ops.project(torch.randn(r, n, dtype=torch.float64), V)
        rest = [torch.randn(s, dtype=torch.float64) for s in ((m, r), (r, n), (m, r))]
        rows.append([t.to(device, dtype) for t in (A, *rest, V)])
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("mode", ["none", "project", "tangent", "exact"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_float64_reference_layer_by_layer(device: str, dtype: torch.dtype, mode: str, balance: bool) -> None:
    A, B, gA, gB, V = layers_of(dtype, device, mode)
    scales = [1.0, 0.5, 2.0, 0.1]
    options = {"rectify": mode, "damping": 0.05, "share": 0.3, "balance": balance}
    want = [
        reference.rectified(*(t.double().cpu() for t in row), scale=s, **options)
        for *row, s in zip(A, B, gA, gB, V, scales, strict=True)
    ]
    ops.rectify_(A, B, gA, gB, V, scales, **options)
    for a, b, (dA, dB) in zip(gA, gB, want, strict=True):
        assert_close(a, dA, dtype, 10)
        assert_close(b, dB, dtype, 10)


@pytest.mark.parametrize("mode", ["none", "project", "exact"])
def test_batched_form_equals_the_backward(device: str, mode: str) -> None:
    x = torch.randn(50, 12, dtype=torch.float64, device=device)
    V = orthonormal(12, 5, device=device)
    linear = nn.Linear(12, 36, dtype=torch.float64, device=device)
    B = torch.randn(2, 12, 3, dtype=torch.float64, device=device)
    gradients = []
    for where in ("backward", "step"):
        torch.manual_seed(1)
        layer = LoRAQKV(linear, 3, scale=0.7, rectify=mode, rectify_in=where)
        layer.protect(V)
        with torch.no_grad():
            layer.B.copy_(B)
            layer.A += 0.1  # no longer safe by itself, as after a step of Adam
        layer(x).square().sum().backward()
        if where == "step":
            GradientRectifier([layer]).rectify()
        gradients.append((layer.A.grad, layer.B.grad))
    for got, want in zip(*gradients, strict=True):
        assert_close(got, want, torch.float64, 10)


def test_gradients_of_any_strides_are_rewritten_in_place(device: str) -> None:
    A, B, gA, gB, V = layers_of(torch.float64, device, "exact")
    strided = [[g.mT.contiguous().mT for g in gs] for gs in (gA, gB)]
    strided_A, strided_B = ([t.mT.contiguous().mT for t in ts] for ts in (A, B))
    ops.rectify_(A, B, gA, gB, V)
    ops.rectify_(strided_A, strided_B, *strided, V)
    for got, want in zip(strided[0] + strided[1], gA + gB, strict=True):
        assert_close(got, want, torch.float64, 10)


@pytest.mark.parametrize("mode", ["project", "exact"])
def test_many_layers_of_any_rank_and_basis(device: str, mode: str) -> None:
    rows = []
    for r in (1, 10, 64):
        for k in (0, 1, 37, 384, 448 - r):
            for strided in (False, True):
                V = orthonormal(448, k)
                A, gA = ops.project(torch.randn(r, 448, dtype=torch.float64), V), torch.randn(r, 448)
                B, gB = torch.randn(40, r), torch.randn(40, r)
                row = [t.to(device, torch.float32) for t in (A, B, gA, gB, V)]
                rows.append([t.mT.contiguous().mT for t in row] if strided else row)
    options = {"rectify": mode, "damping": 0.05, "share": 0.3, "balance": True}
    want = [reference.rectified(*(t.double().cpu() for t in row), scale=1.0, **options) for row in rows]
    _, _, gA, gB, _ = lists = [list(column) for column in zip(*rows, strict=True)]
    ops.rectify_(*lists, **options)
    for a, b, (dA, dB) in zip(gA, gB, want, strict=True):
        assert_close(a, dA, torch.float32, 10)
        assert_close(b, dB, torch.float32, 10)


def test_wrong_layer_is_named_and_nothing_is_written(device: str) -> None:
    A, B, gA, gB, V = layers_of(torch.float64, device, "exact")
    before = [g.clone() for g in gA]
    A[2] = torch.randn_like(A[2])
    if device == "cuda":
        pytest.skip("a device-side assertion ends the process's use of the device")
    with pytest.raises(ValueError, match=r"rectify_: layer 2: rectify='exact' presumes A V = 0, got \|A V\| = "):
        ops.rectify_(A, B, gA, gB, V)
    assert all(torch.equal(g, b) for g, b in zip(gA, before, strict=True))


def test_batched_tangent_with_a_basis_raises() -> None:
    A, B, gA, gB, V = layers_of(torch.float64, "cpu", "exact")
    with pytest.raises(ValueError, match="layer 0: rectify='tangent' with a basis needs G V"):
        ops.rectify_(A, B, gA, gB, V, rectify="tangent")


def test_empty_lists() -> None:
    ops.rectify_([], [], [], [], [])


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_gradient_scale_passes_through(scale: float) -> None:
    A, B, gA, gB, V = layers_of(torch.float32, "cpu", "exact")
    scaled = [[g * scale for g in gs] for gs in (gA, gB)]
    ops.rectify_(A, B, gA, gB, V)
    ops.rectify_(A, B, *scaled, V)
    for got, want in zip(scaled[0] + scaled[1], gA + gB, strict=True):
        assert_close(got / scale, want, torch.float32)


# ------------------------------------------------------------------------------------------------- on a GPU only


def full_size_layers() -> list[list[torch.Tensor]]:
    """The benchmark's case: K and V of 12 blocks, 768 x 10, k = 384, both on one basis."""
    rows = []
    for _ in range(12):
        V = orthonormal(768, 384, torch.float32, "cuda")
        for _ in "KV":
            A, gA = ops.project(torch.randn(10, 768, device="cuda"), V), torch.randn(10, 768, device="cuda")
            rows.append([A, torch.randn(768, 10, device="cuda"), gA, torch.randn(768, 10, device="cuda"), V])
    return [list(column) for column in zip(*rows, strict=True)]


needs_cuda_ops = pytest.mark.skipif(not _native.cuda_available(), reason="the compiled CUDA library is not loaded")


@pytest.mark.cuda
@needs_cuda_ops
def test_a_step_takes_at_most_eight_launches_and_does_not_wait() -> None:
    layers = full_size_layers()
    ops.rectify_(*layers)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.rectify_(*layers)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(on_device) <= 8, on_device


@pytest.mark.cuda
@needs_cuda_ops
@pytest.mark.parametrize("mode", ["project", "exact"])
def test_a_cuda_graph_replays_the_same_bits(mode: str) -> None:
    A, B, gA, gB, V = full_size_layers()
    before = [g.clone() for g in gA + gB]
    ops.rectify_(A, B, gA, gB, V, rectify=mode)
    want = [g.clone() for g in gA + gB]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.rectify_(A, B, gA, gB, V, rectify=mode)
    for g, b in zip(gA + gB, before, strict=True):
        g.copy_(b)
    graph.replay()
    assert all(torch.equal(g, w) for g, w in zip(gA + gB, want, strict=True))


@pytest.mark.cuda
@needs_cuda_ops
def test_wrong_layer_is_named_and_ends_the_use_of_the_device() -> None:
    code = """
import torch
from janus_ext import ops
A, B, V = torch.randn(3, 40, device="cuda"), torch.randn(20, 3, device="cuda"), torch.eye(40, 5, device="cuda")
safe = A.clone()
safe[:, :5] = 0
ops.rectify_([safe, A], [B, B], [torch.ones_like(A) for _ in "KV"], [torch.ones_like(B) for _ in "KV"], [V, V])
torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode != 0
    assert "rectify_: layer 1: rectify='exact' presumes A V = 0, got |A V| = " in run.stdout, run.stdout + run.stderr


# ------------------------------------------------------------------------------------------------- GradientRectifier


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


def test_own_layers_keep_their_old_outputs() -> None:
    layers = [LoRALinear(nn.Linear(24, 30), r, rectify_in="step") for r in (3, 4)]
    before, after = two_tasks(GradientRectifier(nn.ModuleList(layers)), layers)
    assert_close(after, before, torch.float32)


def test_without_the_rectifier_old_outputs_do_change() -> None:
    layers = [PlainLoRA(24, 30, 3, 0.5)]
    pairs = [LoRAPair(layer.A, layer.B, layer.scale, layer) for layer in layers]
    before, after = two_tasks(GradientRectifier(pairs, rectify="none"), layers)
    assert (after - before).norm() > 100 * TOLERANCE[torch.float32] * before.norm()


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
        (lambda: GradientRectifier({"q": 3}), r"q: must be a LoRA layer or \(A, B"),
        (lambda: GradientRectifier({"q": (torch.zeros(2, 8), torch.zeros(8, 2))}, energy=2), "energy must be in"),
    ],
    ids=range(7),
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
