"""The one training loop: tasks, epochs, steps. It knows what a method is, and no method in particular.

Every random number derives from (seed, task, epoch, purpose), never from what ran before, so a run is repeatable bit
for bit on one machine, and one that was cut off is taken up again behind the last task that it finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from janus_ext.config import TrainConfig
from janus_ext.data.benchmark import Benchmark, Split
from janus_ext.errors import ArgumentError, CheckpointError, StatisticsError, TrainingError
from janus_ext.methods.base import Method, Step, Task, TaskReport
from janus_ext.runs import metrics
from janus_ext.runs.checkpoint import (
    SHA256,
    append_json_line,
    make_folder,
    read_json_lines,
    read_tensors,
    remove,
    to_json,
    write_json_lines,
    write_tensors,
)
from janus_ext.training import events
from janus_ext.training.optimization import make_optimizer, schedule
from janus_ext.training.progress import Progress, make_bar
from janus_ext.versions import result_versions

if TYPE_CHECKING:
    from pathlib import Path

    from janus_ext.classifier import ContinualClassifier

LOG = logging.getLogger("janus_ext")
MATRICES = ("accuracy_matrix", "accuracy_matrix_task_known", "task_recognition_matrix")  # R, K and D of metrics
REPORTED = (  # as in a TaskReport
    "violation_per_layer",
    "violation_rounding_per_layer",
    "basis_rank",
    "danger",
    "similarity_own",
    "similarity_old",
)


class Trainer:
    """Trains ``model`` with ``method`` on the tasks of ``benchmark`` and fills the run folder."""

    def __init__(
        self, config: TrainConfig, benchmark: Benchmark, model: ContinualClassifier, method: Method, folder: Path
    ) -> None:
        self.config = config
        self.benchmark = benchmark
        self.model = model
        self.method = method
        self.folder = folder
        self.seed = config.seed[0]
        self.device = next(model.parameters()).device
        self.positions = benchmark.positions
        self.train_rows = [benchmark.train.of_classes(classes) for classes in benchmark.tasks]
        self.test_rows = [benchmark.test.of_classes(classes) for classes in benchmark.tasks]
        self.matrix: list[list[float]] = []
        self.known: list[list[float]] = []
        self.recognised: list[list[float]] = []
        self.reports: list[TaskReport] = []
        self.seconds: list[float] = []
        self.write: events.Write = events.write_nothing
        self._check_tasks()
        if config.compile:
            model.compile_backbone()

    def restore(self) -> None:
        """Takes up the run in the folder behind the last task that it finished; at its beginning if it finished none.

        Raises:
            CheckpointError: a file of that run is damaged, or does not belong to this benchmark, model and method.
        """
        path = self.folder / "checkpoints" / "model.safetensors"
        if not path.exists() and any(p.name != "factors-0.safetensors" for p in path.parent.glob("factors-*")):
            raise CheckpointError(f"{path} is missing, and tasks were finished; without --resume the run starts over")
        if path.exists():
            model, about = read_tensors(path)
            results = json.loads(about.get("results", "{}"))
            if not results.keys() >= {"split_sha256", "versions", *MATRICES, "seconds", *REPORTED}:
                raise CheckpointError(f"{path} lacks results: it was written by an earlier version of this program")
            self._restore_results(results)
            beside = self._method_path(len(self.matrix) - 1)
            state, of_method = read_tensors(beside)
            if of_method.get(SHA256) != about["state"]:
                raise CheckpointError(f"{beside} does not belong to {path}")
            for classes in self.benchmark.tasks[: len(self.matrix)]:
                self.model.add_task(len(classes))
            with naming_file(path):
                self.model.load_state_dict(model)
            with naming_file(beside):
                self.method.load_state_dict(state)
        self._keep_lines_of_finished_tasks()
        self._remove_methods_before(len(self.matrix) - 1)
        LOG.info("taken up behind task %d/%d", len(self.matrix), len(self.benchmark.tasks))

    def _restore_results(self, results: dict[str, Any]) -> None:
        """The inverse of ``results``; the factors of old tasks stay in their files."""
        if results["split_sha256"] != self.benchmark.split_sha256:
            raise CheckpointError(f"{self.folder} holds a run on other image files, or with another order of classes")
        others = [name for name, version in result_versions().items() if results["versions"].get(name) != version]
        if others:
            LOG.warning("begun with other versions or threads (%s): bits may differ from now on", ", ".join(others))
        self.matrix, self.known, self.recognised = (results[name] for name in MATRICES)
        self.seconds = results["seconds"]
        self.reports = [TaskReport(*row) for row in zip(*(results[name] for name in REPORTED), strict=True)]

    def _keep_lines_of_finished_tasks(self) -> None:
        path = self.folder / "metrics.jsonl"
        lines = read_json_lines(path)
        wanted = [(task, epoch) for task in range(len(self.matrix)) for epoch in range(self.config.epochs)]
        kept = [line for line in lines if (line.get("task"), line.get("epoch")) in wanted]
        if [(line["task"], line["epoch"]) for line in kept] != wanted:
            LOG.warning("%s was altered: it does not hold every epoch of the finished tasks once", path)
        write_json_lines(path, kept)

    def run(self) -> dict[str, Any]:
        """Learns every task that is left, evaluating after each; returns what ``results.json`` holds."""
        make_folder(self.folder / "checkpoints")
        done = len(self.matrix)
        bar = make_bar(self.step_count(len(self.benchmark.tasks)), self.step_count(done))
        scalars = self.folder / "tensorboard" if self.config.tensorboard else None
        with bar, events.writing(scalars, done * self.config.epochs) as self.write, compiling(), repeatable():
            progress = Progress(bar, len(self.benchmark.tasks), self.config.epochs)
            for index in range(done, len(self.benchmark.tasks)):
                with naming_task(index):
                    self._learn(index, progress)
                for matrix, row in zip((self.matrix, self.known, self.recognised), self._evaluate(index), strict=True):
                    matrix.append(row)
                self._write_task(index)
                self._save(index)
                self._log_task(index)
        return self.results()

    def results(self) -> dict[str, Any]:
        """The tasks learned so far under the names of ``results.json``."""
        return {
            "benchmark": self.benchmark.name,
            "method": self.config.method,
            "seed": self.seed,
            "class_order": list(self.benchmark.class_order),
            "class_names": list(self.benchmark.class_names),
            "split_sha256": self.benchmark.split_sha256,
            **dict(zip(MATRICES, (self.matrix, self.known, self.recognised), strict=True)),
            **metrics.summarize(self.matrix, self.known, self.recognised, self._test_sizes()),
            "violation": [_mean_or_none(report.violation.values()) for report in self.reports],
            "violation_per_layer": [report.violation for report in self.reports],
            "violation_rounding_per_layer": [report.violation_rounding for report in self.reports],
            "danger": [report.danger for report in self.reports],
            "similarity_own": [report.similarity_own for report in self.reports],
            "similarity_old": [report.similarity_old for report in self.reports],
            "basis_rank": [report.basis_rank for report in self.reports],
            "test_sizes": self._test_sizes(),
            "seconds": self.seconds,
            "versions": result_versions(),
        }

    def _learn(self, index: int, progress: Progress) -> None:
        """Trains task ``index`` and lets the method consolidate it."""
        started = time.perf_counter()
        torch.manual_seed(derive_seed(self.seed, index, -1, "factors and head"))
        task = self._task(index)
        self.method.begin_task(task)
        optimizer = make_optimizer(self.config, self.method.trainable(), list(self.model.heads[-1].parameters()))
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.amp == "fp16")
        self.model.train()
        for epoch in range(self.config.epochs):
            self._train_epoch(task, epoch, optimizer, scaler, progress)
        torch.manual_seed(derive_seed(self.seed, index, self.config.epochs, "next factors"))
        self.reports.append(self.method.end_task(task))
        self.seconds.append(time.perf_counter() - started)

    def _train_epoch(
        self, task: Task, epoch: int, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, progress: Progress
    ) -> None:
        started = time.perf_counter()
        share = schedule(self.config, epoch)
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        torch.manual_seed(derive_seed(self.seed, task.index, epoch, "model"))
        self.method.begin_epoch(is_last=epoch == self.config.epochs - 1)
        progress.begin_epoch(task.index, epoch)
        for images, labels in self._training_batches(task.index, epoch):
            step = self._step(images, labels - task.first, optimizer, scaler)
            progress.add(step.loss, step.correct, len(images))
        progress.read()
        if scaler.get_scale() < 1:  # 1 without a scaler; halved at every step that was left out
            raise TrainingError(
                f"float16 does not hold the gradients of task {task.index + 1}, epoch {epoch + 1}, however small "
                "the loss is scaled; --amp bf16 or --amp off will help"
            )
        values = {"loss": progress.loss, "accuracy": progress.accuracy}
        values["lr"], values["head_lr"] = (group["lr"] for group in optimizer.param_groups)
        record = {"task": task.index, "epoch": epoch, **values, "seconds": time.perf_counter() - started}
        append_json_line(self.folder / "metrics.jsonl", record)
        progress.end_epoch(record["seconds"])
        self.write("epoch", values, task.index * self.config.epochs + epoch + 1)

    def _step(
        self, images: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> Step:
        """forward, backward, unscale, rectify, clip, step.

        Gradients that float16 did not hold are rectified and clipped like others; then the scaler leaves the step out.
        """
        optimizer.zero_grad(set_to_none=True)
        step = self._forward_backward(images, targets, scaler)
        scaler.unscale_(optimizer)
        self.method.after_backward()
        if self.config.clip_norm is not None:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        self.method.after_step()
        return step

    def _forward_backward(self, images: Tensor, targets: Tensor, scaler: torch.amp.GradScaler) -> Step:
        """Adds up the gradients of the batch's mean loss, piece after piece; all pieces but the last are one size."""
        size = -(-self.config.batch_size // self.config.accumulate)
        loss, correct = 0.0, 0
        for piece, labels in zip(images.split(size), targets.split(size), strict=True):
            step = self.method.loss(piece, labels)
            share = step.loss * (len(piece) / len(images))
            scaler.scale(share).backward()
            loss, correct = loss + share.detach(), correct + step.correct
        return Step(loss, correct)

    @torch.no_grad()
    def _evaluate(self, index: int) -> list[list[float]]:
        """Row ``index`` of the three matrices of `metrics`, from one pass over the test images of tasks 0..index."""
        self.model.eval()
        shares = []
        for task, rows in enumerate(self.test_rows[: index + 1]):
            span = self._first(task), len(self.benchmark.tasks[task])
            batches = self._clean_batches(self.benchmark.test, rows)
            counts = [metrics.hits(self.method.scores(images), labels, *span) for images, labels in batches]
            shares.append([100 * count / len(rows) for count in torch.stack(counts).sum(0).tolist()])
        self.model.train()
        return [list(row) for row in zip(*shares, strict=True)]

    def _save(self, index: int) -> None:
        """Writes the task's factors before their merge, what the method keeps, and the model.

        The model comes last and carries the results: with it the task is finished, and what the method kept before
        is not needed any more. Cut off anywhere, the files of one finished task are all there.
        """
        folder = self.folder / "checkpoints"
        about = {"task": str(index), "method": self.config.method, "scale": str(self.config.scale)}
        about["class_names"] = to_json(self.benchmark.class_names)  # by class id; ASCII, whatever the names are
        factors = about | {"classes": to_json(self.benchmark.tasks[index])}
        write_tensors(folder / f"factors-{index}.safetensors", self.reports[index].factors, factors)
        about["state"] = write_tensors(self._method_path(index), self.method.state_dict(), about)
        about["results"] = to_json(self.results())
        write_tensors(folder / "model.safetensors", self.model.state_dict(), about)
        self._remove_methods_before(index)

    def _method_path(self, index: int) -> Path:
        return self.folder / "checkpoints" / f"method-{index}.safetensors"

    def _remove_methods_before(self, index: int) -> None:
        """Removes what the method kept after earlier tasks."""
        remove(self._method_path(earlier) for earlier in range(index))

    def _log_task(self, index: int) -> None:
        seen, known, recognised = (sum(m[index]) / (index + 1) for m in (self.matrix, self.known, self.recognised))
        LOG.info(
            "task %d/%d: accuracy on all seen %.2f %% (%.2f %% with the task known, task recognised %.2f %%), "
            "on the new classes %.2f %%, %.1f s",
            *(index + 1, len(self.benchmark.tasks), seen, known, recognised, self.matrix[index][-1]),
            self.seconds[index],
        )

    def _write_task(self, index: int) -> None:
        results = self.results()
        values = {name: results[name][index] for name in ("violation", "danger")}
        values |= {name: results[name] for name in ("acc", "acc_task_known", "task_recognition")}
        values["basis_rank"] = _mean_or_none(results["basis_rank"][index].values())
        self.write("task", values, index + 1)  # steps count what is done: tasks here, epochs of the whole run above

    def _task(self, index: int) -> Task:
        return Task(
            index=index,
            total=len(self.benchmark.tasks),
            first=self._first(index),
            classes=len(self.benchmark.tasks[index]),
            clean_batches=lambda: self._clean_batches(self.benchmark.train, self.train_rows[index]),
            augmented_batches=lambda: self._training_batches(index, self.config.epochs),
        )

    def _first(self, index: int) -> int:
        """The model's first output for a class of task ``index``."""
        return sum(len(classes) for classes in self.benchmark.tasks[:index])

    def _training_batches(self, index: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The task's images in random order, augmented; epochs beyond the last one serve the method's statistics."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, index, epoch, "data"))
        rows = self.train_rows[index]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        return self._to_device(self.benchmark.train.stream(rows.split(self.config.batch_size), generator))

    def _clean_batches(self, split: Split, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return self._to_device(split.stream(rows.split(self.model.images_at_once)))

    def _to_device(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Moves batches to the model's device, their class ids mapped to the model's outputs."""
        for images, labels in batches:
            outputs = self.positions[labels]
            yield images.to(self.device, non_blocking=True), outputs.to(self.device, non_blocking=True)

    def step_count(self, tasks: int) -> int:
        """Number of steps in the first ``tasks`` tasks."""
        return self.config.epochs * sum(-(-len(rows) // self.config.batch_size) for rows in self.train_rows[:tasks])

    def _test_sizes(self) -> list[int]:
        """Number of test images of each task learned so far."""
        return [len(rows) for rows in self.test_rows[: len(self.matrix)]]

    def _check_tasks(self) -> None:
        for index, (train, test) in enumerate(zip(self.train_rows, self.test_rows, strict=True)):
            if not len(train) or not len(test):
                raise ArgumentError(f"task {index + 1} has {len(train)} training and {len(test)} test images")


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Says which file does not fit, in one line."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} does not fit this run: {reason[-1].strip()}") from error


@contextmanager
def naming_task(index: int) -> Iterator[None]:
    """Says in which task a layer's statistics went bad."""
    try:
        yield
    except StatisticsError as error:
        raise TrainingError(f"task {index + 1}: {error}") from error


@contextmanager
def compiling() -> Iterator[None]:
    """Turns the pages in which torch.compile fails, at the first batch or later, into one line."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrainingError(f"--compile fails here, leave it out or see to this: {reason}") from error


@contextmanager
def repeatable() -> Iterator[None]:
    """Says which operator has no repeatable kernel, where PyTorch is to use no other."""
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if not found:
            raise
        raise TrainingError(
            f"PyTorch's {found[1]} has no repeatable kernel on this device, and the model needs it: another --backbone "
            "or --device cpu will help"
        ) from error


def derive_seed(seed: int, task: int, epoch: int, purpose: str) -> int:
    """A 63-bit seed for one purpose in one epoch of one task."""
    digest = hashlib.sha256(f"{seed}/{task}/{epoch}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _mean_or_none(values: Any) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None
