"""``janus_ext.train``: trains on a benchmark and writes a run folder. ``--help`` lists every flag."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from janus_ext.backbone import load_backbone, weight_file
from janus_ext.classifier import ContinualClassifier
from janus_ext.config import TrainConfig
from janus_ext.data import BENCHMARKS
from janus_ext.data.benchmark import Benchmark
from janus_ext.data.workers import naming_lost_workers
from janus_ext.devices import AMP_DTYPES, deterministic, pick_amp, pick_device
from janus_ext.errors import ArgumentError, CheckpointError, JanusError
from janus_ext.methods import METHODS
from janus_ext.methods.base import Method
from janus_ext.reports import plots, table
from janus_ext.runs.checkpoint import read_json, write_json
from janus_ext.runs.folder import (
    check_same_seeds,
    check_same_settings,
    choose_folder,
    is_finished,
    is_run,
    opened,
    settings_of,
)
from janus_ext.terminal import TerminalHandler, escaping, until_closed
from janus_ext.training import events, opening
from janus_ext.training.trainer import Trainer, derive_seed

LOG = logging.getLogger("janus_ext")


@escaping()
@until_closed
def main(argv: Sequence[str] | None = None) -> int:
    """Parses ``argv`` and trains; 0 on success, 2 with one line on stderr for what the user can mend, 130 on Ctrl-C."""
    config = tyro.cli(TrainConfig, prog="janus_ext.train", args=argv)
    try:
        train(config)
    except BrokenPipeError:  # no error of ours: see until_closed
        raise
    except (JanusError, OSError) as error:  # the system's own errors name the file and what is wrong with it
        print(f"janus_ext.train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\njanus_ext.train: interrupted; the same call with --resume goes on with the run", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def train(config: TrainConfig) -> list[table.Results]:
    """One run per seed; returns the results of each, in the order of the seeds."""
    config = config.resolved()
    if config.tensorboard:
        events.require_tensorboard()
    if config.check_data:
        check_data(config)
        return []
    device = pick_device(config.device)
    with deterministic(device):
        return train_seeds(replace(config, device=str(device), amp=pick_amp(config.amp, device)))


def train_seeds(config: TrainConfig) -> list[table.Results]:
    """The runs of a resolved configuration, and their summary where they are several."""
    folder = choose_folder(config)
    if len(config.seed) == 1:
        return [run_seed(config, folder)]
    check_same_seeds(folder, config.seed)
    runs = [run_seed(replace(config, seed=(seed,)), folder / f"seed-{seed}") for seed in config.seed]
    write_json(folder / "summary.json", table.summarize_runs(runs))
    print(table.format_summary(runs))
    return runs


def check_data(config: TrainConfig) -> None:
    """Loads the benchmark, which decodes every image and prints what is wrong with it; DataError if it is unusable."""
    benchmark = BENCHMARKS[config.benchmark](config)
    print(
        f"{benchmark.name}: {len(benchmark.train):,} training and {len(benchmark.test):,} test images, "
        f"{len(benchmark.class_names)} classes in {len(benchmark.tasks)} tasks, split {benchmark.split_sha256}"
    )


def run_seed(config: TrainConfig, folder: Path) -> table.Results:
    """Trains with the one seed of ``config``, or takes what ``folder`` has of it; writes and prints the results."""
    benchmark = BENCHMARKS[config.benchmark](config)
    config = replace(config, tasks=len(benchmark.tasks))
    settings = settings_of(config, benchmark, weight_file(config.backbone, config.weights))
    finished = is_finished(folder)
    begin = not finished and not (config.resume and is_run(folder))
    if not begin:
        check_same_settings(settings, folder)
    if finished:
        results = take_results(folder, benchmark)
    else:
        trainer = make_trainer(config, benchmark, folder)
        with opened(folder, settings, begin), logging_to(folder / "log.txt"):
            LOG.info("%s on %s, %d tasks, run folder %s", config.method, benchmark.name, len(benchmark.tasks), folder)
            for line in opening.lines(trainer):
                LOG.info("%s", line)
            if not begin:
                trainer.restore()
            with naming_lost_workers():
                results = trainer.run()
            write_json(folder / "results.json", results)
    print(f"\n{table.format_table(results)}\n\nrun folder: {folder}")
    if config.plots:
        plots.save_plots(results, folder / "plots")
    return results


def take_results(folder: Path, benchmark: Benchmark) -> table.Results:
    """The results of a run that has finished; CheckpointError when they are damaged, or of other images."""
    path = folder / "results.json"
    results = read_json(path)
    if results.get("split_sha256") != benchmark.split_sha256 or "accuracy_matrix" not in results:
        raise CheckpointError(f"{path} holds no results of these images in this order of classes")
    print(f"{folder} has finished before: its results are taken")
    return results


def make_trainer(config: TrainConfig, benchmark: Benchmark, folder: Path) -> Trainer:
    """The backbone, the model and the method of ``config``, whose first factors derive from the seed."""
    torch.manual_seed(derive_seed(config.seed[0], -1, -1, "backbone and first factors"))
    backbone = load_backbone(config.backbone, config.weights, config.image_size).to(config.device)
    model = ContinualClassifier(backbone, AMP_DTYPES[config.amp], config.normalize)
    method = make_method(model, config)
    return Trainer(config, benchmark.at(model.input_size), model, method, folder)


def make_method(model: ContinualClassifier, config: TrainConfig) -> Method:
    """The method on this model; ArgumentError, with the backbone's name before it, when the two do not fit."""
    try:
        return METHODS[config.method](model, config)
    except ArgumentError as error:
        raise ArgumentError(f"--backbone {config.backbone}: {error}") from error


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Sends the program's log to the terminal, around the progress bar, and to ``path``."""
    try:
        file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handlers, level = [file, TerminalHandler()], LOG.level  # the file first: it is whole wherever the terminal ends
    LOG.setLevel(logging.INFO)
    for handler in handlers:
        LOG.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            LOG.removeHandler(handler)
        LOG.setLevel(level)
        file.close()


if __name__ == "__main__":
    sys.exit(main())
