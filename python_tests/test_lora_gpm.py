"""LoRA-GPM: its bases against GPM by an SVD of the stacked inputs, its gradients, and rectification as a plug-in."""

import numpy as np
import pytest
import torch
from conftest import make_trainer, relative_error, subspace

from janus_ext.methods import METHODS

ENERGY = {"energy_start": 0.6, "energy_end": 0.9}


def gpm(V: np.ndarray, X: np.ndarray, share: float) -> np.ndarray:
    """GPM (Saha et al., 2021) on stacked inputs X [n, N]: leading directions of the rest until the share is reached."""
    rest = X - V @ V.T @ X
    U, S, _ = np.linalg.svd(rest, full_matrices=False)
    whole = (X**2).sum()
    held, taken = whole - (rest**2).sum(), 0
    while held < share * whole:
        held, taken = held + S[taken] ** 2, taken + 1
    return np.column_stack([V, U[:, :taken]])


class Watched(METHODS["lora-gpm"]):
    """Keeps every task's inputs, and looks at the gradients of every step."""

    def begin_task(self, task):
        super().begin_task(task)
        self.inputs, self.checked = getattr(self, "inputs", []), getattr(self, "checked", 0)

    def after_backward(self):
        before = {name: (layer.A.grad.clone(), layer.B.grad.clone()) for name, layer in self.layers.items()}
        super().after_backward()
        for name, layer in self.layers.items():
            grad_A, grad_B = before[name]
            V = layer.basis.double()
            assert torch.equal(layer.B.grad, grad_B)
            want = grad_A.double() - grad_A.double() @ V @ V.mT
            assert relative_error(layer.A.grad, want) <= 1e-5
            assert (layer.A.grad.double() @ V).norm() <= 1e-5 * grad_A.norm()
            self.checked += V.shape[1] > 0 and bool(grad_A.any())

    def close_task(self, task):
        self.inputs.append(self.stacked_inputs(task))
        return super().close_task(task)

    @torch.no_grad()
    def stacked_inputs(self, task) -> dict[str, np.ndarray]:
        """[n, N] of every layer over the task's augmented images, the model as it was trained."""
        seen = {name: [] for name in self.layers}
        hooks = [
            layer.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0].flatten(0, -2)))
            for name, layer in self.layers.items()
        ]
        for images, _ in task.augmented_batches():
            self.model.features(images)
        for hook in hooks:
            hook.remove()
        return {name: torch.cat(x).double().numpy().T for name, x in seen.items()}


def test_bases_are_those_of_gpm_and_gradients_of_A_avoid_them(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", method="lora-gpm", **ENERGY)
    trainer.learner.method.__class__ = Watched
    results = trainer.run()
    for name, layer in trainer.learner.method.layers.items():
        V = np.zeros((32, 0))
        for task, inputs in enumerate(trainer.learner.method.inputs):
            assert inputs[name].shape == (32, 16 * 5)
            V = gpm(V, inputs[name], 0.6 + 0.3 * task / 3)
            assert results["basis_rank"][task][name] == V.shape[1]
        assert 0 < V.shape[1] < 28  # not the cap n - r
        assert relative_error(subspace(layer.basis), subspace(torch.from_numpy(V))) <= 1e-4
    # Two tasks with a basis, two layers, 2 * 3 steps but the first: there B = 0, so that A has no gradient.
    assert trainer.learner.method.checked == 2 * 2 * 5


def test_the_basis_grows_and_keeps_what_it_had(patterns, weights, tmp_path):
    trainer = make_trainer(patterns, weights, tmp_path / "run", method="lora-gpm", **ENERGY)
    bases = []
    close = trainer.learner.method.close_task

    def close_task(task):
        report = close(task)
        bases.append([layer.basis.clone() for layer in trainer.learner.method.layers.values()])
        return report

    trainer.learner.method.close_task = close_task
    trainer.run()
    for earlier, later in zip(bases, bases[1:], strict=False):
        for old, new in zip(earlier, later, strict=True):
            assert new.shape[1] > old.shape[1] and (old - subspace(new).float() @ old).norm() <= 1e-5


def violations(benchmark, weights, folder, rectify: str) -> list[float]:
    trainer = make_trainer(benchmark, weights, folder / rectify, method="lora-gpm", rectify=rectify, **ENERGY)
    return trainer.run()["violation"]


def test_gradient_rectification_plugs_in(patterns, weights, tmp_path):
    """Projected gradients of A alone do not protect: A's random start is in the update. `exact` does."""
    project, tangent, exact = (violations(patterns, weights, tmp_path, r) for r in ("project", "tangent", "exact"))
    assert project[0] is None and min(project[1:]) > 1e-2
    assert max(exact[1:]) <= 1e-5
    assert 0 < sum(tangent[1:]) < sum(project[1:])  # seed 0; lower with four seeds of five, never near zero


@pytest.mark.parametrize("estimator", ["gram", "isvd"])
def test_both_estimators_find_the_same_subspace(patterns, weights, tmp_path, estimator):
    """At the layer's full width the incremental SVD is exact."""
    flags = {"method": "lora-gpm", "estimator": estimator, "epochs": 1} | ENERGY
    trainer = make_trainer(patterns, weights, tmp_path / "run", **flags)
    trainer.learner.method.__class__ = Watched
    trainer.run()
    for name, layer in trainer.learner.method.layers.items():
        V = np.zeros((32, 0))
        for task, inputs in enumerate(trainer.learner.method.inputs):
            V = gpm(V, inputs[name], 0.6 + 0.3 * task / 3)
        assert relative_error(subspace(layer.basis), subspace(torch.from_numpy(V))) <= 1e-4
