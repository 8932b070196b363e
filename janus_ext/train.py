"""``janus_ext.train``: trains on a benchmark and writes a run folder. ``--help`` lists every flag.

``torchrun --nproc-per-node N -m janus_ext.train ...`` trains with N processes: docs/processes.md.
"""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from janus_ext import processes
from janus_ext.assembly import make_learner
from janus_ext.backbone.loading import weight_file
from janus_ext.config import TrainConfig, command_line, flag
from janus_ext.data import load_benchmark
from janus_ext.data.benchmark import Benchmark
from janus_ext.data.workers import naming_lost_workers
from janus_ext.devices import deterministic, pick_amp, pick_device
from janus_ext.errors import ArgumentError, CheckpointError
from janus_ext.reports import plots, table
from janus_ext.reports.found import fault
from janus_ext.runs.checkpoint import write_json
from janus_ext.runs.choice import choose_folder
from janus_ext.runs.folder import check_same_seeds
from janus_ext.runs.metrics import measured_on
from janus_ext.runs.run import Run
from janus_ext.runs.settings import check_same_settings, settings_of
from janus_ext.runs.shared import run_at
from janus_ext.terminal import command, first_alone_heard, logging_to
from janus_ext.training import events, opening
from janus_ext.training.keeping import outliving_warnings
from janus_ext.training.trainer import Trainer

LOG = logging.getLogger("janus_ext")


@command("janus_ext.train", "interrupted; the same call with --resume goes on with the run")
def main(argv: Sequence[str] | None = None) -> int:
    """Parses ``argv`` and trains; 0 on success, 2 with one line on stderr for what the user can mend, 130 on Ctrl-C."""
    with processes.joined(), first_alone_heard():
        train(command_line.parse(argv))
    return 0


def train(config: TrainConfig) -> list[table.Results]:
    """One run per seed; returns the results of each, in the order of the seeds."""
    config = config.resolved()
    processes.require_same({flag(name): value for name, value in config.to_json().items()})
    if config.tensorboard:
        events.require_tensorboard()
    if config.check_data:
        if processes.is_first():
            check_data(config)
        return []
    device = own_device(config.device)
    with deterministic(device), outliving_warnings():
        return train_seeds(replace(config, device=str(device), amp=pick_amp(config.amp, device)))


def own_device(name: str) -> torch.device:
    """`pick_device`; of several processes of a machine each takes a GPU of its own, or the only one that it sees.

    Raises:
        ArgumentError: two processes have one GPU, or one has none.
    """
    device, (number, others) = processes.together(lambda: pick_device(name)), processes.on_this_machine()
    if processes.count() == 1:
        return device
    if device.type == "cuda" and others > 1:
        if device.index is not None:
            raise ArgumentError(f"--device {name} is one GPU for {others} processes: leave it out, each takes its own")
        device = torch.device("cuda", number % torch.cuda.device_count())
        torch.cuda.set_device(device)
    require_own(torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else None)
    return device


def require_own(gpu: object) -> None:
    """ArgumentError, in all processes, unless each has another ``gpu``, or all None: nccl says it late, or never."""
    taken = processes.gathered(None if gpu is None else (platform.node(), str(gpu)))
    gpus = [one for one in taken if one is not None]
    if 0 < len(gpus) < len(taken):
        raise ArgumentError(
            f"--device: {len(gpus)} of {len(taken)} processes have a GPU; all need one, or take --device cpu"
        )
    if len(set(gpus)) < len(gpus):
        raise ArgumentError(
            f"--device: each process needs a GPU of its own, and {len(gpus)} have {len(set(gpus))} between them: begin "
            "fewer, say CUDA_VISIBLE_DEVICES, or take --device cpu"
        )


def train_seeds(config: TrainConfig) -> list[table.Results]:
    """The runs of a resolved configuration, and their summary where they are several."""
    first, *others = (replace(config, seed=(seed,)) for seed in config.seed)
    benchmark = loaded(first)
    tasks = len(benchmark.tasks)  # without --tasks the benchmark says them, and runs of others are other runs
    folder = processes.from_first(lambda: choose_folder(replace(config, tasks=tasks)))
    if not others:
        return [run_seed(first, benchmark, folder)]
    processes.from_first(lambda: check_same_seeds(folder, config.seed))
    runs = [run_seed(first, benchmark, folder / f"seed-{first.seed[0]}")]
    runs += [run_seed(other, loaded(other), folder / f"seed-{other.seed[0]}") for other in others]
    if processes.is_first():
        write_json(folder / "summary.json", table.summarize_runs(runs))
    print(table.format_summary(runs))
    return runs


def check_data(config: TrainConfig) -> None:
    """Loads the benchmark, which decodes every image and prints what is wrong with it; DataError if it is unusable."""
    benchmark = load_benchmark(config)
    print(
        f"{benchmark.name}: {len(benchmark.train):,} training and {len(benchmark.test):,} "
        f"{measured_on(benchmark.validation)}, {len(benchmark.class_names)} classes in {len(benchmark.tasks)} tasks, "
        f"split {benchmark.split_sha256}"
    )


def loaded(config: TrainConfig) -> Benchmark:
    """What one seed learns."""
    return processes.in_turn(lambda: load_benchmark(config))


def run_seed(config: TrainConfig, benchmark: Benchmark, folder: Path) -> table.Results:
    """Trains with the one seed of ``config``, or takes what ``folder`` has of it; writes and prints the results."""
    config = replace(config, tasks=len(benchmark.tasks))
    settings = settings_of(config, benchmark, weight_file(config.backbone, config.weights))
    processes.require_same(settings, but="device")
    run = run_at(folder)
    finished = run.is_finished
    going_on = finished or (config.resume and run.is_begun)
    if going_on:
        check_same_settings(settings, run.settings(), folder)
    results = take_results(run, benchmark) if finished else fill(run, config, benchmark, settings, going_on)
    print(f"\n{table.format_table(results)}\n\nrun folder: {folder}")
    if config.plots:
        run.results()  # an error where the folder is gone: drawing would make a new one
        if processes.is_first():
            plots.save_plots(results, folder / "plots")
    return results


def take_results(run: Run, benchmark: Benchmark) -> table.Results:
    """The results of a run that has finished; CheckpointError when they are damaged, or of other images."""
    results = run.results()
    if results.get("split_sha256") != benchmark.split_sha256:
        raise CheckpointError(f"{run.folder}/results.json holds no results of these images in this order of classes")
    missing = [key for key in table.NEEDED if key not in results]
    if reason := fault(results) or (f"it lacks {', '.join(missing)}" if missing else None):
        raise CheckpointError(f"{run.folder}/results.json: {reason}")
    print(f"{run.folder} has finished before: its results are taken")
    return results


def fill(
    run: Run, config: TrainConfig, benchmark: Benchmark, settings: dict[str, object], going_on: bool
) -> table.Results:
    """Trains what is left of a run, from its beginning unless it is ``going_on``; returns its results."""
    learner = processes.in_turn(lambda: make_learner(config, config.seed[0], len(benchmark.tasks)))
    trainer = Trainer(config, benchmark.at(learner.model.input_size), learner, run)
    view = {"view_margin": benchmark.test.margin, "view_crop_mode": benchmark.test.crop_mode}
    about = settings | {"network": learner.model.backbone.description} | view
    logging_here = logging_to(run.folder / "log.txt") if processes.is_first() else nullcontext()
    with run.opened(about, begin=not going_on), logging_here, naming_lost_workers():
        LOG.info("%s on %s, %d tasks, run folder %s", config.method, benchmark.name, len(benchmark.tasks), run.folder)
        for line in opening.lines(trainer):
            LOG.info("%s", line)
        if going_on:
            trainer.restore()
        results = trainer.run()
        run.finish(results)
    return results


if __name__ == "__main__":
    sys.exit(main())
