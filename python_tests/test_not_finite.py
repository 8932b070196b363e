"""NaN or infinity anywhere in a task ends the run in a line that says where, and what was kept before is good: --resume
ends with the bits of a run that never had one.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_trainer, weights_of, without_time
from learners import FIRST, learner_of
from safetensors import safe_open
from safetensors.torch import save_file
from test_resuming import assert_same_files
from torch import Tensor

from janus_ext.classifier import ContinualClassifier
from janus_ext.errors import StatisticsError, TrainingError
from janus_ext.methods.base import Step
from janus_ext.runs.checkpoint import read_tensors
from janus_ext.training import progress as progress_module
from janus_ext.training.loop import Learner
from janus_ext.training.trainer import Trainer

AMPS = ("off", "bf16", "fp16")
LAYER = "blocks.1.attn.qkv"
TASK = 6  # steps: 16 images in batches of 8, 3 epochs
NAN = float("nan")
bad = NAN  # what the cases put in the place of a number; a test may say infinity


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, before: Callable[[Learner], None]) -> None:
    """Lets something happen before a step, counted from 1 over the whole run."""
    take, taken = Learner._step, []

    def step(self: Learner, *args) -> Step:
        taken.append(None)
        if len(taken) == number:
            before(self)
        return take(self, *args)

    monkeypatch.setattr(Learner, "_step", step)


def spoil_loss(learner: Learner) -> None:
    loss = learner.method.loss

    def once(images: Tensor, targets: Tensor) -> Step:
        del learner.method.loss
        step = loss(images, targets)
        return Step(step.loss * bad, step.correct)

    learner.method.loss = once


def spoil_input(learner: Learner) -> None:
    def once(module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hook.remove()
        return (args[0] * bad,)

    hook = learner.method.layers[LAYER].register_forward_pre_hook(once)


def spoil_statistics(learner: Learner) -> None:
    """What is observed of a layer's input, and not the input."""
    estimator = learner.method.estimators[LAYER]
    observe = estimator.observe

    def once(x: Tensor) -> None:
        del estimator.observe
        observe(x * bad)

    estimator.observe = once


def spoil_gradient(learner: Learner) -> None:
    def once(gradient: Tensor) -> Tensor:
        hook.remove()
        return gradient * bad

    hook = learner.method.layers[LAYER].B.register_hook(once)


def spoil_gradient_and_stop(learner: Learner) -> None:
    """A signal, too, behind which the state is written at once."""
    spoil_gradient(learner)
    os.kill(os.getpid(), signal.SIGTERM)


def spoil_weight(learner: Learner) -> None:
    with torch.no_grad():
        learner.method.layers[LAYER].linear.weight[-1, 0] = bad


def spoil_optimizer(learner: Learner) -> None:
    """Of a step that divides by infinity the weights stay as they are: nothing else tells of it."""
    take = torch.optim.Adam.step

    def once(optimizer: torch.optim.Adam, *args: object) -> object:
        torch.optim.Adam.step = take
        result = take(optimizer, *args)
        optimizer.state[learner.method.layers[LAYER].B]["exp_avg_sq"].fill_(bad)
        return result

    torch.optim.Adam.step = once


def spoil_features(learner: Learner) -> None:
    """Those of passes behind the merge, and no module's output."""
    take = learner.model.features

    def after(images: Tensor) -> Tensor:
        merged = not learner.model.training and learner.method.layers[LAYER].B.count_nonzero() == 0
        return take(images) * bad if merged else take(images)

    learner.model.features = after


WEIGHT = rf"backbone\.{LAYER}\.\S*"
SPOILED = r"(not finite by then: backbone\.|every module's output is finite)"  # the latter in fp16: a step left out
CASES = {  # (step of a task, what happens, what is said: where T stands for the task)
    "loss": (5, spoil_loss, r"the loss is (nan|inf) in task T, epoch 3, step 1; .*" + SPOILED),
    "input": (6, spoil_input, r"the loss is nan in task T, epoch 3, step 2; .*" + SPOILED),
    "statistics": (5, spoil_statistics, rf"{LAYER}\.\S* is not finite in task T, behind epoch 3 and step 0"),
    "features": (6, spoil_features, r"task T: the features of 16 .* are not finite: every module's output is finite$"),
    "gradient": (3, spoil_gradient, r"the loss is nan in task T, epoch 2, step 2.*not finite by then: backbone\."),
    "last gradient": (6, spoil_gradient, rf"{WEIGHT} is not finite in task T, behind epoch 3 and step 0"),
    "gradient, signal": (4, spoil_gradient_and_stop, rf"{WEIGHT} is not finite in task T, behind epoch 1 and step 2"),
    "optimizer": (6, spoil_optimizer, rf"exp_avg_sq of the optimizer for {WEIGHT} is not finite in task T, behind"),
    "weight": (4, spoil_weight, rf"the loss is nan in task T, epoch 2, step 2.*not finite by then: {WEIGHT}"),
}


@pytest.fixture(scope="module")
def whole(patterns, weights, tmp_path_factory):
    """The run that nothing disturbs, by its precision."""
    made = {}

    def run(amp: str) -> tuple:
        if amp not in made:
            trainer = make_trainer(patterns, weights, tmp_path_factory.mktemp("whole") / "run", amp=amp)
            made[amp] = without_time(trainer.run()), weights_of(trainer), trainer.run_on_disk.folder
        return made[amp]

    return run


@pytest.mark.parametrize(("value", "task"), [(NAN, 2), (float("inf"), 1)])
@pytest.mark.parametrize("amp", AMPS)
@pytest.mark.parametrize("case", CASES)
def test_it_ends_in_a_line_and_what_was_kept_is_good(
    patterns, weights, tmp_path, monkeypatch, whole, case, amp, value, task
):
    step, spoil, said = CASES[case]
    monkeypatch.setattr(sys.modules[__name__], "bad", value)
    if amp == "fp16" and "gradient" in case:
        pytest.skip("the scaler leaves such a step out: test_mixed_precision.py")
    with monkeypatch.context() as patched:
        at_step(patched, (task - 1) * TASK + step, spoil)
        with pytest.raises(TrainingError, match=said.replace("task T", f"task {task}")) as ended:
            make_trainer(patterns, weights, tmp_path / "run", amp=amp).run()
    assert "\n" not in str(ended.value)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(tensor.isfinite().all() for tensor in read_tensors(path)[0].values()), path
    again = make_trainer(patterns, weights, tmp_path / "run", amp=amp)
    again.restore()
    assert len(again.matrix) == task - 1
    results, tensors, folder = whole(amp)
    assert without_time(again.run()) == results
    assert all(torch.equal(value, tensors[name]) for name, value in weights_of(again).items())
    assert_same_files(tmp_path / "run", folder)


def weights_that_overflow(weights: Path, folder: Path, module: str) -> Path:
    """Finite ones, with which a module gives numbers that float16 does not hold."""
    with safe_open(weights, "pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        about = file.metadata()
    state[f"{module}.weight"] *= 1e7
    path = folder / "overflow.safetensors"
    save_file(state, path, about)
    return path


MODULES = ["blocks.0.mlp.fc1", "blocks.1.attn.qkv"]


@pytest.mark.parametrize("module", MODULES)
def test_what_float16_does_not_hold_is_found_in_the_network(patterns, weights, tmp_path, module):
    spoiled = weights_that_overflow(weights, tmp_path, module)
    said = rf"the loss is nan in task 1, epoch 1, step 1; .* first output .* is that of backbone\.{module} there$"
    with pytest.raises(TrainingError, match=said):
        make_trainer(patterns, spoiled, tmp_path / "run", amp="fp16").run()


@pytest.mark.parametrize("module", MODULES)
def test_and_at_the_step_where_it_begins(patterns, weights, tmp_path, monkeypatch, module):
    """The scaler leaves such steps out: no weight tells of it."""

    def overflow(learner: Learner) -> None:
        name = f"backbone.{module}" + (".linear" if "qkv" in module else "")
        with torch.no_grad():
            learner.model.get_submodule(name).weight.mul_(1e7)

    at_step(monkeypatch, TASK + 4, overflow)
    said = rf"the loss is (nan|inf) in task 2, epoch 2, step 2;.* is not finite is that of backbone\.{module} there$"
    with pytest.raises(TrainingError, match=said) as ended:
        make_trainer(patterns, weights, tmp_path / "run", amp="fp16").run()
    assert "\n" not in str(ended.value)


def test_features_that_are_not_finite_are_traced_to_their_module(patterns, weights, tmp_path, monkeypatch):
    def overflowing(learner: Learner) -> None:
        close = learner.method.close_task

        def closing(task):
            report = close(task)
            with torch.no_grad():
                learner.model.get_submodule("backbone.blocks.1.mlp.fc2").weight.fill_(3e38)
            return report

        learner.method.close_task = closing

    at_step(monkeypatch, TASK + 6, overflowing)
    said = r"task 2: the features.*not finite is that of backbone\.blocks\.1\.mlp\.fc2$"
    with pytest.raises(TrainingError, match=said):
        make_trainer(patterns, weights, tmp_path / "run").run()


def test_an_incremental_svd_refuses_them_at_their_step(patterns, weights, tmp_path, monkeypatch):
    at_step(monkeypatch, TASK + 6, spoil_statistics)
    said = rf"task 2: epoch 3, step 2: {LAYER}: isvd_update: x .* must be finite.*nothing was added"
    with pytest.raises(TrainingError, match=said) as ended:
        make_trainer(patterns, weights, tmp_path / "run", estimator="isvd", estimator_rank=12).run()
    assert "\n" not in str(ended.value)


def test_statistics_are_looked_at_with_the_losses(patterns, weights, tmp_path, monkeypatch):
    """Every 20 steps; here every step."""
    monkeypatch.setattr(progress_module, "READ_EVERY", 1)
    at_step(monkeypatch, TASK + 5, spoil_statistics)
    with pytest.raises(TrainingError, match=rf"{LAYER}\.\S* is not finite in task 2, behind epoch 2 and step 1"):
        make_trainer(patterns, weights, tmp_path / "run").run()


def test_test_images_that_overflow_are_no_hits(patterns, weights, tmp_path, monkeypatch):
    """argmax takes NaN for the largest score: they would count as the first class, rightly or not."""
    features = ContinualClassifier.features
    learner = make_trainer(patterns, weights, tmp_path / "run")
    seen = patterns.test.images[0]

    def overflowing(self: ContinualClassifier, images: Tensor) -> Tensor:
        found = features(self, images)
        found[(images == seen).flatten(1).all(1)] *= bad
        return found

    monkeypatch.setattr(ContinualClassifier, "features", overflowing)
    with pytest.raises(StatisticsError, match=r"scores in task \d are no finite numbers"):
        learner.run()


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("head", ["linear", "ncm", "lda"])
def test_an_image_whose_features_overflow_is_named_and_not_predicted(photos, weights, monkeypatch, head, value):
    learner = learner_of(weights, head=head)
    learner.learn(photos, FIRST)
    features, images = ContinualClassifier.features, sorted((photos / FIRST[0]).iterdir())
    assert len(learner.predict(images)) == len(images)

    def overflowing(self: ContinualClassifier, pixels: Tensor) -> Tensor:
        found = features(self, pixels)
        found[3] = value
        return found

    monkeypatch.setattr(ContinualClassifier, "features", overflowing)
    for use in (learner.predict, lambda paths: learner.evaluate([(path, FIRST[0]) for path in paths])):
        with pytest.raises(StatisticsError, match=rf"the scores of \S*{images[3].name} are no finite numbers"):
            use(images)


@pytest.mark.parametrize("moment", [3, 6])
def test_under_fp16_a_gradient_that_is_not_finite_costs_a_step_alone(patterns, weights, tmp_path, monkeypatch, moment):
    at_step(monkeypatch, TASK + moment, spoil_gradient)
    trainer = make_trainer(patterns, weights, tmp_path / "run", amp="fp16")
    trainer.run()
    assert all(value.isfinite().all() for value in weights_of(trainer).values())


@pytest.mark.parametrize("method", ["lora", "inflora", "lora-drs", "lora-gpm", "bilora"])
def test_with_every_method_a_last_step_that_ruins_its_weights_is_noticed(
    patterns, weights, tmp_path, monkeypatch, method
):
    def ruin(learner: Learner) -> None:
        with torch.no_grad():
            learner.method.trainable()[0].view(-1)[0] = NAN

    spectral = {"frequencies": 20} if method == "bilora" else {}
    drs = {"energy_start": 0.6, "energy_end": 0.6} if method == "lora-drs" else {}
    take = Learner._step
    trainer: Trainer = make_trainer(patterns, weights, tmp_path / "run", method=method, **spectral, **drs)
    taken = []

    def step(self: Learner, *args) -> Step:
        found = take(self, *args)
        taken.append(None)
        if len(taken) == 2 * TASK:
            ruin(self)
        return found

    monkeypatch.setattr(Learner, "_step", step)
    with pytest.raises(TrainingError, match=r"backbone\.blocks\.\S* is not finite in task 2, behind epoch 3"):
        trainer.run()
    kept, _ = read_tensors(tmp_path / "run" / "checkpoints" / "within.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
