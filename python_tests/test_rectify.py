"""rectify_: the batched form of Gradient Rectification (docs/method.md, properties 2, 4, 8 and 9)."""

import re
from collections.abc import Callable

import pytest
import torch
from conftest import assert_close, orthonormal
from torch import nn

from janus_ext import GradientRectifier, LoRAQKV, _native, ops, reference

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


def layers_on_one_basis(device: str) -> list[list[torch.Tensor]]:
    """Layers and stacks of targets of several shapes and dtypes, half of them on some of the others' directions.

    More rows than one product takes, more targets than are solved together.
    """
    wide = orthonormal(16, 8)
    rows = []
    for dtype in (torch.float64, torch.float32):
        V = wide.to(device, dtype)
        for targets, r, m in ((), 3, 8), ((2,), 4, 12), ((), 3, 30), ((3,), 1, 8), ((5,), 8, 8):
            for basis in (V, V[:, :5]):
                A = ops.project(torch.randn(*targets, r, 16, dtype=torch.float64), wide).to(device, dtype)
                like = {"dtype": dtype, "device": device}
                B, gB = (torch.randn(*targets, m, r, **like) for _ in "Bg")
                rows.append([A, B, torch.randn(*targets, r, 16, **like), gB, basis])
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("mode", ["project", "exact"])
def test_layers_of_any_shape_may_share_a_basis(device: str, mode: str) -> None:
    A, B, gA, gB, V = layers_on_one_basis(device)
    scales = [0.5 + i for i in range(len(A))]
    options = {"rectify": mode, "damping": 0.05, "share": 0.3, "balance": False}
    want = [
        reference.rectified(*(t.double().cpu() for t in row), scale=s, **options)
        for *row, s in zip(A, B, gA, gB, V, scales, strict=True)
    ]
    ops.rectify_(A, B, gA, gB, V, scales, **options)
    for a, b, (dA, dB) in zip(gA, gB, want, strict=True):
        assert_close(a, dA, a.dtype, 10)
        assert_close(b, dB, b.dtype, 10)


@pytest.mark.parametrize("wrong", [5, 9])
def test_of_layers_on_one_basis_the_wrong_one_is_named(wrong: int) -> None:
    A, B, gA, gB, V = layers_on_one_basis("cpu")
    before = [g.clone() for g in gA + gB]
    A[wrong] = torch.randn_like(A[wrong])
    with pytest.raises(ValueError, match=rf"layer {wrong}: ") as error:
        ops.rectify_(A, B, gA, gB, V)
    inside, whole = (float(text) for text in re.findall(r" = (\d+\.\d+)", str(error.value)))
    assert inside == pytest.approx(float((A[wrong] @ V[wrong]).norm()), rel=1e-4)
    assert whole == pytest.approx(float(A[wrong].norm()), rel=1e-4)
    assert all(torch.equal(g, b) for g, b in zip(gA + gB, before, strict=True))


def test_wrong_layer_is_named_and_nothing_is_written(device: str) -> None:
    A, B, gA, gB, V = layers_of(torch.float64, device, "exact")
    before = [g.clone() for g in gA]
    A[2] = torch.randn_like(A[2])
    with pytest.raises(ValueError, match=r"rectify_: layer 2: rectify='exact' presumes A V = 0, got \|A V\| = "):
        ops.rectify_(A, B, gA, gB, V)
    assert all(torch.equal(g, b) for g, b in zip(gA, before, strict=True))


def test_of_several_wrong_layers_the_first_is_named() -> None:
    A, B, gA, gB, V = layers_on_one_basis("cpu")
    for i in (5, 8, 3):
        A[i] = torch.randn_like(A[i])
    with pytest.raises(ValueError, match="layer 3: "):
        ops.rectify_(A, B, gA, gB, V)


@pytest.mark.parametrize("function", [ops.rectify_, reference.rectify_])
@pytest.mark.parametrize("rank", [3, 65])
@pytest.mark.parametrize("scale", [1e-20, 1e-25])
def test_a_tiny_scale_passes_through(device: str, scale: float, rank: int, function: Callable[..., None]) -> None:
    """Its square, or that's reciprocal, is no float32, but what it multiplies may be small."""
    shapes = [(rank, 80), (80, rank), (rank, 80), (80, rank)]
    A, B, gA, gB = ([torch.randn(shape, device=device)] for shape in shapes)
    V = [torch.zeros(80, 0, device=device)]
    small = [[g * 1e-30 for g in gs] for gs in (gA, gB)]
    options = {"rectify": "exact", "damping": 0.1, "balance": False}
    ops.rectify_(A, B, gA, gB, V, [1.0], **options)
    function(A, B, *small, V, [scale], **options)
    for got, want in zip(small[0] + small[1], gA + gB, strict=True):
        assert_close(got.double() * scale**2 * 1e30, want, torch.float32, 20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["project", "tangent", "exact"])
def test_writing_counts_as_a_change(device: str, mode: str, dtype: torch.dtype) -> None:
    """Autograd must see that what it saved is another tensor now; so must whoever watches versions."""
    A, B, gA, gB, V = layers_of(dtype, device, mode)
    weights = torch.ones_like(gA[0], requires_grad=True)
    loss = (weights * gA[0]).sum()
    before = [g._version for g in gA + (gB if mode != "project" else [])]
    ops.rectify_(A, B, gA, gB, V, rectify=mode)
    assert all(g._version > b for g, b in zip(gA + (gB if mode != "project" else []), before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
def test_wrong_layer_gets_no_step_and_is_named_by_the_next_call() -> None:
    layers = full_size_layers()
    A, _, gA, gB, _ = layers
    A[7] = torch.randn_like(A[7])
    ops.rectify_(*layers)  # does not wait, so it cannot know
    torch.cuda.synchronize()
    for i, (a, b) in enumerate(zip(gA, gB, strict=True)):
        assert bool(a.any() or b.any()) == (i != 7)
    A[7] = ops.project(A[7], layers[-1][7])
    before = [g.clone() for g in gA + gB]
    with pytest.raises(ValueError, match=r"layer 7: .* presumes A V = 0, got \|A V\| = \d.*found in an earlier call"):
        ops.rectify_(*layers)
    assert all(torch.equal(g, b) for g, b in zip(gA + gB, before, strict=True))
    ops.rectify_(*layers)  # said once


@pytest.mark.cuda
@needs_cuda_ops
def test_a_graph_notes_a_wrong_layer_too() -> None:
    layers = full_size_layers()
    safe = layers[0][3].clone()
    ops.rectify_(*layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.rectify_(*layers)
    graph.replay()
    layers[0][3].normal_()
    graph.replay()
    torch.cuda.synchronize()
    layers[0][3].copy_(safe)
    with pytest.raises(ValueError, match="layer 3: .*found in an earlier call"):
        ops.rectify_(*layers)
