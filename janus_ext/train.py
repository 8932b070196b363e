"""``janus_ext.train``: trains on a benchmark and writes a run folder. ``--help`` lists every flag."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm.contrib.logging import logging_redirect_tqdm

from janus_ext import events, report
from janus_ext.backbone import load_backbone
from janus_ext.checkpoint import make_folder, write_json
from janus_ext.classifier import ContinualClassifier
from janus_ext.config import TrainConfig
from janus_ext.data import BENCHMARKS
from janus_ext.errors import ArgumentError, CheckpointError, JanusError
from janus_ext.info import PACKAGES
from janus_ext.methods import METHODS
from janus_ext.trainer import AMP_DTYPES, Trainer, be_deterministic, derive_seed, pick_amp, pick_device

LOG = logging.getLogger("janus_ext")
RUN_FILES = ("metrics.jsonl", "results.json", "config.json", "log.txt")
UNTOLD = {"output", "plots", "tensorboard", "workers", "cache_images"}  # settings that a result does not depend on
SETTLED = {"device", "amp", "tasks"}  # settings that a run makes definite
RUN_GLOBS = ("checkpoints/*", "plots/*.png", "tensorboard/events.out.*")


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
        return [run_seed(config, folder)]
    runs = [one_of_several(replace(config, seed=(seed,)), folder / f"seed-{seed}") for seed in config.seed]
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


def run_seed(config: TrainConfig, folder: Path) -> report.Results:
    """Trains with the one seed of ``config``; writes and prints the results."""
    device = pick_device(config.device)
    be_deterministic(device)
    config = replace(config, device=str(device), amp=pick_amp(config.amp, device))
    benchmark = BENCHMARKS[config.benchmark](config)
    config = replace(config, tasks=len(benchmark.tasks))
    torch.manual_seed(derive_seed(config.seed[0], -1, -1, "backbone and first factors"))
    backbone = load_backbone(config.backbone, config.weights).to(device)
    model = ContinualClassifier(backbone, AMP_DTYPES[config.amp], config.normalize)
    method = METHODS[config.method](model, config)
    benchmark = benchmark.at(model.input_size)
    prepare_folder(folder, config)
    with logging_to(folder / "log.txt"):
        LOG.info("%s on %s, %d tasks, run folder %s", config.method, benchmark.name, len(benchmark.tasks), folder)
        results = Trainer(config, benchmark, model, method, folder).run() | {"versions": versions()}
        write_json(folder / "results.json", results)
    print(f"\n{report.format_table(results)}\n\nrun folder: {folder}")
    if config.plots:
        report.save_plots(results, folder / "plots")
    return results


def one_of_several(config: TrainConfig, folder: Path) -> report.Results:
    """The results of one seed: those in its folder, if it had finished before the call was cut off, or a run's.

    Raises ArgumentError when they were made with other settings.
    """
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return run_seed(config, folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds a finished run that cannot be read: {error}") from error
    asked = config.to_json()
    left_open = UNTOLD | {name for name in SETTLED if asked[name] in ("auto", None)}
    others = [name for name in asked.keys() & stored.keys() - left_open if stored[name] != asked[name]]
    if others:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(others))
        raise ArgumentError(f"{folder} holds a finished run with another {flags}; choose another folder with --output")
    print(f"{folder} has finished before: its results are taken")
    return results


def choose_folder(config: TrainConfig) -> Path:
    """--output, or the first of runs/<benchmark>-<method>-<seed>, ...-2, ...-3 without a finished run in it."""
    several = len(config.seed) > 1
    if config.output is not None:
        if is_finished(config.output, several):
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
    for path in [*(folder / name for name in RUN_FILES), *(path for glob in RUN_GLOBS for path in folder.glob(glob))]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be replaced: {error}") from error
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


def versions() -> dict[str, Any]:
    """Versions that a result depends on; null for a package that is not installed."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"threads": torch.get_num_threads()}


if __name__ == "__main__":
    sys.exit(main())
