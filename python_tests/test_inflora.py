"""InfLoRA: DualGPM against the authors' procedure step by step in NumPy, and a whole run replayed from its inputs."""

import math

import numpy as np
import pytest
import torch
from conftest import make_trainer, relative_error, subspace, task_of
from torch import Tensor

from janus_ext.errors import StatisticsError, TrainingError
from janus_ext.methods import METHODS
from janus_ext.methods.dual_gpm import DualGPM
from janus_ext.methods.protected import energy
from janus_ext.protection import violation
from janus_ext.runs.checkpoint import read_tensors, write_tensors


# DualGPM -------------------------------------------------------------------------------------------------------------
class Oracle:
    """The authors' public code, one decision after another; `literal`: in what it keeps of a large first task, too."""

    def __init__(self, literal: bool = False) -> None:
        self.F, self.kind, self.literal = None, None, literal

    def free_projector(self) -> np.ndarray:
        inside = self.F @ self.F.T
        return inside if self.kind == "retain" else np.eye(len(inside)) - inside

    def update(self, H: np.ndarray, threshold: float) -> None:
        if self.F is None:
            self.first(H, threshold)
        elif self.kind == "remove":
            self.grow(H, threshold)
        else:
            self.shrink(H, threshold)
        n, k = self.F.shape
        if self.kind == "remove" and k > n / 2:
            self.F, self.kind = others(self.F), "retain"
        elif self.kind == "retain":
            assert k <= n / 2, "the authors' own assertion"

    def first(self, H: np.ndarray, threshold: float) -> None:
        U, S, _ = np.linalg.svd(H)
        count = 0
        while (S[: count + 1] ** 2).sum() / (S**2).sum() < threshold:
            count += 1
        self.kind = "remove" if count < len(H) / 2 else "retain"
        self.F = U[:, : max(count, 1)]
        if self.kind == "retain" and not self.literal:
            self.F = others(self.F)

    def grow(self, H: np.ndarray, threshold: float) -> None:
        rest = H - self.F @ self.F.T @ H
        U, S, _ = np.linalg.svd(rest)
        whole = (H**2).sum()
        held = (whole - (rest**2).sum()) / whole
        for u, s in zip(U.T, S, strict=True):
            if held >= threshold:
                break
            self.F, held = np.column_stack([self.F, u]), held + s**2 / whole
        self.F = self.F[:, : len(H)]

    def shrink(self, H: np.ndarray, threshold: float) -> None:
        rest = self.F @ self.F.T @ H
        U, S, _ = np.linalg.svd(rest)
        whole = (H**2).sum()
        held, count = (rest**2).sum() / whole, 0
        while held >= 1 - threshold:
            held, count = held - S[count] ** 2 / whole, count + 1
        if count:
            given = U[:, :count]
            kept = self.F - given @ given.T @ self.F
            self.F = np.linalg.svd(kept)[0][:, : self.F.shape[1] - count]


def others(F: np.ndarray) -> np.ndarray:
    """A basis of the complement: the left singular vectors without singular value."""
    return np.linalg.svd(F)[0][:, F.shape[1] :]


def second_moment(rng: np.random.Generator, n: int, decay: float) -> np.ndarray:
    """sum x x^T of 4 n inputs whose directions, drawn anew, hold exponentially less."""
    turned = np.linalg.qr(rng.standard_normal((n, n)))[0]
    X = rng.standard_normal((4 * n, n)) * np.exp(-decay * np.arange(n) / n) @ turned
    return X.T @ X


def replay(memory: DualGPM, oracle: Oracle, moments: list[np.ndarray], start: float, end: float) -> list[str]:
    """Both through all tasks, compared after each; how the memory was kept after each."""
    kinds = []
    for task, H in enumerate(moments):
        threshold = start + (end - start) * task / len(moments)
        memory.update(torch.from_numpy(H), threshold)
        oracle.update(H, threshold)
        n = len(H)
        protected = memory.protected()
        assert memory.rank == protected.shape[1] == round(n - np.trace(oracle.free_projector()))
        eye = torch.eye(n, dtype=torch.float64)
        assert (eye - subspace(protected) - torch.from_numpy(oracle.free_projector())).norm() <= 1e-8
        probe = torch.from_numpy(second_moment(np.random.default_rng(task), n, 1.0))
        assert relative_error(memory.free(probe), (eye - subspace(protected)) @ probe) <= 1e-10
        kinds.append(memory.kind)
        assert (memory.kind, memory.basis.shape[1]) == (oracle.kind, oracle.F.shape[1])
    return kinds


SEQUENCES = {  # n, decay of the spectrum, first and last threshold, and the kinds that the memory must go through
    "grows to a third": (32, 16.0, 0.5, 0.999, {"remove"}),
    "small": (8, 12.0, 0.5, 0.6, {"remove", "retain"}),
    "odd width": (13, 6.0, 0.6, 0.95, {"remove", "retain"}),
    "flat spectra": (16, 1.0, 0.3, 0.9, {"remove", "retain"}),
    "published thresholds": (40, 3.0, 0.98, 0.999, {"remove", "retain"}),
    "large first task": (40, 1.5, 0.98, 0.999, {"retain"}),
    "down to nothing": (16, 3.0, 0.9999, 0.99999, {"retain"}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SEQUENCES)
def test_dual_gpm_is_the_authors_procedure(name, seed):
    n, decay, start, end, wanted = SEQUENCES[name]
    rng = np.random.default_rng(seed)
    moments = [second_moment(rng, n, decay) for _ in range(8)]
    kinds = replay(DualGPM(n), Oracle(), moments, start, end)
    assert set(kinds) == wanted


def test_a_first_task_of_exactly_half_the_space_is_kept_as_its_complement():
    H = torch.diag(torch.cat([torch.ones(4), torch.full((4,), 1e-3)]).double())
    memory, oracle = DualGPM(8), Oracle()
    replay(memory, oracle, [H.numpy()], 1 - 9e-7, 1 - 9e-7)
    assert memory.kind == oracle.kind == "retain" and memory.basis.shape == (8, 4)


def test_too_little_free_space_is_said(patterns, weights, tmp_path):
    settings = {"method": "inflora", "energy_start": 1.0, "energy_end": 1.0}
    with pytest.warns(
        UserWarning, match="blocks.0.attn.qkv: the old inputs leave . dimensions free, fewer than the rank"
    ):
        make_trainer(patterns, weights, tmp_path, **settings).run()


def test_dual_gpm_gives_up_free_space_again_and_again():
    rng = np.random.default_rng(0)
    memory, oracle = DualGPM(40), Oracle()
    free = []
    for threshold in (0.98, 0.982, 0.985, 0.988, 0.99, 0.993):
        replay(memory, oracle, [second_moment(rng, 40, 3.0)], threshold, 1.0)
        free.append(memory.basis.shape[1] if memory.kind == "retain" else None)
    assert free[0] is None  # it starts as "remove"
    assert free[1:4] == sorted(set(free[1:4]), reverse=True) and free[4] < free[3]


def test_a_task_with_nothing_new_changes_nothing():
    rng = np.random.default_rng(0)
    H = torch.from_numpy(second_moment(rng, 20, 8.0))
    memory = DualGPM(20)
    memory.update(H, 0.9)
    memory.update(H, 0.9)  # the first task stops just below the threshold, the second reaches it
    before = memory.basis
    memory.update(H, 0.9)
    assert torch.equal(memory.basis, before)


def test_a_large_first_task_departs_from_the_authors_code_as_documented():
    """The code keeps the old directions where it means the free ones, and its own assertion stops it."""
    H = second_moment(np.random.default_rng(0), 24, 1.0)
    literal, memory = Oracle(literal=True), DualGPM(24)
    with pytest.raises(AssertionError, match="the authors' own"):
        literal.update(H, 0.98)
    memory.update(torch.from_numpy(H), 0.98)
    k = literal.F.shape[1]
    assert literal.kind == memory.kind == "retain" and 12 < k < 24
    leading = torch.from_numpy(np.linalg.svd(H)[0][:, :k].copy())
    assert relative_error(torch.from_numpy(literal.free_projector()), subspace(leading)) <= 1e-10
    assert relative_error(subspace(memory.protected()), subspace(leading)) <= 1e-10
    assert relative_error(subspace(memory.basis), torch.eye(24, dtype=torch.float64) - subspace(leading)) <= 1e-10


def test_plain_gpm_keeps_to_the_old_inputs_however_many_directions_they_take():
    rng = np.random.default_rng(0)
    first, second = second_moment(rng, 24, 1.0), second_moment(rng, 24, 1.0)
    memory, leading = DualGPM(24, dual=False), torch.from_numpy(np.linalg.svd(first)[0])
    memory.update(torch.from_numpy(first), 0.98)
    k = memory.basis.shape[1]
    assert k > 12 and relative_error(subspace(memory.basis), subspace(leading[:, :k])) <= 1e-10
    memory.update(torch.from_numpy(second), 0.99)
    inside = subspace(memory.basis) @ torch.from_numpy(second)
    assert memory.kind == "remove" and k < memory.basis.shape[1] < 24
    assert torch.equal(memory.protected(), memory.basis)
    assert float(inside.norm() ** 2) >= 0.99 * float(np.linalg.norm(second) ** 2)


@pytest.mark.parametrize(("name", "dual"), [("domainnet", False), ("imagenet-r", True)])
def test_domainnet_has_plain_gpm_as_in_the_authors_code(patterns, weights, tmp_path, name, dual):
    trainer = make_trainer(patterns, weights, tmp_path / "run", method="inflora", benchmark=name, backbone="emoji")
    assert {memory.dual for memory in trainer.learner.method.memories.values()} == {dual}
    other = make_trainer(
        patterns, weights, tmp_path / "other", method="inflora", benchmark=name, backbone="emoji", gpm="dual"
    )
    assert all(memory.dual for memory in other.learner.method.memories.values())  # what the user types wins


@pytest.mark.parametrize("retain", [False, True])
def test_dual_gpm_continues_from_its_state(retain):
    rng = np.random.default_rng(0)
    first, then = (torch.from_numpy(second_moment(rng, 16, 1.0)) for _ in range(2))
    memory, other = DualGPM(16), DualGPM(16)
    memory.update(first, 0.98 if retain else 0.3)
    assert (memory.kind == "retain") == retain
    other.load_state_dict(memory.state_dict())
    before = memory.basis.shape
    for each in (memory, other):
        each.update(then, 0.985)
    assert memory.kind == other.kind and torch.equal(memory.basis, other.basis) and memory.basis.shape != before


@pytest.mark.parametrize("width", [96, 192, 320])
def test_dual_gpm_goes_on_with_the_same_bits_from_a_file(width, tmp_path):
    """Where the layout in memory is another, products round otherwise."""
    rng = np.random.default_rng(0)
    moments = [torch.from_numpy(second_moment(rng, width, 0.3)) for _ in range(4)]
    memory, other = DualGPM(width), DualGPM(width)
    for H in moments:
        memory.update(H, 0.99)
        other.update(H, 0.99)
        write_tensors(tmp_path / "state.safetensors", other.state_dict())
        other.load_state_dict(read_tensors(tmp_path / "state.safetensors")[0])
        assert torch.equal(memory.basis, other.basis)
    assert memory.kind == "retain"


# a whole run ---------------------------------------------------------------------------------------------------------
def moments_by_hand(method, task) -> dict[str, Tensor]:
    """H of every block in float64, from a hook on the input of its qkv, over the task's augmented images."""
    sums = dict.fromkeys(method.layers, 0.0)
    hooks = []
    for name, layer in method.layers.items():

        def add(_, inputs, name=name):
            x = inputs[0].detach().double().flatten(0, -2)
            sums[name] = sums[name] + x.mT @ x

        hooks.append(layer.register_forward_pre_hook(add))
    method.model.eval()
    with torch.no_grad():
        for images, _ in task.augmented_batches():
            method.model.features(images)
    method.model.train()
    for hook in hooks:
        hook.remove()
    return sums


class Replayed(METHODS["inflora"]):
    """Notes for every task what InfLoRA was given and what it made of it."""

    def begin_task(self, task):
        self.log = getattr(self, "log", [])
        images = next(task.clean_batches())[0]
        before = self.model.features(images)
        H = moments_by_hand(self, task)
        protected = {name: memory.protected() for name, memory in self.memories.items()}
        super().begin_task(task)
        self.log.append(
            {
                "task": task,
                "H before": H,
                "protected": protected,
                "same": torch.equal(self.model.features(images), before),
                "A": {name: layer.A.clone() for name, layer in self.layers.items()},
                "B": {name: layer.B.detach().clone() for name, layer in self.layers.items()},
            }
        )

    def close_task(self, task):
        log = self.log[-1]
        log["A at the end"] = {name: layer.A.clone() for name, layer in self.layers.items()}
        log["H after"] = moments_by_hand(self, task)
        weights = {name: torch.stack(layer.target_weights()).double() for name, layer in self.layers.items()}
        report = super().close_task(task)
        now = {name: torch.stack(layer.target_weights()).double() for name, layer in self.layers.items()}
        log["change"] = {name: now[name] - weights[name] for name in now}
        log["rank"] = report.basis_rank
        return report


@pytest.fixture(scope="module")
def replayed(patterns, weights, tmp_path_factory) -> Replayed:
    """InfLoRA after three tasks; thresholds at which the memory changes its kind."""
    settings = {"method": "inflora", "energy_start": 0.99, "energy_end": 0.9999}
    trainer = make_trainer(patterns, weights, tmp_path_factory.mktemp("runs"), **settings)
    trainer.learner.method.__class__ = Replayed
    trainer.run()
    return trainer.learner.method


def test_a_task_starts_with_the_old_function(replayed):
    assert len(replayed.log) == 3 and all(log["same"] for log in replayed.log)
    assert not any(B.any() for log in replayed.log for B in log["B"].values())


def test_A_is_frozen_and_shared_by_k_and_v(replayed):
    for log in replayed.log:
        for name, A in log["A"].items():
            assert torch.equal(A, log["A at the end"][name]) and torch.equal(A[0], A[1])
    assert all(parameter.shape[-2] == 32 for parameter in replayed.trainable())  # B alone


@pytest.mark.parametrize("block", [0, 1])
def test_A_and_memory_are_the_oracles(replayed, block):
    name, oracle = f"blocks.{block}.attn.qkv", Oracle()
    free = np.eye(32)
    for log in replayed.log:
        U = np.linalg.svd(free @ log["H before"][name].numpy())[0][:, :4]
        want = torch.from_numpy(U @ U.T / 3)
        A = log["A"][name][0].double()
        assert relative_error(A.mT @ A, want) <= 1e-3  # float32 statistics and near singular values
        assert relative_error(A @ A.mT, torch.eye(4) / 3) <= 1e-6
        oracle.update(log["H after"][name].numpy(), energy(replayed.config, log["task"]))
        free = oracle.free_projector()
        assert log["rank"][name] == round(32 - np.trace(free))
    held = subspace(replayed.memories[name].protected())
    assert relative_error(held, torch.eye(32) - torch.from_numpy(free)) <= 1e-3


def test_the_update_lies_in_the_rows_of_A(replayed):
    for log in replayed.log:
        for name, change in log["change"].items():
            rows = math.sqrt(3) * log["A"][name][0].double()
            assert change.norm() > 1e-3
            assert (change - change @ rows.mT @ rows).norm() <= 1e-5 * change.norm()


def test_the_update_leaves_alone_what_is_protected(replayed):
    """Where the free space has room for A's rows; 1e-5 is float32 weights' rounding."""
    for log in replayed.log[1:]:
        for name, change in log["change"].items():
            protected = log["protected"][name]
            assert 0 < protected.shape[1] <= 32 - 4
            assert violation(change, protected) <= 1e-5


def test_inputs_that_are_not_finite_are_named_and_nothing_is_merged(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", method="inflora")
    method, task = trainer.learner.method, task_of(trainer, 0)
    method.begin_task(task)
    with torch.no_grad():
        for layer in method.layers.values():
            layer.B.fill_(0.1)
        method.layers["blocks.0.attn.qkv"].B[1, 0, 0] = float("inf")
    before = {name: torch.stack(layer.target_weights()) for name, layer in method.layers.items()}
    with pytest.raises(StatisticsError, match="blocks.1.attn.qkv"):
        method.close_task(task)
    assert all(torch.equal(torch.stack(layer.target_weights()), before[n]) for n, layer in method.layers.items())
    assert not any(memory.basis.numel() for memory in method.memories.values())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "task 1: blocks.1.attn.qkv: the inputs of the task are all zero"),
        (float("nan"), "task 1: the features of .* not finite is that of backbone.blocks.1.norm1;"),
    ],
)
def test_bad_inputs_are_named_with_their_task(patterns, weights, tmp_path, value, said):
    trainer = make_trainer(patterns, weights, tmp_path, method="inflora")
    norm = trainer.learner.model.backbone.blocks[1].norm1
    with torch.no_grad():
        norm.weight.fill_(value), norm.bias.fill_(value)
    with pytest.raises(TrainingError, match=said):
        trainer.run()
