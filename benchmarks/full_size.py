"""The published grid, benchmark by method by seed, for whoever has a GPU and the data; and a trial for who has neither.

    python benchmarks/full_size.py list imagenet-r --data-dir DATA/imagenet-r  # the calls; nothing is run
    python benchmarks/full_size.py run imagenet-r --data-dir DATA/imagenet-r   # goes on where it was cut off
    python benchmarks/full_size.py run domainnet --data-dir DATA/DomainNet --rows Janus-LoRA InfLoRA
    python benchmarks/full_size.py table                                       # reproduced against reported
    python benchmarks/full_size.py dry --device cuda                           # time and memory of a step

What else stands behind `list`, `run` or `dry` goes to janus_ext.train as it is: --device, --amp, --weights, --split ...
imagenet-100 needs --class-list.
A row is one call of `--preset paper` with its five seeds; rows that fail are named at the end, the others go on.
"Janus-LoRA" is the paper's method, "Janus-LoRA, exact" has this project's rectification. In the table a run says what
it was called with beyond its row, if that touches the result.

The dry run needs neither data nor weights: a ViT-B/16 with random ones learns two tasks of 69 classes from made-up JPEG
files in DomainNet's layout, with batches of 128, through everything that a run does. From the seconds of its epochs it
says what a step takes, and what training the published benchmarks would.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from published import OURS, REPORTED, ROWS, TRAINED, Setting
from run import about, new_file

METRICS = ("acc", "maa", "bwt")
SEEDS = 5
CLASSES, TASKS, PER_CLASS, EPOCHS = 69, 2, 6, 3  # of the dry run; 69 as in DomainNet's tasks
PASSED_ON = "Other flags go to janus_ext.train as they are."
BENCHMARKS = list(dict.fromkeys(benchmark for benchmark, _ in REPORTED))
# What is the user's own in every call: where things lie, and how fast they go.
MACHINE = {
    *("data_dir", "split_files", "output", "resume", "save_every", "seed", "plots", "tensorboard", "check_data"),
    *("device", "workers", "cache_images", "compile", "checkpointing", "class_list"),
}
OWN = ("benchmark", "preset", "tasks", "epochs", "seed", "domains", "limit_per_class", "data_dir", "output")
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


# the grid -------------------------------------------------------------------------------------------------------------
def folder_of(output: Path, setting: Setting, row: str) -> Path:
    """Where the seeds of a row lie."""
    return (
        output
        / f"{setting[0]}-{setting[1]}"
        / row.replace(": ", " ").replace(", ", " ").replace(" + ", "+").replace(" ", "-")
    )


def call(setting: Setting, row: str, output: Path, data: Path | None, others: list[str]) -> list[str]:
    """The words of a row's call behind `python -m`."""
    benchmark, tasks = setting
    words = ["janus_ext.train", "--benchmark", benchmark, "--preset", "paper", "--tasks", str(tasks)]
    for name, value in ROWS[row].items():
        words += ["--" + name.replace("_", "-"), str(value)]
    where = [] if data is None else ["--data-dir", str(data)]
    return [*words, *where, "--output", str(folder_of(output, setting, row)), "--resume", *others]


def calls(arguments: argparse.Namespace, others: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, call) of every row that is wanted of a benchmark."""
    for setting, reported in REPORTED.items():
        if setting[0] == arguments.benchmark:
            for row in arguments.rows or [*reported, *OURS]:
                name = f"{row} ({setting[0]}, {setting[1]} tasks)"
                yield name, call(setting, row, arguments.output, arguments.data_dir, others)


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Row after row, each in a process of its own."""
    failed = []
    for name, words in calls(arguments, others):
        print(f"\n=== {name}\n{shlex.join(words)}", flush=True)
        status = ended([sys.executable, "-m", *words])
        if status in STOPPED:
            raise SystemExit(status)
        if status:
            failed.append(f"{name}: exit status {status}")
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def ended(words: Sequence[str]) -> int:
    """The exit status of a call. Ctrl-C reaches it, too: it keeps its state and ends, and is waited for."""
    process = subprocess.Popen(words)
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, before)


# the table ------------------------------------------------------------------------------------------------------------
def finished(folder: Path) -> list[Path]:
    """The results of a row's finished seeds; a call with one seed has no folder for it."""
    return sorted([*folder.glob("results.json"), *folder.glob("seed-*/results.json")])


def results_of(folder: Path) -> list[dict[str, Any]]:
    """The results of a row's finished seeds."""
    return [json.loads(path.read_text()) for path in finished(folder)]


def otherwise(folder: Path, setting: Setting, row: str) -> str:
    """What the row's finished seeds were called with that the grid does not say."""
    from janus_ext.config import command_line

    _, *words = call(setting, row, folder, None, [])
    wanted = command_line.parse(words).resolved().to_json()
    found = {}
    for path in finished(folder):
        stored = json.loads((path.parent / "config.json").read_text())
        found |= {k: stored[k] for k in wanted.keys() & stored.keys() - MACHINE if stored[k] != wanted[k]}
    return ", ".join(f"{name} {value}" for name, value in sorted(found.items()))


def shown(results: list[dict[str, Any]], metric: str) -> str:
    """Mean and standard deviation over the seeds."""
    values = [result[metric] for result in results if result[metric] is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def table(output: Path) -> str:
    """Every row that has a finished seed, beside what is reported."""
    lines = [
        "| benchmark | tasks | row | seeds | ACC | reported | MAA | reported | BWT | reported |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting, reported in REPORTED.items():
        for row in ROWS:
            folder = folder_of(output, setting, row)
            if results := results_of(folder):
                changed = otherwise(folder, setting, row)
                cells = [*map(str, setting), f"{row} ({changed})" if changed else row, f"{len(results)} of {SEEDS}"]
                for metric, value in zip(METRICS, reported.get(row, (None,) * 3), strict=True):
                    cells += [shown(results, metric), "" if value is None else f"{value:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    if len(lines) == 2:
        raise SystemExit(f"{output} holds no finished run of the grid; `run` makes them")
    return "\n".join(lines)


# the dry run ----------------------------------------------------------------------------------------------------------
def made_up(root: Path) -> None:
    """One domain in DomainNet's layout, its images links to a few JPEG files."""
    from loader import write_images

    (root / "images").mkdir()
    images = [root / "images" / name for name in write_images(root / "images")]
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for label in range(CLASSES * TASKS):
        folder = root / "real" / f"thing_{label:03d}"
        folder.mkdir(parents=True)
        for n in range(PER_CLASS + 1):
            path = folder / f"real_{label + 1:03d}_{n + 1:06d}.jpg"
            os.link(images[(label * 7 + n) % len(images)], path)
            lines["train" if n < PER_CLASS else "test"].append(f"{path.relative_to(root)} {label}\n")
    for part, listed in lines.items():
        (root / f"real_{part}.txt").write_text("".join(listed))


def dry(arguments: argparse.Namespace, others: list[str]) -> dict[str, Any]:
    """Trains, and says what the last task's epochs took: the first warms up, the last one observes."""
    import torch
    from memory import peak_mb, reset_peak

    from janus_ext.config import command_line
    from janus_ext.errors import ArgumentError
    from janus_ext.train import train

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made_up(root)
        words = f"--benchmark domainnet --domains real --preset paper --tasks {TASKS} --epochs {EPOCHS} --seed 0"
        words += f" --weights none --no-plots --device {arguments.device}"
        words = [*words.split(), "--data-dir", name, "--output", str(root / "run")]
        config = command_line.parse([*words, *others])
        own = command_line.parse(words)
        for field in OWN:
            if getattr(config, field) != getattr(own, field):
                raise ArgumentError(f"--{field.replace('_', '-')} is the dry run's own and cannot be chosen")
        reset_peak()
        results = train(config)[0]
        epochs = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
        settings = json.loads((root / "run" / "config.json").read_text())
    last = [line["seconds"] for line in epochs if line["task"] == TASKS - 1]
    images = CLASSES * PER_CLASS
    on_gpu = settings["device"].startswith("cuda")
    return {
        "about": about("cuda" if on_gpu else "cpu"),
        "method": settings["method"],
        "backbone": settings["backbone"],
        "batch_size": settings["batch_size"],
        "amp": settings["amp"],
        "images": images,
        "step_seconds": last[-2] / images * settings["batch_size"],
        "observing_step_seconds": last[-1] / images * settings["batch_size"],
        "task_seconds": results["seconds"][-1],
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_mb(),
    }


def hours(measured: dict[str, Any], benchmark: str) -> float:
    """Of one run's training steps at the speed that was measured."""
    images, epochs = TRAINED[benchmark]
    seconds = (epochs - 1) * measured["step_seconds"] + measured["observing_step_seconds"]
    return images / measured["batch_size"] * seconds / 3600


def dry_table(measured: dict[str, Any]) -> str:
    """The documents' table of a dry run."""
    batch = f"batch {measured['batch_size']}, amp {measured['amp']}"
    rows = {
        "what was trained": f"{measured['method']} on {measured['backbone']}, {batch}",
        "a step": f"{measured['step_seconds']:.3g} s",
        "a step of the last epoch, in which `janus` observes": f"{measured['observing_step_seconds']:.3g} s",
        f"a task: {measured['images']} images, {EPOCHS} epochs, all around them": f"{measured['task_seconds']:.3g} s",
        "peak of memory": f"{measured['peak_mb'] / 1000:.1f} GB",
    }
    rows |= {f"the steps of one run of {name}, at that speed": f"{hours(measured, name):.3g} h" for name in TRAINED}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def dry_figures(name: str) -> dict[str, Any]:
    """What `dry --json` wrote into the file."""
    try:
        figures = json.loads(Path(name).read_text())
        dry_table(figures)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{name} is no result of `dry --json`: {error}") from error
    return figures


def dry_or_line(arguments: argparse.Namespace, others: list[str]) -> dict[str, Any]:
    """`dry`; what the user can mend ends it with a line and status 2."""
    from janus_ext.errors import JanusError

    try:
        return dry(arguments, others)
    except JanusError as error:
        print(f"full_size.py dry: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def parsed() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (("list", "print the calls of a benchmark"), ("run", "run them, or go on")):
        grid = commands.add_parser(name, allow_abbrev=False, help=help_text, description=PASSED_ON)
        grid.add_argument("benchmark", choices=BENCHMARKS)
        grid.add_argument("--data-dir", type=Path, required=True, help="where its images lie, see docs/benchmarks.md")
        grid.add_argument("--rows", nargs="+", choices=list(ROWS), help="those that are wanted; all reported ones")
        grid.add_argument("--output", type=Path, default=Path("runs/full-size"))
    shown = commands.add_parser("table", help="reproduced against reported")
    shown.add_argument("--output", type=Path, default=Path("runs/full-size"))
    trial = commands.add_parser("dry", allow_abbrev=False, help="time and memory of a step", description=PASSED_ON)
    trial.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    trial.add_argument("--json", type=new_file, help="where the figures go")
    trial.add_argument("--table", type=dry_figures, help="only print the figures of such a file as Markdown")
    arguments, others = parser.parse_known_args()
    if others and (arguments.command == "table" or getattr(arguments, "table", None)):
        parser.error(f"unrecognized arguments: {shlex.join(others)}")
    return arguments, others


def main() -> None:
    arguments, others = parsed()
    if arguments.command == "list":
        print("\n".join(shlex.join(words) for _, words in calls(arguments, others)))
    elif arguments.command == "run":
        run(arguments, others)
    elif arguments.command == "table":
        print(table(arguments.output))
    elif arguments.table is not None:
        print(dry_table(arguments.table))
    else:
        measured = dry_or_line(arguments, others)
        print(dry_table(measured))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
