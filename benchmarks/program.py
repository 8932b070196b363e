"""Training steps and whole tasks of the trainer, on random images in memory."""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_ext.assembly import make_learner
from janus_ext.config import TrainConfig
from janus_ext.data.benchmark import Benchmark, MemorySplit
from janus_ext.estimator import observing
from janus_ext.runs.run import Run
from janus_ext.training.optimization import make_optimizer
from janus_ext.training.trainer import Trainer


def trainer(device: str, classes: int, tasks: int, per_class: int, folder: Path, **settings: Any) -> Trainer:
    """A trainer on noise: `per_class` training images and one test image of each class."""
    config = TrainConfig(device=device, head="linear", **settings).resolved()  # others are cases of their own
    learner = make_learner(config, 0, tasks)

    def split(images_per_class: int) -> MemorySplit:
        labels, size = torch.arange(classes).repeat_interleave(images_per_class), learner.model.input_size
        shape = (len(labels), 3, size, size)
        return MemorySplit(torch.randint(256, shape, dtype=torch.uint8), labels, [str(i) for i in range(len(labels))])

    order = torch.arange(classes).view(tasks, -1).tolist()
    benchmark = Benchmark(
        "noise", tuple(map(str, range(classes))), split(per_class), split(1), tuple(map(tuple, order))
    )
    return Trainer(config, benchmark, learner, Run(folder))


OTHERS = 100_000  # the first of classes that no benchmark has


class Stepper:
    """Repeats one training step of a method: forward, backward, rectification, optimizer with a learning rate of 0.

    So every step costs what it costs in training, and the features it computes stay the same.

    Args:
        protected: directions that each layer protects already, random ones.
        old_classes: classes that have a prototype already, random ones.
        observe: whether the step is one of the last epoch, in which Online Estimation observes.
    """

    def __init__(
        self,
        device: str,
        backbone: str,
        batch: int,
        method: str,
        protected: int = 0,
        old_classes: int = 0,
        observe: bool = False,
        amp: str = "off",
        compile: bool = False,
    ) -> None:
        self.device = device
        settings = {"method": method, "backbone": backbone, "weights": "none", "batch_size": batch, "amp": amp}
        settings |= {"compile": compile}
        trial = trainer(device, batch, 1, 1, Path(tempfile.gettempdir()), **settings)
        self.learner = trial.learner
        self.method, model = self.learner.method, self.learner.model
        self.method.begin_task(self.learner._task(trial.train_images[0], batch))
        self._age(protected, old_classes)
        self.optimizer = make_optimizer(self.learner.config, self.method.trainable(), list(model.heads.parameters()))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.scaler = torch.amp.GradScaler(device, enabled=False)
        self.images = trial.benchmark.train.images.to(device)
        self.targets = torch.arange(batch, device=device)
        self.observed = self.method.make_estimators() if observe else {}
        model.heads[0].register_forward_hook(lambda _, inputs, __: setattr(self, "features", inputs[0].detach()))
        model.train()

    def step(self) -> Tensor:
        """The features [b, d] that the step computed."""
        with observing(self.method.layers, self.observed) if self.observed else nullcontext():
            self.learner._step(self.images, self.targets, len(self.images), self.optimizer, self.scaler)
        return self.features

    def wait(self) -> None:
        """Until the device has done what it was asked."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _age(self, protected: int, old_classes: int) -> None:
        """Puts the method where earlier tasks would have brought it."""
        generator = torch.Generator().manual_seed(1)
        if protected:
            for layer in self.method.layers.values():
                random = torch.randn(layer.in_features, protected, generator=generator)
                layer.protect(torch.linalg.qr(random).Q.to(self.device))
        if old_classes:
            width = self.learner.model.feature_dim
            random = torch.randn(old_classes, width, generator=generator).to(self.device)
            self.method.prototypes.add(random, torch.arange(old_classes) + OTHERS)


def run_tasks(device: str, method: str) -> None:
    """Two tasks of the embedded backbone at DomainNet's published settings: 69 classes with ten images, five epochs."""
    settings = {"benchmark": "domainnet", "preset": "paper", "seed": (0,), "backbone": "emoji", "normalize": "model"}
    with tempfile.TemporaryDirectory() as folder:
        trainer(device, 2 * 69, 2, 10, Path(folder), method=method, amp="off", **settings).run()
