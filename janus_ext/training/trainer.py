"""The protocol of a benchmark: its tasks one after another, and the accuracy on all of them after each."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

from janus_ext import processes
from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.methods.base import TaskReport
from janus_ext.runs import metrics
from janus_ext.runs.checkpoint import to_json
from janus_ext.training import events
from janus_ext.training.keeping import Keeping
from janus_ext.training.progress import Progress, make_bar
from janus_ext.training.underway import State
from janus_ext.versions import result_versions

if TYPE_CHECKING:
    from janus_ext.config import TrainConfig
    from janus_ext.data.benchmark import Benchmark
    from janus_ext.runs.run import Run
    from janus_ext.training.loop import Learner

LOG = logging.getLogger("janus_ext")
MATRICES = ("accuracy_matrix", "accuracy_matrix_task_known", "task_recognition_matrix")  # R, K and D of metrics
REPORTED = (  # as in a TaskReport
    "violation_per_layer",
    "violation_rounding_per_layer",
    "basis_rank",
    "movement",
    "merged",
    "danger",
    "similarity_own",
    "similarity_old",
)
LATER = ("movement", "merged")  # of these, what runs of earlier versions lack


class Trainer:
    """Lets ``learner`` learn the tasks of ``benchmark`` and fills the folder of ``run``."""

    def __init__(self, config: TrainConfig, benchmark: Benchmark, learner: Learner, run: Run) -> None:
        self.config = config
        self.benchmark = benchmark
        self.learner = learner
        self.run_on_disk = run
        self.train_images = [benchmark.training(task) for task in range(len(benchmark.tasks))]
        self.test_images = [benchmark.testing(task) for task in range(len(benchmark.tasks))]
        self.matrix: list[list[float]] = []
        self.known: list[list[float]] = []
        self.recognised: list[list[float]] = []
        self.heads: dict[str, list[list[float]]] = {}  # R of all heads measured, the configuration's among them
        self.reports: list[TaskReport] = []
        self.seconds: list[float] = []
        self.keeping = Keeping(self._keep, config.save_every)
        self._started = 0.0  # of the task that is being learned, on the clock of this process
        self._check_tasks()

    def restore(self) -> None:
        """Takes up the run in the folder where it was kept last: within a task, behind one, or at its beginning.

        Raises:
            CheckpointError: a file of that run is damaged, or does not belong to this benchmark, model and method.
        """
        run, saved = self.run_on_disk, self.run_on_disk.saved()
        begun: list[dict[str, Any]] = []
        if saved is not None:
            with run.fitting():
                begun.append(self._restore_results(json.loads(saved.about.get("results", "{}"))))
                self.results()  # which says what none of them can be
                sizes = [len(classes) for classes in self.benchmark.tasks[: len(self.matrix)]]
                self.learner.restore(sizes, saved.model, saved.method)
        within = run.within()
        if within is not None:
            self.keeping.start = self._checked(State(*within))
            begun.append(self.keeping.start.versions)
        _warn_of_other_versions(begun)
        run.keep_epochs([self._epochs(task) for task in range(len(self.matrix))] + [self._epochs_within()])
        run.remove_methods_before(len(self.matrix) - 1)
        LOG.info("goes on after task %d/%d", len(self.matrix), len(self.benchmark.tasks))
        if self.keeping.start is not None:
            LOG.info("and within the next task behind %d of its epochs and %d steps", *self.keeping.start.position)

    def _restore_results(self, results: dict[str, Any]) -> dict[str, Any]:
        """The inverse of ``results``, but for the versions, which are returned; the factors of old tasks stay in their
        files.
        """
        folder = self.run_on_disk.folder
        results = {"heads": {}} | dict.fromkeys(LATER, [None] * len(results.get("seconds", []))) | results
        if not results.keys() >= {"split_sha256", "versions", *MATRICES, "seconds", *REPORTED}:
            raise CheckpointError(
                f"{folder}/checkpoints/model.safetensors lacks results: an earlier version of this program wrote it"
            )
        if results["split_sha256"] != self.benchmark.split_sha256:
            raise CheckpointError(f"{folder} holds a run on other image files, or with another order of classes")
        self.matrix, self.known, self.recognised = (results[name] for name in MATRICES)
        measured = {name: of["accuracy_matrix"] for name, of in results["heads"].items()}
        self.heads = measured or {self.config.head: self.matrix[:]}  # an earlier version measured no other
        self.seconds = results["seconds"]
        self.reports = [TaskReport(*row) for row in zip(*(results[name] for name in REPORTED), strict=True)]
        return {"processes": 1} | results["versions"]  # which runs of earlier versions have not counted

    def run(self) -> dict[str, Any]:
        """Learns every task that is left, evaluating after each; returns what ``results.json`` holds."""
        self.run_on_disk.prepare()
        done, total = len(self.matrix), len(self.benchmark.tasks)
        wanted = self.config.tensorboard and processes.is_first()
        scalars = self.run_on_disk.folder / "tensorboard" if wanted else None
        bar = make_bar(self.step_count(total), self.step_count(done) + self._steps_within())
        epochs = self._epochs_before(done) + self._epochs_within()
        with bar, events.writing(scalars, max(epochs, done)) as write, self.keeping.listening():
            progress = Progress(bar, total, self.config.epochs)
            for index in range(done, total):
                self._learn(index, progress, write)
                self._take_up(self._evaluate(index))
                self._write_task(index, write)
                self._save(index)
                self._log_task(index)
        return self.results()

    def results(self) -> dict[str, Any]:
        """The tasks learned so far under the names of ``results.json``."""
        return {
            "benchmark": self.benchmark.name,
            "method": self.config.method,
            "head": self.config.head,
            "seed": self.learner.seed,
            "class_order": list(self.benchmark.class_order),
            "class_names": list(self.benchmark.class_names),
            "split_sha256": self.benchmark.split_sha256,
            "validation": self.benchmark.validation,
            **dict(zip(MATRICES, (self.matrix, self.known, self.recognised), strict=True)),
            **metrics.summarize(self.matrix, self.known, self.recognised, self._test_sizes()),
            "heads": {name: metrics.summarize_head(matrix) for name, matrix in self.heads.items()},
            "violation": [_mean_or_none(report.violation.values()) for report in self.reports],
            "violation_per_layer": [report.violation for report in self.reports],
            "violation_rounding_per_layer": [report.violation_rounding for report in self.reports],
            "movement": [report.movement for report in self.reports],
            "merged": [report.merged for report in self.reports],
            "danger": [report.danger for report in self.reports],
            "similarity_own": [report.similarity_own for report in self.reports],
            "similarity_old": [report.similarity_old for report in self.reports],
            "basis_rank": [report.basis_rank for report in self.reports],
            "test_sizes": self._test_sizes(),
            "seconds": self.seconds,
            "versions": result_versions(),
        }

    def step_count(self, tasks: int) -> int:
        """Number of steps in the first ``tasks`` tasks."""
        return sum(self._steps(task) for task in range(tasks))

    def _learn(self, index: int, progress: Progress, write: events.Write) -> None:
        """One task: trained, consolidated, reported, timed."""

        def record(epoch: dict[str, Any]) -> None:
            self.run_on_disk.write_epoch(epoch)
            scalars = {name: epoch[name] for name in ("loss", "accuracy", "lr", "head_lr")}
            write("epoch", scalars, self._epochs_before(index) + epoch["epoch"] + 1)

        before = self.keeping.start.about["seconds"] if self.keeping.start else 0.0
        self._started = time.perf_counter() - before
        classes = len(self.benchmark.tasks[index])
        self.reports.append(self.learner.learn(self.train_images[index], classes, progress, record, self.keeping))
        self.seconds.append(time.perf_counter() - self._started)

    def _keep(self, state: State) -> None:
        """Writes the state within the task."""
        seconds = time.perf_counter() - self._started
        about = state.about | {"seconds": seconds, "versions": result_versions()}
        self.run_on_disk.write_within(state.tensors, about)

    def _checked(self, state: State) -> State:
        """``state``, if it is one of the next task."""
        task = len(self.matrix)
        epochs = self._epochs(task)
        state.check(epochs, self._steps(task) // max(1, epochs))
        return state

    def _epochs_within(self) -> int:
        """Number of epochs that are done of the task to go on with."""
        return self.keeping.start.position[0] if self.keeping.start else 0

    def _steps_within(self) -> int:
        """Number of its steps."""
        if self.keeping.start is None:
            return 0
        task, (epoch, step) = len(self.matrix), self.keeping.start.position
        return epoch * self._steps(task) // self._epochs(task) + step

    def _evaluate(self, index: int) -> dict[str, list[list[float]]]:
        """For every head row ``index`` of the three matrices of `metrics`, from one pass over the test images."""
        decisions = self.learner.method.decisions()
        tested = self.test_images[: index + 1]
        counts = [self.learner.count_hits(task, images, decisions) for task, images in enumerate(tested)]

        def row(head: str, kind: int) -> list[float]:
            return [100 * hits[head][kind] / len(images) for hits, images in zip(counts, tested, strict=True)]

        return {head: [row(head, kind) for kind in range(len(MATRICES))] for head in decisions}

    def _take_up(self, rows: dict[str, list[list[float]]]) -> None:
        """Adds what was measured after a task; a head that was not measured after an earlier one is let go."""
        done = len(self.matrix)
        earlier = {head: self.heads.get(head, []) for head in rows}
        self.heads = {head: [*R, rows[head][0]] for head, R in earlier.items() if len(R) == done}
        for matrix, row in zip((self.matrix, self.known, self.recognised), rows[self.config.head], strict=True):
            matrix.append(row)

    def _epochs_before(self, task: int) -> int:
        """Number of epochs in the tasks before this one."""
        return sum(self._epochs(earlier) for earlier in range(task))

    def _epochs(self, task: int) -> int:
        """Number of epochs in a task."""
        return self.learner.epochs(task, len(self.benchmark.tasks[task]))

    def _steps(self, task: int) -> int:
        """Number of steps in it."""
        return self.learner.step_count(task, len(self.benchmark.tasks[task]), len(self.train_images[task]))

    def _save(self, index: int) -> None:
        """Writes what a run keeps of a task."""
        benchmark = self.benchmark
        about = {"method": self.config.method, "scale": str(self.config.scale)}
        about["class_names"] = to_json(benchmark.class_names)  # by class id; ASCII, whatever the names are
        tasks = [[benchmark.class_names[c] for c in classes] for classes in benchmark.tasks[: index + 1]]
        of_task = about | {"task": str(index), "classes": to_json(benchmark.tasks[index])}
        self.run_on_disk.write_factors(index, self.reports[index].factors, of_task)
        self.run_on_disk.write_task(index, self.learner.state(), about, tasks, self.results())

    def _log_task(self, index: int) -> None:
        seen, known, recognised = (sum(m[index]) / (index + 1) for m in (self.matrix, self.known, self.recognised))
        LOG.info(
            "task %d/%d: accuracy on all seen %.2f %% (%.2f %% with the task known, task recognised %.2f %%), "
            "on the new classes %.2f %%, %.1f s",
            *(index + 1, len(self.benchmark.tasks), seen, known, recognised, self.matrix[index][-1]),
            self.seconds[index],
        )

    def _write_task(self, index: int, write: events.Write) -> None:
        results = self.results()
        values = {name: results[name][index] for name in ("violation", "danger")}
        values |= {name: results[name] for name in ("acc", "acc_task_known", "task_recognition")}
        values["basis_rank"] = _mean_or_none(results["basis_rank"][index].values())
        write("task", values, index + 1)  # steps count what is done: tasks here, epochs of the whole run above

    def _test_sizes(self) -> list[int]:
        """Number of test images of each task learned so far."""
        return [len(images) for images in self.test_images[: len(self.matrix)]]

    def _check_tasks(self) -> None:
        for index, (train, test) in enumerate(zip(self.train_images, self.test_images, strict=True)):
            if not len(train) or not len(test):
                raise ArgumentError(f"task {index + 1} has {len(train)} training and {len(test)} test images")


def _warn_of_other_versions(begun: list[dict[str, Any]]) -> None:
    """Where what was kept was computed with others than there are now, or with another number of threads; what an
    earlier version of this program kept within a task says nothing of it, ``{}``.
    """
    others = [name for name, version in result_versions().items() if any(b and b.get(name) != version for b in begun)]
    if others:
        LOG.warning(
            "begun with other versions, threads or processes (%s): bits may differ from now on", ", ".join(others)
        )


def _mean_or_none(values: Any) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None
