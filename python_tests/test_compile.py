"""torch.compile with fullgraph=True: a ViT with our layers, forward and backward, observed, over many tasks."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import assert_close, needs_inductor, orthonormal, subspace
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from janus_ext import ArgumentError, GradientRectifier, LoRALinear, OnlineEstimator, inject, observing
from janus_ext.backbone import prepare_torchvision
from janus_ext.lora import LoRALayer

WIDTH, RANK = 24, 3
AMP = pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def vit(device: str = "cpu", k: int = 0, depth: int = 2, **options: Any) -> tuple[nn.Module, dict[str, LoRALayer]]:
    """A tiny ViT of timm with adapted layers, the same at every call; with k > 0 protected and in mid-task."""
    prepare_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=WIDTH, depth=depth, num_heads=2, num_classes=0)
    layers = inject(model, RANK, scale=0.7, **options)
    for layer in layers.values() if k else ():
        layer.protect(orthonormal(WIDTH, k, torch.float32))
        nn.init.normal_(layer.B, std=0.1)
    return model.to(device), layers


def compiled(model: nn.Module, backend: str = "aot_eager") -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """The model compiled as one graph, or not at all, and the counter of its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def images(device: str = "cpu", batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16).to(device)


def backward(forward: Callable[..., Any], x: torch.Tensor, amp: bool = False) -> torch.Tensor:
    """Features of a forward pass, whose backward pass fills `.grad`."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        y = forward(x)
    y.float().exp().mean().backward()  # not its square, which the final norm makes constant
    return y


def gradients(layers: dict[str, LoRALayer]) -> list[torch.Tensor]:
    return [factor.grad for layer in layers.values() for factor in (layer.A, layer.B)]


# ------------------------------------------------------------------------------------------------ forward and backward


@AMP
@pytest.mark.parametrize("mode", ["project", "tangent", "exact"])
def test_forward_and_backward_equal_eager(device: str, mode: str, amp: bool) -> None:
    x, results = images(device), []
    for compiling in (False, True):
        model, layers = vit(device, k=5, rectify=mode)
        y = backward(compiled(model)[0] if compiling else model, x, amp)
        results.append([y, *gradients(layers)])
    for want, got in zip(*results, strict=True):
        assert got.any() and got.dtype == want.dtype
        assert_close(got, want, torch.bfloat16 if amp else torch.float32)


@pytest.mark.parametrize(("mode", "k"), [("tangent", 0), ("exact", 5)])
def test_rectification_before_the_step_equals_eager(device: str, mode: str, k: int) -> None:
    x, results = images(device), []
    for compiling in (False, True):
        model, layers = vit(device, k, rectify=mode, rectify_in="step")
        backward(compiled(model)[0] if compiling else model, x)
        GradientRectifier(model).rectify()
        results.append(gradients(layers))
    for want, got in zip(*results, strict=True):
        assert_close(got, want, torch.float32)


@AMP
@needs_inductor
def test_inductor_equals_eager_with_a_growing_basis(amp: bool) -> None:
    results, counters = [], []
    for compiling in (False, True):
        model, layers = vit(depth=1)
        (layer,), estimator = layers.values(), OnlineEstimator(WIDTH)
        forward, counter = compiled(model, "inductor") if compiling else (model, None)
        results.append([])
        for k in (0, 5, 9):
            torch.manual_seed(k)
            layer.protect(orthonormal(WIDTH, k, torch.float32))
            nn.init.normal_(layer.B, std=0.1)
            model.zero_grad()
            with observing({"": layer}, {"": estimator}):
                y = backward(forward, images(), amp)
            results[-1] += [y, estimator.statistics.gram.clone(), *gradients(layers)]
            layer.merge()
        counters.append(counter)
    for want, got in zip(*results, strict=True):
        assert_close(got, want, torch.bfloat16 if amp else torch.float32)
    assert counters[1].frame_count == 1


# --------------------------------------------------------------------------------------------------------- observation


def test_observed_sketch_equals_eager(device: str) -> None:
    x, results = images(device), []
    for compiling in (False, True):
        model, layers = vit(device, k=5)
        estimators = {name: OnlineEstimator(WIDTH, "isvd", 20, device=device) for name in layers}
        with observing(layers, estimators):
            for _ in range(2):
                backward(compiled(model)[0] if compiling else model, x)
        results.append([e.commit(0.9) for e in estimators.values()])
    for want, got in zip(*results, strict=True):
        assert_close(subspace(got), subspace(want), torch.float32, 10)


@AMP
def test_observed_statistics_equal_eager(device: str, amp: bool) -> None:
    batches, results = [images(device, batch) for batch in (4, 4, 3, 3, 5)], []
    for compiling in (False, True):
        model, layers = vit(device, k=5)
        estimators = {name: OnlineEstimator(WIDTH, decay=0.9, device=device) for name in layers}
        forward, counter = compiled(model) if compiling else (model, None)
        with observing(layers, estimators):
            for x in batches:
                backward(forward, x, amp)
        results.append(estimators.values())
    for want, got in zip(*results, strict=True):
        assert got.rows == want.rows == 19 * 5
        assert torch.equal(got.statistics.gram, got.statistics.gram.mT)
        assert_close(got.statistics.gram, want.statistics.gram, torch.bfloat16 if amp else torch.float32)
    assert counter.frame_count == 2, "one graph for the first batch size and one for all others: rows are no constant"


@pytest.mark.parametrize("place", [0, 1], ids=["own layer", "nn.Linear"])
def test_observation_of_a_compiled_module_starts_and_stops_at_once(device: str, place: int) -> None:
    """As a hook would not: without a word, a graph compiled before the hook goes on without it."""
    model = nn.Sequential(LoRALinear(nn.Linear(8, 8), 2), nn.Linear(8, 8)).to(device)
    forward, counter = compiled(model)
    estimator = OnlineEstimator(8, device=device)
    x, want = torch.randn(3, 8, device=device), torch.zeros(8, 8, device=device)
    for _ in range(3):
        forward(x)
        with observing({"": model[place]}, {"": estimator}):
            forward(x)
        seen = x if place == 0 else model[0](x)
        want += seen.detach().mT @ seen.detach()
    assert estimator.rows == 9
    assert_close(estimator.statistics.gram, want, torch.float32)
    assert counter.frame_count == 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["gram", "isvd"])
@pytest.mark.parametrize("outside", ["compile", "checkpoint"])
def test_activation_checkpointing_counts_each_input_once(outside: str, kind: str, reentrant: bool) -> None:
    """Around compiled parts as well as within one graph: what the backward pass computes again runs the op again."""
    model = nn.Sequential(LoRALinear(nn.Linear(8, 8), 2), nn.Tanh(), LoRALinear(nn.Linear(8, 8), 2))
    layers = {"0": model[0], "2": model[2]}
    part = compiled(model)[0] if outside == "checkpoint" else model

    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(part, x, use_reentrant=reentrant)

    results, forward = [], compiled(checkpointed)[0] if outside == "compile" else checkpointed
    for run in (model, forward):
        torch.manual_seed(2)
        estimators = {name: OnlineEstimator(8, kind, decay=0.5) for name in layers}
        with observing(layers, estimators):
            for _ in range(2):
                run(torch.randn(5, 8, requires_grad=True)).sum().backward()
        results.append([t.double() for e in estimators.values() for t in e.statistics.tensors().values()])
    for want, got in zip(*results, strict=True):
        assert_close(got, want, torch.float32, 10)


def test_observed_pairs_of_a_compiled_model() -> None:
    """The plug-in observes modules of other people too, whenever they were compiled."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    A, B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(8, 2))
    rectifier = GradientRectifier({"only": (A, B, 1.0, model[1])})
    forward, _ = compiled(model)
    x = torch.randn(5, 8)
    forward(x)
    with rectifier.observe():
        forward(x)
    forward(x)
    assert rectifier.estimators["only"].rows == 5
    assert_close(rectifier.estimators["only"].statistics.gram, model[0](x).mT @ model[0](x), torch.float32)


def test_observation_nests_and_leaves_no_trace() -> None:
    layer, outer, inner = LoRALinear(nn.Linear(8, 8), 2), OnlineEstimator(8), OnlineEstimator(8)
    x = torch.randn(3, 8)
    with pytest.raises(KeyError), observing({"": layer}, {"": outer}):
        with observing({"": layer}, {"": inner}):
            layer(x)
        layer(x)
        raise KeyError
    assert torch.equal(layer(x), layer.linear(x))
    assert (outer.rows, inner.rows) == (6, 3)
    assert "forward" not in vars(layer)


def test_an_estimator_without_a_module_is_named() -> None:
    with pytest.raises(ArgumentError, match="modules must hold every estimator's name, blocks.1 is missing"):
        with observing({"blocks.0": nn.Linear(2, 2)}, {"blocks.1": OnlineEstimator(2)}):
            pass


def test_copy_of_an_observed_layer_runs_its_own_weights() -> None:
    layer, estimator = LoRALinear(nn.Linear(8, 8), 2), OnlineEstimator(8)
    x = torch.randn(3, 8)
    with observing({"": layer}, {"": estimator}):
        twin = copy.deepcopy(layer)
        twin(x)
    twin(x)
    assert estimator.rows == 0, "the copy was observed"
    nn.init.zeros_(layer.linear.weight)
    assert torch.equal(twin(x), twin.linear(x))


# --------------------------------------------------------------------------------------------------------------- tasks


def life(tasks: int, compiling: bool, device: str, rectify_in: str) -> tuple[list[torch.Tensor], list[int]]:
    """Tasks of three steps, the last one observed: losses, weights and projectors of all tasks; graphs after each."""
    model, layers = vit(device, rectify_in=rectify_in)
    forward, counter = compiled(model) if compiling else (model, None)
    estimators = {name: OnlineEstimator(WIDTH, device=device) for name in layers}
    trace, graphs = [], []
    for task in range(tasks):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for step in range(3):
            with observing(layers, estimators if step == 2 else {}):
                optimizer.zero_grad()
                trace.append(backward(forward, images(device)))
            if rectify_in == "step":
                GradientRectifier(model).rectify()
            optimizer.step()
        for name, layer in layers.items():
            layer.merge()
            layer.protect(estimators[name].commit(0.3 + 0.05 * task, WIDTH - RANK))
            trace += [layer.linear.weight.clone(), subspace(layer.basis)]
        graphs.append(counter.frame_count if compiling else 0)
    return trace, graphs


@pytest.mark.parametrize("rectify_in", ["backward", "step"])
def test_tasks_in_a_row_equal_eager(device: str, rectify_in: str) -> None:
    want, _ = life(3, False, device, rectify_in)
    got, graphs = life(3, True, device, rectify_in)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, torch.float32, 10)
    assert graphs == [2, 2, 2], "a graph with and one without observation, made in the first task"


def test_a_dozen_tasks_take_the_graphs_of_one() -> None:
    """k = 0, 1 and more, the same and another in each layer, far more often than torch's limit of 8 recompilations."""
    model, layers = vit()
    forward, counter = compiled(model)
    for task in range(12):
        backward(forward, images())
        for i, layer in enumerate(layers.values()):
            layer.merge()
            layer.protect(orthonormal(WIDTH, max(0, task - i * (task % 3)), torch.float32))
    assert counter.frame_count == 1


def reloaded(layer: LoRALinear, **options: bool) -> LoRALinear:
    layer.load_state_dict(copy.deepcopy(layer).state_dict(), **options)
    return layer


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, LoRALinear.double, reloaded, lambda layer: reloaded(layer, assign=True)],
    ids=["deepcopy", "double", "load_state_dict", "assign"],
)
@pytest.mark.parametrize("k", [0, 1, 4])
def test_copied_moved_and_loaded_layers_keep_k_open(change: Callable[[LoRALinear], LoRALinear], k: int) -> None:
    layer = LoRALinear(nn.Linear(8, 8), 2)
    layer.protect(orthonormal(8, k))
    layer = change(layer)
    forward, counter = compiled(layer)
    for grown in (k, 5, 0):
        layer.protect(orthonormal(8, grown)) if grown != k else None
        forward(torch.randn(3, 8).to(layer.A)).sum().backward()
    assert counter.frame_count == 1


def test_export_takes_the_basis_along() -> None:
    layer = LoRALinear(nn.Linear(8, 8), 2)
    layer.protect(orthonormal(8, 4))
    nn.init.normal_(layer.B)
    x = torch.randn(3, 8)
    program = torch.export.export(layer, (x,), strict=False)
    assert "basis" in program.graph_signature.buffers
    assert_close(program.module()(x), layer(x), torch.float32)


def test_state_dict_holds_the_basis_itself() -> None:
    """By columns, with strides that no k changes; what is written into the state arrives in the layer."""
    layer = LoRALinear(nn.Linear(8, 8), 2)
    layer.protect(orthonormal(8, 4))
    assert layer.basis.stride() == (1, 8)
    layer.state_dict()["basis"].zero_()
    x = torch.randn(3, 8)
    nn.init.normal_(layer.B)
    assert_close(layer(x), layer.linear(x) + x @ layer.A.mT @ layer.B.mT, torch.float32)


def test_sharing_memory_shares_the_basis() -> None:
    layer = LoRALinear(nn.Linear(8, 8), 2)
    layer.protect(orthonormal(8, 4))
    assert layer.share_memory().basis.is_shared()
