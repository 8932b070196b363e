"""GradientRectifier in loops of many kinds: closures, clipping, wrapped optimizers, factors from elsewhere.

docs/method.md, property 2.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_close
from test_rectifier import PlainLoRA
from torch import nn

from janus_ext import ArgumentError, GradientRectifier, LoRALinear, LoRAPair, TaskBoundaryError, ops

# ------------------------------------------------------------------------------------------- steps that take a closure


def in_mid_task(rectify: str = "exact") -> tuple[PlainLoRA, GradientRectifier, torch.Tensor]:
    """A protected pair whose B has left zero, its rectifier, and old inputs."""
    torch.manual_seed(3)
    layer, old = PlainLoRA(24, 30, 3, 0.5), torch.randn(200, 6) @ torch.randn(6, 24)
    rectifier = GradientRectifier({"k": LoRAPair(layer.A, layer.B, 0.5, layer)}, rectify=rectify)
    rectifier.estimators["k"].observe(old)
    rectifier.commit(1.0)
    nn.init.normal_(layer.B, std=0.1)
    return layer, rectifier, old


def loss_of(layer: nn.Module) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, target = torch.randn(64, 24, generator=generator), torch.randn(64, 30, generator=generator)

    def closure() -> torch.Tensor:
        layer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("how", ["positional", "keyword", "nothing left to do"])
@pytest.mark.parametrize("rectify", ["project", "exact"])
def test_a_step_with_a_closure_equals_backward_and_step(rectify: str, how: str) -> None:
    results = []
    for with_closure in (False, True):
        layer, rectifier, _ = in_mid_task(rectify)
        optimizer = torch.optim.SGD([layer.A, layer.B], lr=0.1, momentum=0.9)
        rectifier.attach(optimizer)
        closure = loss_of(layer)
        for _ in range(3):
            if with_closure and how == "positional":
                loss = optimizer.step(closure)
            elif with_closure and how == "keyword":
                loss = optimizer.step(closure=closure)
            else:
                loss = closure()
                optimizer.step(*[lambda: None] if with_closure else [])
            assert loss.isfinite()
        results.append((layer.A.detach(), layer.B.detach()))
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_every_evaluation_of_lbfgs_is_rectified(line_search: str | None) -> None:
    """Under "project" A moves by rectified gradients alone: whatever LBFGS makes of them, A V stays what it was."""
    layer, rectifier, _ = in_mid_task("project")
    V = rectifier.estimators["k"].basis
    before, closure = layer.A.detach().clone(), loss_of(layer)
    optimizer = torch.optim.LBFGS([layer.A, layer.B], max_iter=8, line_search_fn=line_search)
    rectifier.attach(optimizer)
    first = optimizer.step(closure)
    assert closure() < 0.9 * first
    moved = layer.A.detach() - before
    assert moved.norm() > 0.1 * before.norm()
    assert (moved @ V).norm() <= 1e-4 * moved.norm()


def test_lbfgs_keeps_old_outputs() -> None:
    layer, rectifier, old = in_mid_task()
    optimizer = torch.optim.LBFGS([layer.A, layer.B], max_iter=8, line_search_fn="strong_wolfe")
    rectifier.attach(optimizer)
    closure = loss_of(layer)
    first = optimizer.step(closure)
    assert closure() < 0.9 * first
    assert_close(layer(old), layer.base(old), torch.float32)


# ------------------------------------------------------------------------------------ factors that come from elsewhere


def test_a_loaded_rectifier_takes_new_factors() -> None:
    _, rectifier, old = in_mid_task()
    layer = PlainLoRA(24, 30, 3, 0.5)
    other = GradientRectifier({"k": (layer.A, layer.B, 0.5, layer)})
    norms = layer.A.detach().norm(dim=1)
    other.load_state_dict(rectifier.state_dict())
    V = other.estimators["k"].basis
    assert (layer.A @ V).norm() <= 1e-6 * layer.A.norm()
    assert_close(layer.A.detach().norm(dim=1), norms, torch.float32)
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=1e-2)
    other.attach(optimizer)
    for _ in range(4):
        optimizer.step(loss_of(layer))
    assert layer.B.any()
    assert_close(layer(old), layer.base(old), torch.float32)


def test_loading_goes_on_with_the_very_factors_in_mid_task() -> None:
    layer, rectifier, _ = in_mid_task()
    before = layer.A.detach().clone()
    other = GradientRectifier({"k": (layer.A, layer.B, 0.5, layer)})
    other.load_state_dict(rectifier.state_dict())
    assert torch.equal(layer.A, before)
    loss_of(layer)()
    other.rectify()


@pytest.mark.parametrize("own", [False, True])
def test_a_state_that_the_update_does_not_fit_is_refused(own: bool) -> None:
    _, rectifier, _ = in_mid_task()
    layer = LoRALinear(nn.Linear(24, 30), 3, rectify_in="step") if own else PlainLoRA(24, 30, 3, 0.5)
    nn.init.normal_(layer.B)
    other = GradientRectifier({"k": layer if own else (layer.A, layer.B, 0.5, layer)})
    with pytest.raises(TaskBoundaryError, match=r"k: load_state_dict.. came while B is not zero"):
        other.load_state_dict(rectifier.state_dict())
    assert other.estimators["k"].basis.shape[1] == 0


def test_a_state_that_leaves_no_room_for_the_rank_is_refused() -> None:
    _, rectifier, _ = in_mid_task()
    factors = [(torch.zeros(r, 24), torch.zeros(30, r)) for r in (18, 19)]
    GradientRectifier({"k": factors[0]}).load_state_dict(rectifier.state_dict())
    with pytest.raises(ArgumentError, match=r"k: basis must leave room for rank 19, k <= n - r = 5, got k = 6"):
        GradientRectifier({"k": factors[1]}).load_state_dict(rectifier.state_dict())


def test_loading_protects_own_layers() -> None:
    _, rectifier, old = in_mid_task()
    layer = LoRALinear(nn.Linear(24, 30), 3, rectify_in="step")
    other = GradientRectifier({"k": layer})
    other.load_state_dict(rectifier.state_dict())
    assert layer.basis.shape == (24, 6)
    nn.init.normal_(layer.B)
    assert_close(layer(old), layer.linear(old), torch.float32)
    before = layer.A.detach().clone()
    other.load_state_dict(rectifier.state_dict())  # again, in mid-task: the layer has this basis already
    assert torch.equal(layer.A, before)


def test_factors_drawn_anew_are_projected_before_the_first_step() -> None:
    layer, rectifier, old = in_mid_task()
    nn.init.zeros_(layer.B)
    rectifier.attach(torch.optim.SGD([layer.A, layer.B]))
    optimizer = torch.optim.AdamW([layer.A, layer.B], lr=1e-2)
    nn.init.normal_(layer.A)
    rectifier.attach(optimizer)
    assert (layer.A @ rectifier.estimators["k"].basis).norm() <= 1e-6 * layer.A.norm()
    nn.init.normal_(layer.A)  # and after attach()
    for _ in range(3):
        optimizer.step(loss_of(layer))
    assert_close(layer(old), layer.base(old), torch.float32)


# -------------------------------------------------------------------------------------------------- a loop that clips


def clipping_loop(projecting: bool, fused: bool = False) -> tuple[PlainLoRA, torch.Tensor]:
    layer, rectifier, old = in_mid_task()
    nn.init.zeros_(layer.B)
    nn.init.normal_(layer.A)
    optimizer, closure = torch.optim.Adam([layer.A, layer.B], lr=1e-2, fused=fused), loss_of(layer)
    for _ in range(4):
        closure()
        rectifier.rectify()
        nn.utils.clip_grad_norm_([layer.A, layer.B], 0.1)
        optimizer.step()
        if projecting:
            rectifier.project()
    return layer, old


def test_a_loop_that_clips_keeps_old_outputs() -> None:
    layer, old = clipping_loop(projecting=True)
    assert layer.B.any()
    assert_close(layer(old), layer.base(old), torch.float32)


@pytest.mark.parametrize("fused", [False, True])  # fused steps count no version of what they write
def test_a_loop_that_clips_and_does_not_project_is_told_so(fused: bool) -> None:
    with pytest.raises(ArgumentError, match=r"k: A V must be 0 while B is not: call project\(\) after each optimizer"):
        clipping_loop(projecting=False, fused=fused)


def test_a_gradient_that_is_rectified_again_before_its_step_leaves_the_factors() -> None:
    layer, rectifier, _ = in_mid_task()
    before = layer.A.detach().clone()
    for _ in range(3):  # as where a scaler of losses skips steps
        loss_of(layer)()
        rectifier.rectify()
    assert_close(layer.A.detach(), before, torch.float32)


def test_rectify_beside_an_attached_optimizer_is_refused() -> None:
    layer, rectifier, _ = in_mid_task()
    rectifier.attach(torch.optim.SGD([layer.A, layer.B]))
    loss_of(layer)()
    before = layer.A.grad.clone()
    with pytest.raises(ArgumentError, match=r"k: rectify\(\) would come twice"):
        rectifier.rectify()
    assert torch.equal(layer.A.grad, before)


def test_what_the_op_complains_of_has_the_layer_s_name() -> None:
    layer, rectifier, _ = in_mid_task()
    other = GradientRectifier({"blocks.3": (layer.A, layer.B, 0.5, layer)}, rectify="tangent")
    other.load_state_dict({"blocks.3": rectifier.state_dict()["k"]})
    loss_of(layer)()
    with pytest.raises(ArgumentError, match=r"blocks\.3: rectify='tangent' with a basis needs G V"):
        other.rectify()


# ---------------------------------------------------------------------------------------------- optimizers in wrappers


class Wrapper(torch.optim.Optimizer):
    """As accelerate's and Lightning's: an Optimizer by name, with hooks of the one it holds."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.optimizer.step(closure)


class Sharing:
    """As Fabric's and older ones of Lightning's: of the class of the one it holds, with a copy of its `__dict__`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__.update(optimizer.__dict__)
        self._optimizer = optimizer
        self.__class__ = type("Sharing", (Sharing, type(optimizer)), {})

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self._optimizer.step(closure)


def accelerated(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(optimizer)


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, lambda inner: Wrapper(Wrapper(inner)), Sharing, accelerated],
    ids=[1, 2, "sharing", "accelerate"],
)
def test_a_wrapped_optimizer_rectifies(wrap: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]) -> None:
    results = []
    for make in (lambda inner: inner, wrap):
        layer, rectifier, _ = in_mid_task()
        optimizer = make(torch.optim.Adam([layer.A, layer.B], lr=1e-2))
        rectifier.attach(optimizer)
        with pytest.raises(ArgumentError, match="attached already"):
            rectifier.attach(optimizer)
        loss_of(layer)()
        optimizer.step()
        results.append(layer.A.detach())
        nn.init.zeros_(layer.B)
        rectifier.estimators["k"].observe(torch.randn(9, 24))
        rectifier.commit(0.5)
        assert layer.A not in optimizer.state
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------ gradients from another process


@pytest.mark.parametrize("between", ["a step", "a pass without gradients", "another A"])
def test_gradients_without_a_forward_of_their_own_are_rectified_with_the_present_A(between: str) -> None:
    """As in a process that has no image of a step: the others' gradients are all it gets."""
    torch.manual_seed(3)
    layer = LoRALinear(nn.Linear(24, 30), 3, rectify_in="step")
    rectifier = GradientRectifier([layer])
    with rectifier.observe():
        layer(torch.randn(200, 6) @ torch.randn(6, 24))
    rectifier.commit(1.0)
    optimizer = torch.optim.SGD([layer.A, layer.B], lr=0.1)
    nn.init.normal_(layer.B)
    if between == "a step":
        layer(torch.randn(8, 24)).square().mean().backward()
        rectifier.rectify()
        optimizer.step()
    with torch.no_grad():
        layer(torch.randn(8, 24))
        if between == "another A":
            layer.A.copy_(torch.randn_like(layer.A))
    plain = [torch.randn_like(factor) for factor in (layer.A, layer.B)]
    layer.A.grad, layer.B.grad = (gradient.clone() for gradient in plain)
    rectifier.rectify()
    lists = [[t] for t in (layer.effective_A(), layer.B.detach(), *plain, layer.basis)]
    ops.rectify_(*lists, [layer.scale], layer.rectification)
    assert torch.equal(layer.A.grad, lists[2][0]) and torch.equal(layer.B.grad, lists[3][0])
