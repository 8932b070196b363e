"""The command line of a script that measures case by case, on the study's data sets, and keeps what is finished.

A case is what tells it from others, its data set among it ({"data": "emoji", "seed": 100}); what was measured, and on
which processor, is added to it. The JSON file is written behind every case, and a run goes on with it; what is there
and no longer wanted goes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run import about, new_file, write

from janus_ext.terminal import until_closed

Case = dict[str, Any]
Measure = Callable[[Case, Path | None], Case]  # a function of a module: processes of their own call it


def stored(path: Path) -> list[Case]:
    """Those that a file holds."""
    cases: list[Case] = json.loads(path.read_text())["cases"]
    return cases


def finished(wanted: list[Case], found: list[Case]) -> dict[int, Case]:
    """Of the wanted cases those that are found, with all that they say, by their place."""
    fitting = {place: [x for x in found if case.items() <= x.items()] for place, case in enumerate(wanted)}
    return {place: cases[0] for place, cases in fitting.items() if cases}


@until_closed
def command(description: str, wanted: list[Case], measure: Measure, table: Callable[[Path], str]) -> None:
    """`run` measures what is missing of the wanted cases, each on one thread; `table` prints a file as Markdown."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure what is missing")
    run.add_argument("--glyphs", type=Path, required=True, help="folder of the images")
    run.add_argument("--fashion-mnist", type=Path, required=True, help="folder of the files")
    run.add_argument("--jobs", type=int, default=2, help="cases at a time, each on one thread")
    run.add_argument("--json", type=new_file, required=True, help="where what was measured is kept, and goes on")
    commands.add_parser("table", help="print a JSON file as Markdown").add_argument("file", type=Path)
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.file))
        return
    folders = {"emoji": None, "fashion-mnist": options.fashion_mnist}  # all others are made of the glyphs
    done = finished(wanted, stored(options.json)) if options.json.exists() else {}
    missing = [(place, case) for place, case in enumerate(wanted) if place not in done]
    tasks = [(measure, place, case, folders.get(case["data"], options.glyphs)) for place, case in missing]
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for place, case in pool.imap_unordered(_measured, tasks):
            done[place] = case
            write(options.json, {"cases": [done[at] for at in sorted(done)]})
            print({name: value for name, value in case.items() if name != "about"}, flush=True)


def _measured(task: tuple[Measure, int, Case, Path | None]) -> tuple[int, Case]:
    measure, place, case, folder = task
    torch.set_num_threads(1)
    return place, case | measure(case, folder) | {"about": about("cpu")}
