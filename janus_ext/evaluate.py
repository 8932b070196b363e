"""``janus_ext.evaluate``: scores what a run has learned on test images. ``--help`` says how."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from janus_ext.config import TrainConfig
from janus_ext.config.checks import check_data_flags
from janus_ext.config.foreign import BENCHMARK
from janus_ext.config.parts import BENCHMARK_NAMES, HEAD_NAMES
from janus_ext.data import load_benchmark
from janus_ext.data.benchmark import Benchmark
from janus_ext.data.layout import TRAIN_NAMES, find_parts
from janus_ext.data.listing import subfolders
from janus_ext.data.workers import naming_lost_workers
from janus_ext.errors import ArgumentError, CheckpointError, DataError
from janus_ext.learner import ContinualLearner
from janus_ext.plugins import require_installed, typed
from janus_ext.reports.evaluation import Evaluation
from janus_ext.runs.folder import require_within
from janus_ext.runs.run import Run
from janus_ext.terminal import command

TRAINED_ON = "it was trained on images there, this is no test; without --data-dir a run scores those that it held out"
OTHERS = "the images are not those of the run, so that some may have been trained on"


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores what a run has learned: accuracy by task and by class, and what is taken for what.

    On the test images of the run's own benchmark, or of another one, or on a folder of class folders. Writes
    evaluation.json, per_class.csv, confusion.csv and confusion.png.
    For example: janus_ext.evaluate runs/photos --data-dir photos-of-this-year
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of a run of janus_ext.train, or of a learner that was saved."""
    benchmark: Annotated[str | None, arg(metavar=BENCHMARK_NAMES, help_behavior_hint="")] = None
    """A benchmark's test images, of the classes that the run knows; by default the run's own benchmark."""
    data_dir: Annotated[Path | None, arg(help_behavior_hint="")] = None
    """Where the benchmark's images lie; alone, a folder of class folders, or of train and test with such folders."""
    head: Annotated[str | None, arg(metavar=HEAD_NAMES, help_behavior_hint="")] = None
    """Another classifier than the run's own, for which no image is needed; one of your own has to be said again."""
    method: Annotated[str | None, arg(metavar="MODULE:CLASS", help_behavior_hint="")] = None
    """The run's method, where it is one of your own: saying it is what lets its code be loaded."""
    output: Annotated[Path | None, arg(help_behavior_hint="")] = None
    """Folder of the files; by default evaluation in the folder of the run."""
    device: Annotated[str | None, arg(help_behavior_hint="")] = None
    """cpu, cuda, cuda:1, ...; by default what the run was trained on, if it is there."""


@command("janus_ext.evaluate")
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates; 0 on success, 2 with one line on stderr for what the user can mend, 130 on Ctrl-C."""
    evaluate(tyro.cli(EvaluateConfig, prog="janus_ext.evaluate", args=argv))
    return 0


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Scores the run, prints a table and writes the files; returns what they hold."""
    run = Run.open(config.run)
    if config.output is None:
        require_within(run.folder)
    learner = ContinualLearner.load(config.run, config.device, head=typed(config.head), method=typed(config.method))
    with naming_lost_workers():
        found = (
            _on_benchmark(learner, run.settings(), config)
            if _wants_benchmark(config)
            else _on_folder(learner, run.settings(), config)
        )
    folder = config.output or run.folder / "evaluation"
    found.save(folder)
    print(f"{found.format()}\n\nfiles: {folder}")
    return found


def _wants_benchmark(config: EvaluateConfig) -> bool:
    return config.benchmark is not None or config.data_dir is None


def _on_folder(learner: ContinualLearner, settings: Mapping[str, Any], config: EvaluateConfig) -> Evaluation:
    if not config.data_dir.is_dir():
        raise DataError(f"--data-dir {config.data_dir} is no folder; wanted a folder of class folders")
    parts = find_parts(config.data_dir)
    if not parts and _is_trained_on(config.data_dir, settings):
        print(f"janus_ext.evaluate: {config.data_dir}: {TRAINED_ON}", file=sys.stderr)
    return learner.evaluate(config.data_dir / parts[1] if parts else config.data_dir)


def _is_trained_on(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the run, or a task that was learned later, took its images from this folder of class folders."""
    named = [Path(root) for root in (settings.get("data_dir"), *settings.get("learned_from", ())) if root]
    sides = [root / name for root in named for name in _training_sides(root)]
    return any(os.path.isdir(root) and root.samefile(folder) for root in (*named, *sides))


def _training_sides(root: Path) -> list[str]:
    """None where there is no such folder any more, or it is somebody else's."""
    try:
        return [name for name in subfolders(root) if name.lower() in TRAIN_NAMES]
    except DataError:
        return []


def _on_benchmark(learner: ContinualLearner, settings: Mapping[str, Any], config: EvaluateConfig) -> Evaluation:
    """On the test images that the run's own settings choose, or on those of another benchmark as it is by default."""
    name = typed(config.benchmark) or settings["benchmark"]
    if name is None:
        raise ArgumentError(f"{config.run} was not trained on a benchmark; name one with --benchmark, or a --data-dir")
    own = name == settings["benchmark"]
    kept = {field.name for field in fields(TrainConfig)} & settings.keys() if own else set()
    asked = {key: settings[key] for key in kept} | {"benchmark": name, "validation": None}  # the test images
    if config.data_dir is not None:
        asked["data_dir"] = config.data_dir
    wanted = TrainConfig(**asked)
    check_data_flags(wanted)
    if config.benchmark is None:
        require_installed(BENCHMARK, wanted.benchmark)
    benchmark = load_benchmark(wanted).at(learner.input_size)
    if own and "split_sha256" in settings and settings["split_sha256"] != _split_sha256(benchmark, settings):
        print(f"janus_ext.evaluate: {OTHERS}", file=sys.stderr)
    return learner.evaluate_split(benchmark.test, benchmark.class_names)


def _split_sha256(benchmark: Benchmark, settings: Mapping[str, Any]) -> str:
    """Fingerprint of the benchmark as a run with these settings took it, with images held out or not."""
    share = settings.get("validation")
    if share is not None and not (isinstance(share, float) and 0 < share < 1):
        raise CheckpointError(f"validation in config.json must lie between 0 and 1, got {share!r:.40}")
    return (benchmark if share is None else benchmark.with_validation(share, settings["seed"][0])).split_sha256


if __name__ == "__main__":
    sys.exit(main())
