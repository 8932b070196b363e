"""LoRA-DRS: the drift-resistant space from inputs seen by hand, what stays in it, the triplet loss, the class means."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, make_trainer, relative_error, subspace, task_of
from torch import Tensor, nn

from janus_ext import LoRAQKV
from janus_ext.errors import StatisticsError
from janus_ext.methods import METHODS
from janus_ext.methods.lora_drs import distances, triplet_loss

SHARE = {"energy_start": 0.9, "energy_end": 0.9}  # of the trace: 32 inputs are few for 0.99


# the triplet loss ----------------------------------------------------------------------------------------------------
def triplet_by_loops(features: np.ndarray, targets: list[int], prototypes: np.ndarray, margin: float) -> float:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    terms = []
    for i, f in enumerate(unit):
        farthest, nearest = 0.0, np.inf
        for j, other in enumerate(unit):
            distance = np.linalg.norm(f - other)
            if targets[i] == targets[j]:
                farthest = max(farthest, distance)
            else:
                nearest = min(nearest, distance)
        for prototype in prototypes:
            nearest = min(nearest, np.linalg.norm(f - prototype))
        terms.append(max(0.0, farthest - nearest + margin))
    return float(np.mean(terms))


BATCHES = {  # targets, number of old prototypes
    "several classes and old ones": ([0, 1, 0, 2, 1, 0, 2], 5),
    "several classes, no old ones": ([0, 1, 0, 2, 1, 0, 2], 0),
    "one class and old ones": ([1, 1, 1, 1], 3),
    "one class alone": ([1, 1, 1, 1], 0),
    "single samples": ([0, 1, 2, 3], 2),
    "one image": ([0], 2),
    "one image alone": ([0], 0),
}


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_triplet_loss_is_its_definition(name, margin, dtype):
    targets, old = BATCHES[name]
    features = (3 * torch.randn(len(targets), 6, dtype=torch.float64)).to(dtype).requires_grad_()
    prototypes = F.normalize(torch.randn(old, 6, dtype=torch.float64), dim=1).to(dtype)
    loss = triplet_loss(features, torch.tensor(targets), prototypes, margin)
    want = triplet_by_loops(features.detach().double().numpy(), targets, prototypes.double().numpy(), margin)
    assert abs(float(loss.detach()) - want) <= TOLERANCE[dtype] * max(1.0, want)
    loss.backward()
    assert torch.isfinite(features.grad).all()
    if len(set(targets)) + old == 1:  # nothing to stay away from
        assert loss == 0 and not features.grad.any()


@pytest.mark.parametrize("name", ["several classes and old ones", "one class and old ones", "single samples"])
def test_the_triplet_loss_has_its_gradient(name):
    targets, old = BATCHES[name]
    features = torch.randn(len(targets), 6, dtype=torch.float64, requires_grad=True)
    prototypes = F.normalize(torch.randn(old, 6, dtype=torch.float64), dim=1)
    assert torch.autograd.gradcheck(lambda f: triplet_loss(f, torch.tensor(targets), prototypes, 2.0), features)
    assert triplet_loss(features, torch.tensor(targets), prototypes, 2.0) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_features_are_at_no_distance_and_without_gradient(dtype):
    """An image is at distance 0 of itself and of a copy of itself, whatever the rounding of their lengths."""
    features = torch.randn(50, 64, dtype=dtype).repeat(2, 1).requires_grad_()
    unit = F.normalize(features, dim=1)
    distance = distances(unit, unit)
    assert not distance.diagonal().any() and not distance.diagonal(50).any()
    (distance.diagonal().sum() + distance.diagonal(50).sum()).backward()
    assert not features.grad.any()


def test_the_triplet_loss_does_not_see_lengths():
    features, targets = torch.randn(6, 8, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2])
    prototypes = F.normalize(torch.randn(2, 8, dtype=torch.float64), dim=1)
    lengths = torch.rand(6, 1, dtype=torch.float64) + 0.5
    same = triplet_loss(features, targets, prototypes, 1.0)
    assert relative_error(triplet_loss(lengths * features, targets, prototypes, 1.0), same) <= 1e-12


# a whole run ---------------------------------------------------------------------------------------------------------
def weights_now(method) -> dict[str, Tensor]:
    return {name: torch.stack(layer.target_weights()) for name, layer in method.layers.items()}


def inputs_by_hand(method, task, weights: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """[N, n] of every layer over the task's augmented images, K and V computed with `weights`; float32 as in training.

    The changed product is put in by hooks on the output: no weight is touched.
    """
    seen = {name: [] for name in method.layers}

    def replaced(layer, inputs, output, name=None):
        x = inputs[0]
        seen[name].append(x.flatten(0, -2))
        k, v = (x @ weight.mT for weight in weights[name])
        biases = layer.linear.bias.chunk(3)[1:]
        return torch.cat([output[..., : k.shape[-1]], k + biases[0], v + biases[1]], -1)

    hooks = [
        layer.register_forward_hook(lambda *a, name=name: replaced(*a, name=name))
        for name, layer in method.layers.items()
    ]
    with torch.no_grad():
        for images, _ in task.augmented_batches():
            method.model.features(images)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(x).double().numpy() for name, x in seen.items()}


def leading(X: np.ndarray, share: float) -> np.ndarray:
    """The fewest leading right singular vectors [n, k] of X whose squared values hold `share` of all."""
    _, S, Vt = np.linalg.svd(X, full_matrices=False)
    k = 1
    while (S[:k] ** 2).sum() < share * (S**2).sum():
        k += 1
    return Vt[:k].T


class Watched(METHODS["lora-drs"]):
    """Computes each task's space by itself, and where A went after every step."""

    def begin_task(self, task):
        self.spaces, self.drift = getattr(self, "spaces", []), getattr(self, "drift", [])
        before = weights_now(self)
        subtracted = {name: self.original[name] - (weight - self.original[name]) for name, weight in before.items()}
        inputs = inputs_by_hand(self, task, subtracted)
        super().begin_task(task)
        assert all(torch.equal(weight, before[name]) for name, weight in weights_now(self).items())
        bases = {name: layer.basis.clone() for name, layer in self.layers.items()}
        self.spaces.append((inputs, bases))
        self.first_A = {name: layer.A.detach().clone() for name, layer in self.layers.items()}
        self.drift.append([])

    def after_step(self):
        super().after_step()
        for name, layer in self.layers.items():
            moved = layer.A.detach() - self.first_A[name]
            self.drift[-1].append((float(moved.norm()), float((moved @ layer.basis).norm())))


def watched(benchmark, weights, folder, **changes) -> Watched:
    trainer = make_trainer(benchmark, weights, folder, method="lora-drs", **(SHARE | changes))
    trainer.learner.method.__class__ = Watched
    trainer.learner.method.original = weights_now(trainer.learner.method)
    trainer.results = trainer.run()
    return trainer


@pytest.fixture(scope="module")
def run(patterns, weights, tmp_path_factory) -> Watched:
    return watched(patterns, weights, tmp_path_factory.mktemp("runs"))


def test_the_space_holds_the_share_of_what_the_subtracted_weights_see(run):
    for task, (inputs, bases) in enumerate(run.learner.method.spaces):
        for name, basis in bases.items():
            if task == 0:
                assert basis.shape[1] == 0  # the first task is free
                continue
            space = leading(inputs[name], 0.9)
            assert 4 < space.shape[1] < 32 and basis.shape[1] == 32 - space.shape[1]
            want = torch.eye(32) - subspace(torch.from_numpy(space.copy()))
            assert relative_error(subspace(basis), want) <= 1e-3  # float32 statistics and near eigenvalues


def test_what_is_subtracted_makes_a_difference(run):
    """Otherwise the test above could not tell the pass from one through the weights in force."""
    method = run.learner.method
    task = task_of(run, 2)
    seen = inputs_by_hand(method, task, weights_now(method))["blocks.1.attn.qkv"]
    minus = inputs_by_hand(method, task, {n: 2 * method.original[n] - w for n, w in weights_now(method).items()})
    assert np.linalg.norm(seen - minus["blocks.1.attn.qkv"]) > 1e-2 * np.linalg.norm(seen)


def test_A_moves_within_the_space(run):
    for task, steps in enumerate(run.learner.method.drift):
        assert len(steps) == 2 * 3 * 2 and all(moved > 0 for moved, _ in steps)
        if task:
            assert all(outside <= 1e-5 * moved for moved, outside in steps)


def test_the_weights_are_restored_when_the_pass_fails(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", method="lora-drs", **SHARE)
    method = trainer.learner.method
    for layer in method.layers.values():  # an old update
        layer.linear.weight.data += 0.1 * torch.randn_like(layer.linear.weight)
    before = weights_now(method)
    with pytest.raises(RuntimeError, match="torn"), method._old_updates_subtracted():
        changed = weights_now(method)
        raise RuntimeError("torn")
    for name, weight in before.items():
        assert torch.equal(weights_now(method)[name], weight) and not torch.equal(changed[name], weight)
        assert relative_error(changed[name] + weight, 2 * method.pretrained[name]) <= 1e-6


def test_statistics_that_are_not_finite_are_named_and_nothing_is_changed(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", method="lora-drs", **SHARE)
    method = trainer.learner.method
    trainer.learner.model.add_task(2)
    method.layers["blocks.0.attn.qkv"].linear.weight.data[-1, 0] = float("inf")
    before = weights_now(method)
    with pytest.raises(StatisticsError, match="is that of backbone.blocks.0.attn.qkv$"):  # where it begins
        method.begin_task(task_of(trainer, 1))
    with pytest.raises(StatisticsError, match="blocks.1.attn.qkv"):  # the first whose inputs are spoiled
        method.open_task(task_of(trainer, 1))
    assert all(torch.equal(weight, before[name]) for name, weight in weights_now(method).items())


def test_B_starts_sparse_and_random(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", method="lora-drs", **SHARE)
    trainer.learner.method.begin_task(task_of(trainer, 0))
    for layer in trainer.learner.method.layers.values():
        zeros = (layer.B == 0).sum(-2)
        assert (zeros == 29).all()  # 0.9 of 32 in every column
        assert 0.005 < layer.B[layer.B != 0].std() < 0.02
        assert not torch.equal(layer.B[0], layer.B[1])


@pytest.mark.parametrize("rectify", ["none", "exact"])
def test_exact_rectification_plugs_in(patterns, weights, tmp_path, rectify):
    """Without it, A's random start reaches out of the space, and the optimizer leaves that part as it is."""
    violations = watched(patterns, weights, tmp_path / "run", rectify=rectify).results["violation"]
    assert violations[0] is None
    assert max(violations[1:]) <= 1e-5 if rectify == "exact" else min(violations[1:]) > 1e-2


def test_the_nearest_class_mean_is_chosen(run):
    benchmark, method = run.benchmark, run.learner.method
    run.learner.model.eval()
    with torch.no_grad():
        means = []
        for position in range(6):
            rows = (benchmark.positions[benchmark.train.labels] == position).nonzero().flatten()
            means.append(run.learner.model.features(benchmark.train.images[rows]).double().mean(0))
        features = run.learner.model.features(benchmark.test.images).double()
        chosen = method.scores(benchmark.test.images).argmax(-1).tolist()
    stored = method.prototypes.matrix.double()
    assert relative_error(stored[-2:], F.normalize(torch.stack(means[-2:]), dim=1)) <= 1e-5  # of the last task
    for feature, choice in zip(features, chosen, strict=True):
        unit = feature / feature.norm()
        assert choice == min(range(6), key=lambda c: float((unit - stored[c]).norm()))
    assert len(set(chosen)) > 2


def test_a_seed_means_the_same_B_on_every_device(device: str) -> None:
    factors, next_draws = [], []
    for where in ("cpu", device, "meta"):  # meta holds no values, and has no generator of its own
        layers = {"qkv": LoRAQKV(nn.Linear(24, 72, device=where), 4)}
        torch.manual_seed(3)
        METHODS["lora-drs"].open_task(SimpleNamespace(layers=layers), SimpleNamespace(index=0))
        next_draws.append(torch.rand(2))
        if where != "meta":
            factors.append(layers["qkv"].B.detach().cpu())
    assert torch.equal(factors[0], factors[1]) and 0 < factors[0].count_nonzero() < factors[0].numel()
    assert torch.equal(next_draws[0], next_draws[1]) and torch.equal(next_draws[0], next_draws[2])
