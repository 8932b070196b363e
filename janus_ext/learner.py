"""`ContinualLearner`: a classifier of images that learns new classes when they come, predicts, is saved and goes on.

learner = ContinualLearner(backbone="emoji")
learner.learn("photos/first")           # a folder of class folders; more forms in `learn`
learner.learn("photos/a month later")
learner.predict("photo.jpg")            # [[("cat", 0.93), ("fox", 0.04), ...]]
learner.save("animals")                 # ContinualLearner.load("animals") goes on with the same bits
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from janus_ext import processes
from janus_ext.arguments import check_flag, check_integer, checked_path, methods_called, naming
from janus_ext.assembly import (
    check_network,
    make_learner,
    network_of,
    network_probe,
    resolve,
    stored_config,
    stored_numbers,
    take_classifier,
    view_of,
)
from janus_ext.backbone.network import adopted
from janus_ext.calibration import checked_temperature, fit_temperature, probabilities
from janus_ext.data.benchmark import Selection, Split
from janus_ext.data.collect import checked_names, checked_split, labelled, labelled_as, require_readable, unlabelled
from janus_ext.data.images import View, checked_workers, default_workers
from janus_ext.data.layout import shorten
from janus_ext.devices import at_work
from janus_ext.errors import ArgumentError, CheckpointError, DataError
from janus_ext.exports.contents import Contents, Update
from janus_ext.exports.plain import plain_model
from janus_ext.past import Past
from janus_ext.reports.evaluation import Evaluation, evaluate
from janus_ext.runs.checkpoint import replace_folder
from janus_ext.runs.folder import place_of_learner
from janus_ext.runs.run import Run
from janus_ext.training.parallel import require_alike
from janus_ext.training.progress import Progress, make_bar

if TYPE_CHECKING:
    from janus_ext.config import LearnConfig
    from janus_ext.heads.elsewhere import OwnHead
    from janus_ext.methods.base import Method, TaskReport


@methods_called
class ContinualLearner:
    """A classifier that learns one set of classes after another and keeps no image: the trainer's own loop.
    Args:
        backbone: "emoji" (embedded, 64 pixels), any name that ``--backbone`` takes, or a model of timm's, which is
            copied and stays as it is; what it has of a classifier is left out (`from_classifier` keeps it).
        method, head: as ``--method`` (all but "joint") and ``--head`` take them, or your own (docs/extending.md).
        seed: of all random numbers; two learners with the same seed, images and machine have the same bits.
        planned_tasks: how often `learn` will be called, roughly: over so many tasks the protected share of the inputs
            grows from ``energy_start`` to ``energy_end``; then it stays. More are welcome. A single one has no guard.
        settings: every other field of `janus_ext.config.LearnConfig`, and of your own method, spelled as the flags of
            ``janus_ext.train`` (``epochs=5, device="cuda"``). What is not said is as with ``--benchmark folder``.

    Raises:
        ArgumentError: there is no such setting, or it cannot be.
        CheckpointError: the backbone's weights are missing or do not fit.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "emoji",
        method: str | type[Method] = "janus",
        head: str | OwnHead = "auto",
        *,
        seed: int = 0,
        planned_tasks: int = 10,
        **settings: Any,
    ) -> None:
        made = None if isinstance(backbone, str) else adopted("backbone", backbone, "a name or a model of timm's")
        name = backbone if made is None else type(backbone).__name__
        check_integer("seed", seed, lambda n: n >= 0, "not negative")
        check_integer("planned_tasks", planned_tasks, lambda n: n >= 1, "positive")
        config = resolve({"backbone": name, "method": method, "head": head} | settings, own_backbone=made is not None)
        with at_work(torch.device(config.device)):
            self._core = make_learner(config, int(seed), int(planned_tasks), made)
        self._past = Past() if made is None else Past(own_backbone=True, view=view_of(backbone))

    @classmethod
    def from_classifier(
        cls, model: nn.Module, class_names: Sequence[str], method: str | type[Method] = "janus", **settings: Any
    ) -> ContinualLearner:
        """A classifier in use, which is to learn more classes: what it knows becomes the first task.

        Nothing of it is protected until `observe` has seen images of its kind; `learn` warns of that. Its own linear
        classifier is the head of these classes; every other ``head`` needs labelled images of them, as does the margin
        loss: ``observe(images, labelled=True)``.

        Args:
            model: one of timm's, its classifier an nn.Linear behind ``forward_head(x, pre_logits=True)``; it is copied.
            class_names: of its outputs.
            method, settings: as in `ContinualLearner`.

        Raises:
            ArgumentError: the model has no such classifier, or another number of outputs.
        """
        names = checked_names(class_names, "class_names")
        if settings.get("head", "auto") == "auto":
            settings["head"] = "linear"
        learner = cls(adopted("model", model), method, **settings)
        with learner._at_work():
            take_classifier(learner._core, model, names)
        learner._past.add(names, {})
        learner._past.unprotected = True
        return learner

    def __repr__(self) -> str:
        config, classes = self.config, len(self.classes)
        return f"ContinualLearner({config.backbone}, {config.method}: {classes} classes in {len(self.tasks)} tasks)"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of all classes learned so far, in the order of the model's outputs."""
        return self._past.classes

    @property
    def tasks(self) -> tuple[tuple[str, ...], ...]:
        """The same, task by task."""
        return tuple(self._past.tasks)

    @property
    def input_size(self) -> int:
        """Side in pixels of the squares that the model takes; other images are brought to it."""
        return self._core.model.input_size

    @property
    def view(self) -> View:
        """How images become such squares: of a model trained on whole images the whole, else the middle."""
        return replace(self._past.view, size=self.input_size)

    @property
    def images_at_once(self) -> int:
        """Of a pass that learns nothing: 200, or as many as need no more memory in a ViT-B/16. `save` leaves it out."""
        return self._core.model.images_at_once

    @images_at_once.setter
    def images_at_once(self, images: int) -> None:
        check_integer("images_at_once", images, lambda n: n >= 1, "positive")
        self._core.model.images_at_once = int(images)

    def workers(self, asked: int | None = None) -> int:
        """Processes that decode images: as many as ``asked`` for here or in the settings, or what suits the device."""
        chosen = self.config.workers if asked is None else checked_workers(asked)
        return default_workers(self.config.device) if chosen is None else chosen

    @property
    def config(self) -> LearnConfig:
        """The resolved settings."""
        return self._core.config

    # learning ---------------------------------------------------------------------------------------------------------
    def learn(self, images: Any, classes: Sequence[str] | None = None) -> TaskReport:
        """Learns new classes from images; on an error, or Ctrl-C, the learner is as it was. In a group of
        torch.distributed every process calls it with the same images, and computes its share of them.

        Args:
            images: a folder of class folders; a map-style data set of (image, label); or a list of (path, label). An
                image is a path, a PIL image or a uint8 tensor [3, H, W].
            classes: the names, in the order of integer labels; of a folder, which of its folders to take. Left out,
                the folders, the data set's own ``.classes``, or the labels where these are names.

        Returns:
            What the method measured on the task.

        Raises:
            ArgumentError: a class is known already, or there is only one and linear heads would learn nothing.
            DataError: there are no images, a class has none, one cannot be read, a label is none of the classes'.
            TrainingError: the loss or a statistic is not finite.
        """
        found = processes.together(lambda: labelled(images, classes, self.view, self.workers()))
        require_alike(self._core, classes=(self.classes, found.class_names), labels=found.split.labels.tolist())
        self._past.check_new(checked_names(found.class_names), self.config)
        self._past.warn_of_unprotected(self._core.method)
        if self._past.tasks:
            self._core.method.known.require(self.config.head)  # said before a task is learned, and not behind it
        first = len(self.classes)
        selection = Selection.all_of(found.split, range(first, first + len(found.class_names)))
        steps = self._core.step_count(len(self._past.tasks), len(found.class_names), len(selection))
        with self._at_work(), make_bar(steps, 0) as bar, self._core.undone_on_error():
            progress = Progress(bar, max(self._core.planned, len(self._past.tasks) + 1), self.config.epochs)
            report = self._core.learn(selection, len(found.class_names), progress, lambda epoch: None)
            self._past.add(found.class_names, report.factors, images)
        return report

    def observe(self, images: Any, labelled: bool = False) -> None:
        """Protects what the model makes of images like these, which need no labels: what it knew before is kept.

        Args:
            images: as in `predict`. As many as show all that is to be kept, a few hundred at least.
            labelled: the images have labels, as in `evaluate`: they are of all the classes that were learned without
                any, see `from_classifier`. Then every head can be fitted, and the margin loss knows these classes.

        Raises:
            ArgumentError: the method protects nothing (and no image is labelled); a class has none, or had some before.
            DataError: there is no image, or one cannot be read.
        """
        check_flag("labelled", labelled)
        split = processes.together(lambda: self._to_observe(images, labelled))
        require_alike(self._core, images=len(split), labels=split.labels.tolist())
        with self._at_work(), self._core.undone_on_error():
            self._core.observe(Selection.all_of(split, range(len(self.classes)) if labelled else (0,)), labelled)
        self._past.unprotected = self._past.unprotected and not self._core.method.remembers

    # using ------------------------------------------------------------------------------------------------------------
    def predict(self, images: Any, top: int = 5, calibrate: Any = None) -> list[list[tuple[str, float]]]:
        """The most likely classes of each image, with their scores: softmax over all classes learned so far.

        Args:
            images: a path, folder, pattern, PIL image, uint8 tensor [3, H, W], a list of these, or a data set.
            top: how many classes, at most.
            calibrate: held-out images with labels, as in `evaluate`: the scores become softmax(logits / T), with the T
                that fits these best (Guo et al., ICML 2017), so that 0.8 means right in 80 of 100. Which class comes
                first stays the same. With few images, or none that is wrong, T says little.

        Returns:
            Per image [(class name, score), ...], the best first; images of a folder or pattern are sorted by path, in
            the order of `janus_ext.data.collect.find_images`.
        """
        split = unlabelled(images, self.view, self.workers())
        check_integer("top", top, lambda n: n >= 1, "positive")  # before long work
        with naming("calibrate"):
            temperature = 1.0 if calibrate is None else self.temperature(calibrate)
        return list(self.classify(split, top, temperature))

    def classify(self, split: Split, top: int = 5, temperature: float = 1.0) -> Iterator[list[tuple[str, float]]]:
        """`predict` image by image for a split, as its images are decoded; labels that it has are not looked at."""
        self._require_classes()
        check_integer("top", top, lambda n: n >= 1, "positive")
        selection = Selection.unlabelled(checked_split(split))
        return self._classify(self._core.scores(selection), top, checked_temperature(temperature))

    def _classify(
        self, batches: Iterator[tuple[Tensor, Tensor]], top: int, temperature: float
    ) -> Iterator[list[tuple[str, float]]]:
        """PyTorch's switches are set while a batch is computed, and the caller's own while he has the answers."""
        while True:
            with self._at_work():
                batch = next(batches, None)
            if batch is None:
                return
            scores = probabilities(batch[0], temperature)
            for order, row in zip(batch[0].sort(descending=True, stable=True).indices, scores, strict=True):
                yield [(self.classes[c], float(row[c])) for c in order[:top].tolist()]

    def temperature(self, images: Any) -> float:
        """The T of `predict`'s ``calibrate``, fitted on labelled images."""
        split = self._labelled(images)
        with self._at_work():
            batches = list(self._core.scores(Selection.all_of(split, range(len(self.classes)))))
        return fit_temperature(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))

    def evaluate(self, images: Any) -> Evaluation:
        """Accuracy on labelled images, by task and by class, and the confusion matrix.

        Args:
            images: as in `learn`; labels are names of classes, or numbers of ``.classes`` (the data set's own if it
                has them, else the learner's). Not every class needs images, but one that has a folder.

        Raises:
            ArgumentError: nothing was learned yet.
            DataError: there is no image, one cannot be read, or a label is no class that the learner knows.
        """
        return self.evaluate_split(self._labelled(images), self.classes)

    def evaluate_split(self, split: Split, class_names: Sequence[str]) -> Evaluation:
        """The same of a benchmark's split, whose class ids are positions in ``class_names``; unknown classes are left.

        Raises:
            DataError: it has no image of a class that the learner knows.
        """
        outputs = {name: output for output, name in enumerate(self.classes)}
        known = [c for c, name in enumerate(checked_names(class_names, "class_names")) if name in outputs]
        rows = checked_split(split).of_classes(known)
        if not len(rows):
            raise DataError(f"split must be of classes that were learned ({shorten(self.classes)}), got none of them")
        positions = torch.tensor([outputs.get(name, -1) for name in class_names], dtype=torch.int64)
        with self._at_work():
            batches = self._core.scores(Selection(split, rows, positions))
            return evaluate(batches, self.classes, [len(task) for task in self._past.tasks], self.config.head)

    # leaving ----------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """Writes all there is to ``folder``, at once or not at all; a learner saved there before is replaced. In a
        group of torch.distributed every process calls it, and the first one writes.

        Raises:
            ArgumentError: nothing was learned yet, or the folder holds something else.
            CheckpointError: it cannot be written.
        """
        self._require_classes()
        place = checked_path("folder", folder)
        with self._at_work():
            processes.from_first(lambda: replace_folder(place_of_learner(place), self._write))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | None = None,
        backbone: nn.Module | None = None,
        head: str | OwnHead | None = None,
        method: str | type[Method] | None = None,
    ) -> ContinualLearner:
        """The learner that was saved in ``folder``, or that a run of ``janus_ext.train`` has left there.

        Args:
            device: where it computes from now on; by default where it did, or what there is of that.
            backbone: a model of the architecture that it was made with, where that was none that timm makes by name.
            head: another than it had (no image is needed), or its own, where that is a function of yours: see method.
            method: its own, where that is one of your own: saying it is what lets its code be imported.

        Raises:
            ArgumentError: the folder holds nothing of that kind, or the head cannot be fitted.
            CheckpointError: no task was finished, a file is missing or altered, the method or head was not said.
        """
        run = Run.open(checked_path("folder", folder))
        settings, saved = run.settings(), run.saved()
        if saved is None:
            raise CheckpointError(f"{folder} has not finished a task yet: there is nothing to load")
        learner = cls.__new__(cls)
        config = stored_config(settings, device, head, method)
        with at_work(torch.device(config.device)):
            learner._core = make_learner(config, *stored_numbers(settings), network_of(settings, backbone))
            with run.fitting():
                learner._core.restore([len(names) for names in saved.tasks], saved.model, saved.method)
            check_network(learner._core, settings.get("probe"), run.folder)
            if head is not None:
                learner._core.method.decision()
        with run.fitting():
            learner._past = Past.of(run, settings, saved, config)
        learner._core.model.eval()
        return learner

    def model(self) -> nn.Module:
        """The plain timm model, merged, with one classifier for all classes: a copy on the CPU, float32.

        It takes normalised pixels and gives a score a class, see `Decision.rows`.

        Raises:
            ArgumentError: nothing was learned yet, or there is no linear classifier on the network's features.
        """
        with self._at_work():
            contents = self.contents()
            return plain_model(contents.model, *contents.decision.rows()).eval()

    def contents(self) -> Contents:
        """What exports are made of."""
        self._require_classes()
        learned = zip(self._past.factors, self._past.tasks, strict=True)
        updates = tuple(Update(factors, self.config.scale, names) for factors, names in learned)
        about = (self._settings(), updates, self._past.results, self.view)
        return Contents(self._core.model, self._core.method.decision(), self.classes, *about)

    def _settings(self) -> dict[str, Any]:
        """What ``config.json`` holds of a saved learner."""
        own = {"seed": [self._core.seed], "tasks": self._core.planned, "network": self._core.model.backbone.description}
        return self.config.to_json() | own | self._past.to_json()

    def _write(self, folder: Path) -> None:
        run, core = Run(folder), self._core
        about = {"method": self.config.method, "scale": str(self.config.scale)}
        run.write_settings(self._settings() | {"benchmark": None, "probe": network_probe(core)})
        for task, factors in enumerate(self._past.factors):
            run.write_factors(task, factors, about | {"task": str(task)})
        run.write_task(len(self._past.tasks) - 1, core.state(), about, self._past.tasks)

    # details ----------------------------------------------------------------------------------------------------------
    def _at_work(self) -> AbstractContextManager[None]:
        return at_work(self._core.device)

    def _require_classes(self) -> None:
        if not self._past.tasks:
            raise ArgumentError("nothing was learned yet: call learn() first")

    def _to_observe(self, images: Any, with_labels: bool) -> Split:
        split = self._labelled(images) if with_labels else unlabelled(images, self.view, self.workers())
        if with_labels:
            self._past.check_met(self._core.method.prototypes.classes, split.labels.unique().tolist())
        require_readable(split)
        return split

    def _labelled(self, images: Any) -> Split:
        self._require_classes()
        return labelled_as(images, self.classes, self.view, self.workers())
