"""``janus_ext.train``: trains on a benchmark and writes a run folder. ``--help`` lists every flag."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from tqdm.contrib.logging import logging_redirect_tqdm

from janus_ext import events, report
from janus_ext.backbone import load_backbone
from janus_ext.checkpoint import make_folder, read_json, remove, write_json
from janus_ext.classifier import ContinualClassifier
from janus_ext.config import TrainConfig
from janus_ext.data import BENCHMARKS
from janus_ext.errors import ArgumentError, CheckpointError, JanusError
from janus_ext.methods import METHODS
from janus_ext.methods.base import Method
from janus_ext.trainer import AMP_DTYPES, Trainer, be_deterministic, derive_seed, pick_amp, pick_device

LOG = logging.getLogger("janus_ext")
RUN_FILES = ("metrics.jsonl", "results.json", "log.txt")
UNTOLD = {"output", "resume", "plots", "tensorboard", "workers", "cache_images"}  # settings that results do not show
SETTLED = {"device", "amp", "tasks"}  # settings that a run makes definite
RUN_GLOBS = ("checkpoints/*", "plots/*.png", "tensorboard/events.out.*")
LEFTOVERS = (".*.json*.*.tmp", "checkpoints/.*.safetensors.*.tmp")  # of writes that were cut off


def main(argv: Sequence[str] | None = None) -> int:
    """Parses ``argv`` and trains; 0 on success, 2 with one line on stderr when the user can set it right."""
    config = tyro.cli(TrainConfig, prog="janus_ext.train", args=argv)
    try:
        train(config)
    except JanusError as error:
        print(f"janus_ext.train: {error}", file=sys.stderr)
        return 2
    return 0


def train(config: TrainConfig) -> list[report.Results]:
    """One run per seed; returns the results of each, in the order of the seeds."""
    config = config.resolved()
    if config.tensorboard:
        events.require_tensorboard()
    if config.check_data:
        check_data(config)
        return []
    folder = choose_folder(config)
    if len(config.seed) == 1:
        return [run_or_take(config, folder)]
    runs = [run_or_take(replace(config, seed=(seed,)), folder / f"seed-{seed}") for seed in config.seed]
    write_json(folder / "summary.json", report.summarize_runs(runs))
    print(report.format_summary(runs))
    return runs


def check_data(config: TrainConfig) -> None:
    """Loads the benchmark, which decodes every image and prints what is wrong with it; DataError if it is unusable."""
    benchmark = BENCHMARKS[config.benchmark](config)
    print(
        f"{benchmark.name}: {len(benchmark.train):,} training and {len(benchmark.test):,} test images, "
        f"{len(benchmark.class_names)} classes in {len(benchmark.tasks)} tasks, split {benchmark.split_sha256}"
    )


def run_or_take(config: TrainConfig, folder: Path) -> report.Results:
    """The results of one seed: those in its folder, if it had finished before, or a run's.

    Raises ArgumentError when they were made with other settings.
    """
    path = folder / "results.json"
    if not path.exists():
        return run_seed(config, folder)
    check_same_settings(config, folder)
    print(f"{folder} has finished before: its results are taken")
    results = read_json(path)
    if config.plots:
        report.save_plots(results, folder / "plots")
    return results


def run_seed(config: TrainConfig, folder: Path) -> report.Results:
    """Trains with the one seed of ``config``; writes and prints the results."""
    device = pick_device(config.device)
    be_deterministic(device)
    config = replace(config, device=str(device), amp=pick_amp(config.amp, device))
    resume = config.resume and is_run(folder)
    if resume:
        check_same_settings(config, folder)
    benchmark = BENCHMARKS[config.benchmark](config)
    config = replace(config, tasks=len(benchmark.tasks))
    torch.manual_seed(derive_seed(config.seed[0], -1, -1, "backbone and first factors"))
    backbone = load_backbone(config.backbone, config.weights).to(device)
    model = ContinualClassifier(backbone, AMP_DTYPES[config.amp], config.normalize)
    method = make_method(model, config)
    benchmark = benchmark.at(model.input_size)
    remove(path for glob in LEFTOVERS for path in folder.glob(glob))
    if not resume:
        prepare_folder(folder, config)
    with logging_to(folder / "log.txt"):
        LOG.info("%s on %s, %d tasks, run folder %s", config.method, benchmark.name, len(benchmark.tasks), folder)
        trainer = Trainer(config, benchmark, model, method, folder)
        if resume:
            trainer.restore()
        results = trainer.run()
        write_json(folder / "results.json", results)
    print(f"\n{report.format_table(results)}\n\nrun folder: {folder}")
    if config.plots:
        report.save_plots(results, folder / "plots")
    return results


def make_method(model: ContinualClassifier, config: TrainConfig) -> Method:
    """The method on this model; ArgumentError, with the backbone's name before it, when the two do not fit."""
    try:
        return METHODS[config.method](model, config)
    except ArgumentError as error:
        raise ArgumentError(f"--backbone {config.backbone}: {error}") from error


def check_same_settings(config: TrainConfig, folder: Path) -> None:
    """Raises ArgumentError when the run in ``folder`` was begun with other settings."""
    asked, stored = config.to_json(), read_json(folder / "config.json")
    left_open = UNTOLD | {name for name in SETTLED if asked[name] in ("auto", None)}
    others = [name for name in asked.keys() & stored.keys() - left_open if stored[name] != asked[name]]
    if others:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(others))
        raise ArgumentError(f"{folder} holds a run with another {flags}; choose another folder with --output")


def choose_folder(config: TrainConfig) -> Path:
    """--output, or the first of runs/<benchmark>-<method>-<seed>, ...-2, ...-3 without a finished run in it."""
    several = len(config.seed) > 1
    if config.output is not None:
        whole = config.output / ("summary.json" if several else "results.json")
        if is_finished(config.output, several) and not (config.resume and whole.exists()):
            raise ArgumentError(f"{config.output} holds a finished run; choose another folder with --output")
        return config.output
    name = f"{config.benchmark}-{config.method}" + ("" if several else f"-{config.seed[0]}")
    folder, number = Path("runs") / name, 1
    while is_finished(folder, several):
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def is_finished(folder: Path, several: bool = False) -> bool:
    """True if ``folder`` holds a run's results or any seed's; a call over ``several`` goes on until a summary."""
    try:
        seeds = "summary.json" if several else "seed-*/results.json"
        return (folder / "results.json").exists() or any(folder.glob(seeds))
    except OSError as error:
        raise CheckpointError(f"--output {folder} cannot be read: {error}") from error


def prepare_folder(folder: Path, config: TrainConfig) -> None:
    """Makes the folder, clears what an unfinished run left in it, and saves the configuration.

    Raises ArgumentError when the folder holds files but no run of this program: nobody's files are overwritten.
    """
    make_folder(folder)
    if any(folder.iterdir()) and not is_run(folder):
        raise ArgumentError(f"{folder} holds files that are no run of this program; choose another with --output")
    remove([*(folder / name for name in RUN_FILES), *(path for glob in RUN_GLOBS for path in folder.glob(glob))])
    write_json(folder / "config.json", config.to_json())


def is_run(folder: Path) -> bool:
    """True if ``folder`` holds the configuration of a run of this program."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.keys() >= {"benchmark", "method", "seed"}


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Sends the program's log to the terminal, around the progress bar, and to ``path``."""
    try:
        file = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    terminal = logging.StreamHandler(sys.stdout)
    handlers, level = [terminal, file], LOG.level
    LOG.setLevel(logging.INFO)
    for handler in handlers:
        LOG.addHandler(handler)
    try:
        with logging_redirect_tqdm([LOG]):
            yield
    finally:
        for handler in handlers:
            LOG.removeHandler(handler)
        LOG.setLevel(level)
        file.close()


if __name__ == "__main__":
    sys.exit(main())
