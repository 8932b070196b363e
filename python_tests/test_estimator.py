"""OnlineEstimator(estimator="isvd"), and what both estimators promise alike.

docs/method.md, property 5.
"""

import warnings
from typing import Any

import numpy
import pytest
import torch
from conftest import assert_close, subspace
from torch import nn
from torch.utils.checkpoint import checkpoint

from janus_ext import (
    ArgumentError,
    GradientRectifier,
    LoRALinear,
    OnlineEstimator,
    StatisticsError,
    TaskBoundaryError,
    inject,
    observing,
    processes,
    statistics,
)
from janus_ext.backbone import prepare_torchvision

KINDS = ["gram", "isvd"]


def low_rank(rows: int, n: int, rank: int) -> torch.Tensor:
    return torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, n, dtype=torch.float64)


def estimator(n: int, kind: str = "isvd", rank: int | None = None, **options: object) -> OnlineEstimator:
    return OnlineEstimator(n, kind, rank, dtype=torch.float64, **options)


def test_both_find_the_same_subspace_task_after_task(device: str) -> None:
    pair = [estimator(20, "gram", device=device), estimator(20, "isvd", 8, device=device)]
    for _ in range(3):
        x = low_rank(60, 20, 4).to(device)
        for one in pair:
            for chunk in x.split([13, 40, 7]):
                one.observe(chunk)
        exact, sketched = (one.commit(0.95) for one in pair)
        assert exact.shape == sketched.shape
        assert_close(subspace(sketched), subspace(exact), torch.float64, 100)
        assert pair[1].rows == 0 and not pair[1].statistics.total


def test_decay_multiplies_the_energy(device: str) -> None:
    one = estimator(6, rank=6, decay=0.5, device=device)
    x = torch.randn(10, 6, dtype=torch.float64, device=device)
    one.observe(x)
    one.observe(x)
    assert_close(one.statistics.total, 1.5 * x.square().sum(), torch.float64)
    assert_close(one.statistics.S.square().sum(), one.statistics.total, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_adds_what_another_saw(kind: str) -> None:
    x = low_rank(50, 12, 3)
    whole, one, two = (estimator(12, kind) for _ in range(3))
    for target, part in ((whole, x), (one, x[:20]), (two, x[20:])):
        target.observe(part)
    one.merge(two)
    assert one.rows == 50
    assert_close(subspace(one.commit(1.0)), subspace(whole.commit(1.0)), torch.float64, 100)


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_on_where_it_stopped(kind: str) -> None:
    one, other = estimator(9, kind), estimator(9, kind)
    one.observe(torch.randn(20, 9))
    one.commit(0.6)
    one.observe(torch.randn(15, 9))
    other.load_state_dict(one.state_dict())
    assert other.rows == 15
    assert torch.equal(other.commit(0.9), one.commit(0.9))


def test_state_of_another_kind_or_rank_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match=r"state must be what state_dict\(\) gave, with U, S, total, rows, basis, got gram"
    ):
        estimator(9, rank=4).load_state_dict(estimator(9, "gram").state_dict())
    with pytest.raises(ArgumentError, match=r"U \[9, 4\], .* got U \[9, 5\]"):
        estimator(9, rank=4).load_state_dict(estimator(9, rank=5).state_dict())


def test_a_sketch_too_small_for_the_energy_warns_once_and_gives_all_it_has() -> None:
    one = estimator(20, rank=4, name="blocks.1.attn.qkv")
    one.observe(torch.randn(200, 20))
    with pytest.warns(
        UserWarning, match=r"blocks\.1\.attn\.qkv: an energy of 0.9 .* rank 4 holds 0\.\d+: raise the estimator's rank"
    ):
        assert one.commit(0.9).shape == (20, 4)
    one.observe(torch.randn(200, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.commit(0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_and_wider_inputs(kind: str) -> None:
    one, other = OnlineEstimator(8, kind), OnlineEstimator(8, kind)
    x = torch.randn(50, 8, dtype=torch.float64)
    with torch.inference_mode():
        one.observe(x)
    other.observe(x.float())
    assert_close(subspace(one.commit(0.5)), subspace(other.commit(0.5)), torch.float32, 10)
    one.observe(x)
    assert one.rows == 50 and one.commit(1.0).shape == (8, 8)


@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1e18, 3e19])
def test_large_and_small_float32_inputs_keep_their_energy(scale: float) -> None:
    one, other = OnlineEstimator(6, "isvd"), OnlineEstimator(6, "isvd")
    x = torch.randn(20, 6) * torch.logspace(0, -1, 6)
    one.observe(scale * x)
    other.observe(x)
    assert_close(subspace(one.commit(0.9)), subspace(other.commit(0.9)), torch.float32, 10)


def test_state_without_a_part_is_refused() -> None:
    state = estimator(6).state_dict()
    del state["basis"]
    with pytest.raises(ArgumentError, match="with U, .*, basis, got U, S, total, rows"):
        estimator(6).load_state_dict(state)


def test_bad_input_names_the_layer_and_changes_nothing() -> None:
    one = estimator(6, rank=3, name="blocks.2.attn.qkv")
    one.observe(torch.randn(8, 6))
    before = one.state_dict()
    with pytest.raises(StatisticsError, match=r"blocks\.2\.attn\.qkv: .*must be finite.*nothing was added"):
        one.observe(torch.full((2, 6), float("nan")))
    assert all(torch.equal(now, before[name]) for name, now in one.state_dict().items())
    with pytest.raises(StatisticsError, match="previous basis stays"):
        zero = estimator(6)
        zero.observe(torch.zeros(3, 6))
        zero.commit(0.9)


def observed(modules: Any, estimators: Any) -> None:
    with observing(modules, estimators):
        raise AssertionError("observes what cannot be")


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda: OnlineEstimator(6, dtype=torch.bfloat16),
            "dtype must be torch.float32 or torch.float64, got torch.bf",
        ),
        (lambda: estimator(6, rank=7), "rank must be from 1 to dim = 6, got 7"),
        (lambda: estimator(6, rank=0), "rank must be from 1 to dim = 6, got 0"),
        (lambda: estimator(6, "gram", rank=3), "rank belongs to estimator='isvd', got 3 with 'gram'"),
        (lambda: estimator(6, energy_power=2), "energy_power must be 1 with estimator='isvd', got 2"),
        (lambda: estimator(6).merge(estimator(6, "gram")), "other must hold a Sketch, got a Gram"),
        (lambda: OnlineEstimator(6, dtype="float32"), "dtype must be torch.float32 or torch.float64, got 'float32'"),
        (lambda: OnlineEstimator("6"), "dim must be an integer, from 1 to 1048576, got '6'"),
        (lambda: OnlineEstimator(-6), "dim must be from 1 to 1048576, got -6"),
        (lambda: OnlineEstimator(True), "dim must be an integer, from 1 to 1048576, got True"),
        (lambda: OnlineEstimator(6.0), "dim must be an integer, from 1 to 1048576, got 6.0"),
        (lambda: OnlineEstimator(None), "dim must be an integer, from 1 to 1048576, got None"),
        (lambda: OnlineEstimator(6, None), "estimator must be one of gram, isvd, got None"),
        (lambda: estimator(6, rank="3"), "rank must be an integer, from 1 to dim = 6, got '3'"),
        (lambda: estimator(6, rank=True), "rank must be an integer, from 1 to dim = 6, got True"),
        (lambda: estimator(6, "gram", rank=numpy.zeros(2)), "rank belongs to .*, got an object of type ndarray with"),
        (lambda: OnlineEstimator(6, decay=float("nan")), r"decay must be in \(0, 1\], got nan"),
        (lambda: OnlineEstimator(6, decay="1"), r"decay must be a number, in \(0, 1\], got '1'"),
        (lambda: OnlineEstimator(6, energy_power="2"), "energy_power must be an integer, 1 or 2, got '2'"),
        (lambda: OnlineEstimator(6, distributed=1), "distributed must be True or False, got 1"),
        (lambda: OnlineEstimator(6).commit(float("nan")), r"layer: energy must be in \[0, 1\], got nan"),
        (lambda: OnlineEstimator(6).commit(None), r"layer: energy must be a number, in \[0, 1\], got None"),
        (lambda: OnlineEstimator(6).commit(0.9, "3"), "max_rank must be an integer, from k = 0 to dim = 6, got '3'"),
        (
            lambda: OnlineEstimator(6).observe(numpy.zeros((2, 6))),
            r"layer: x must be a tensor \[..., 6\], got an object of type ndarray",
        ),
        (
            lambda: OnlineEstimator(6).observe(torch.zeros(2, 5)),
            r"x must be \[..., 6\] of a floating dtype, got \[2, 5\]",
        ),
        (lambda: OnlineEstimator(6).observe(torch.zeros(2, 6, dtype=torch.int64)), "floating dtype, got .*int64"),
        (lambda: OnlineEstimator(6).observe(torch.tensor(1.0)), r"floating dtype, got \[\] of torch.float32"),
        (lambda: OnlineEstimator(6).merge(None), "other must be an OnlineEstimator, got None"),
        (
            lambda: OnlineEstimator(6).load_state_dict(None),
            "with gram, rows, basis, got None",
        ),
        (
            lambda: observed({"a": None}, {"a": OnlineEstimator(6)}),
            "modules must hold modules, got None for a",
        ),
        (
            lambda: observed({"a": nn.Identity()}, {"a": 6}),
            "estimators must hold OnlineEstimators, got 6 for a",
        ),
    ],
    ids=range(31),
)
def test_wrong_arguments_are_named(use: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        use()


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(device: str, kind: str) -> None:
    one = estimator(6, kind, device=device)
    op = torch.ops.janus_ext.observe_gram_ if kind == "gram" else torch.ops.janus_ext.observe_sketch_
    x = torch.randn(5, 6, dtype=torch.float64, device=device)
    torch.library.opcheck(op.default, (*one.statistics.tensors().values(), x, 0.9))


@pytest.mark.parametrize("kind", KINDS)
def test_what_inference_mode_made_goes_on_outside(kind: str) -> None:
    with torch.inference_mode():
        one = OnlineEstimator(6, kind)
        one.observe(torch.randn(9, 6))
        state = one.state_dict()
    one.observe(torch.randn(9, 6))
    one.load_state_dict(state)
    one.observe(torch.randn(9, 6))
    assert one.rows == 18 and one.commit(1.0).shape == (6, 6)
    one.observe(torch.randn(9, 6))
    assert one.rows == 9


# ----------------------------------------------------------------------------------------------- what is kept, and once


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_autograd_knows_is_kept(kind: str) -> None:
    one = OnlineEstimator(6, kind)
    one.observe(torch.randn(9, 6, requires_grad=True))
    assert not one.commit(0.9).requires_grad
    state = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in one.state_dict().items()}
    one.load_state_dict(state)
    one.observe(torch.randn(9, 6))
    assert not any(t.requires_grad for t in one.state_dict().values())
    assert not one.adopt(torch.eye(6, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_counts_each_input_once(kind: str, reentrant: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])
    results = []
    for checkpointing in (False, True):
        seen = {str(i): estimator(6, kind, decay=0.5) for i in range(3)}
        generator = torch.Generator().manual_seed(2)
        with observing({str(i): block[0] for i, block in enumerate(model)}, seen):
            for _ in range(2):
                y = torch.randn(5, 6, generator=generator, requires_grad=True)
                for block in model:
                    y = checkpoint(block, y, use_reentrant=reentrant) if checkpointing else block(y)
                y.sum().backward()
        results.append([tensor for one in seen.values() for tensor in one.state_dict().values()])
    assert seen["2"].rows == 10
    assert all(torch.equal(got, want) for want, got in zip(*results, strict=True))


def test_timm_s_checkpointing_counts_each_input_once() -> None:
    prepare_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    layers = inject(model, 3, rectify_in="step")
    model.set_grad_checkpointing(True)
    rectifier = GradientRectifier(model)
    with rectifier.observe():
        model(torch.randn(4, 3, 16, 16)).exp().mean().backward()
    assert [rectifier.estimators[name].rows for name in layers] == [20, 20]
    assert all(layer.B.grad.any() for layer in layers.values())


# ------------------------------------------------------------------------------------------------------ sums by hand


def test_what_was_summed_by_hand_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics.Gram, "all_reduce", lambda *_: None)  # with processes: test_processes.py
    one, other = OnlineEstimator(6), OnlineEstimator(6)
    one.observe(torch.randn(9, 6))
    one.all_reduce()
    with pytest.raises(TaskBoundaryError, match=r"layer: observe\(\) after all_reduce\(\) would count"):
        one.observe(torch.randn(9, 6))
    with pytest.raises(TaskBoundaryError, match=r"all_reduce\(\) comes once a task"):
        one.all_reduce()
    with pytest.raises(TaskBoundaryError, match="before the merge for both, or for none"):
        one.merge(other)
    assert one.state_dict()["rows"] == one.rows == 9
    with monkeypatch.context() as patch, pytest.raises(TaskBoundaryError, match=r"state_dict\(\) comes before all_red"):
        patch.setattr(processes, "count", lambda: 2)
        one.state_dict()  # each process would be given the sum
    one.commit(0.9)
    assert one.state_dict()["basis"].shape[0] == 6
    one.observe(torch.randn(9, 6))


@pytest.mark.parametrize("own", [True, False], ids=["layer", "linear"])
def test_under_autocast_the_input_counts_as_it_is_multiplied(device: str, own: bool) -> None:
    """A LayerNorm before the layer gives float32, and the layer multiplies bfloat16: that is to be protected."""
    module = nn.Linear(16, 8, device=device)
    module = LoRALinear(module, 2) if own else module
    seen = []
    one = OnlineEstimator(16, device=device)
    one.statistics.observe = lambda x, decay: seen.append(x)
    x = torch.randn(4, 16, device=device)
    with torch.autocast(device, torch.bfloat16), observing({"a": module}, {"a": one}):
        y, named = module(x), module(**{"x" if own else "input": x})
    assert [s.dtype for s in seen] == [torch.bfloat16] * 2 and torch.equal(seen[0], x.bfloat16())
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(module(x), y) and torch.equal(named, y)
    with observing({"a": module}, {"a": one}):
        module(x)
    assert seen[2].dtype == torch.float32


def test_a_module_with_a_child_named_enter_is_observed_and_left_alone() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.enter(x))

    block, x = Block(), torch.randn(3, 8)
    want = block(x)
    with observing({"a": block}, {"a": OnlineEstimator(8)}):
        assert torch.equal(block(x), want)


@pytest.mark.parametrize("basis", [torch.ones(6, 2), torch.full((6, 1), float("nan")), torch.eye(6, 2) * 1.01])
def test_a_basis_that_is_not_orthonormal_is_refused(basis: torch.Tensor) -> None:
    known = estimator(6, "gram")
    for call in (known.adopt, lambda V: known.load_state_dict({**known.state_dict(), "basis": V})):
        with pytest.raises(ArgumentError, match="basis must be orthonormal"):
            call(basis)
    assert known.basis.shape == (6, 0)
