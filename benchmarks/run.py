"""Benchmarks of kernels and program: each case checks that both sides agree, times them in turn, prints the ratio.

python benchmarks/run.py list
python benchmarks/run.py run [names or groups] [--device cuda] [--json FILE]
python benchmarks/run.py compare a.json b.json
python benchmarks/run.py table FILE
python benchmarks/run.py columns FILE [FILE ...]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

# Idle threads of NumPy's BLAS would spin on a core for 30 ms, into the next measurement; read when NumPy is imported.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import torch
from cases import CASES, GROUPS, Case, InPlace, Side
from provenance import commit

from janus_ext import _native
from janus_ext.devices import device_name
from janus_ext.terminal import until_closed

LEAST_SECONDS = 2.0  # of our side of a case: the median of a few short calls is noise
MOST_SECONDS = 30.0  # of both sides together: one of them may be a hundred times slower
LINE = "{case:<14} {ms:8.2f} ms  against {against_ms:8.2f} ms  ratio {ratio:5.2f}  ({against})"
FEWEST = 3  # pairs, however long they take


def call(side: Side) -> Any:
    """Its result, from inputs that no earlier call has overwritten."""
    if not isinstance(side, InPlace):
        return side()
    side.refill()
    return side.run()


def clock(side: Side, device: str) -> float:
    """Seconds of one call, the device's work included, refilling what it overwrites left out."""
    run = side
    if isinstance(side, InPlace):
        side.refill()
        run = side.run
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def agree(ours: Any, theirs: Any, tolerance: float) -> float:
    """Largest relative difference, 0 where there is nothing to compare; raises where it exceeds the tolerance."""
    if ours is None:
        return 0.0
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, list) else [(ours, theirs)]
    worst = max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)
    if not worst <= tolerance:
        raise ValueError(f"the two sides differ by {worst:.1e}, more than {tolerance:.0e}")
    return worst


def pairs(least: int, ours: float, theirs: float) -> int:
    """How many pairs to measure: at least so many, and LEAST_SECONDS of ours, in MOST_SECONDS of both if they allow."""
    wanted = max(least, int(LEAST_SECONDS / ours))
    return min(wanted, max(int(MOST_SECONDS / (ours + theirs)), FEWEST))


def measure(case: Case, device: str, repeats: int | None) -> dict[str, Any]:
    """Medians of interleaved repeats; the ratio is theirs over ours, so above 1 is faster."""
    torch.manual_seed(0)
    ours, theirs = case.build(device)
    difference = agree(call(ours), call(theirs), case.tolerance)
    seconds = clock(ours, device), clock(theirs, device)
    repeats = max(repeats or FEWEST, pairs(case.repeats, *seconds))
    times = [(clock(ours, device), clock(theirs, device)) for _ in range(repeats)]
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(t / o for o, t in times)
    return {
        "case": case.name,
        "against": case.against,
        "ms": 1e3 * mine,
        "against_ms": 1e3 * other,
        "ratio": ratio,
        "target": target(case, device),
        "difference": difference,
        "repeats": repeats,
    }


def target(case: Case, device: str) -> float | None:
    """What the ratio is to reach here; a case may ask less of a CPU without AVX-512."""
    narrow = device == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
    return case.targets.get("narrow cpu" if narrow else device, case.targets.get(device))


def about(device: str) -> dict[str, Any]:
    """Where and with what this was measured."""
    return {
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiled": _native.available(),
        "commit": commit("--", ":/csrc", ":/janus_ext", ":/benchmarks/*.py"),  # results are no sources
    }


def chosen(names: list[str]) -> list[Case]:
    """The cases of these names or groups, all of them for no name."""
    unknown = set(names) - {case.name for case in CASES} - GROUPS.keys()
    if unknown:
        raise SystemExit(
            f"no such case: {', '.join(sorted(unknown))}; `list` prints them, groups are {', '.join(GROUPS)}"
        )
    wanted = {*names, *(case.name for group in GROUPS.keys() & set(names) for case in GROUPS[group])}
    return [case for case in CASES if not names or case.name in wanted]


def run(arguments: argparse.Namespace) -> bool:
    """Measures and prints each case, and writes what there is so far as JSON; whether none failed."""
    result = {"about": about(arguments.device), "cases": [], "failed": {}}
    for case in chosen(arguments.names):
        try:
            row = measure(case, arguments.device, arguments.repeats)
        except Exception as error:  # the others' figures are not to be lost
            reason = f"{type(error).__name__}: {error}"
            result["failed"][case.name] = reason
            print(f"{case.name:<14} failed: {reason}", file=sys.stderr, flush=True)
        else:
            result["cases"].append(row)
            print(LINE.format(**row), flush=True)
        if arguments.json is not None:
            write(arguments.json, result)
    if result["failed"]:
        print(f"{len(result['failed'])} failed: {', '.join(result['failed'])}", file=sys.stderr)
    return not result["failed"]


def write(path: Path, result: dict[str, Any]) -> None:
    """Replaces the file as a whole: it holds what was measured wherever this process ends."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def results_file(name: str) -> list[dict[str, Any]]:
    """The cases in a JSON file of `run`."""
    try:
        cases = json.loads(Path(name).read_text())["cases"]
    except (OSError, ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{name} is no result of `run --json`: {error}") from error
    if not all({"case", "ratio"} <= row.keys() for row in cases):
        raise argparse.ArgumentTypeError(f"{name} is no result of `run --json`: a row has no case or no ratio")
    return cases


def stored_file(name: str) -> Path:
    """The path of a JSON file of `run`."""
    results_file(name)
    return Path(name)


def new_file(name: str) -> Path:
    """A path that can be written, known before anything is measured."""
    path = Path(name)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no folder")
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is no file")
    return path


def positive(text: str) -> int:
    """A number of repeats."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def table(cases: list[dict[str, Any]]) -> str:
    """The documents' table."""
    lines = ["| case | against | ours, ms | theirs, ms | ratio | target |", "|---|---|---|---|---|---|"]
    for row in cases:
        target = "-" if row["target"] is None else f"{row['target']:.3g}"
        lines.append(
            "| `{case}` | {against} | {ms:.2f} | {against_ms:.2f} | {ratio:.2f} | ".format(**row) + f"{target} |"
        )
    return "\n".join(lines)


def columns(names: list[Path]) -> str:
    """The ratios of several files side by side, a column for each processor, number of threads and instructions.

    One that misses its target there says so, and one that has another target than the first file's.
    """
    files = [json.loads(name.read_text()) for name in names]
    rows = [{row["case"]: row for row in file["cases"]} for file in files]
    heads = []
    for about in (file["about"] for file in files):
        threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
        heads.append(", ".join(filter(None, [about["device"], threads, about.get("instructions")])))
    lines = ["| case | " + " | ".join(heads) + " | target |", "|" + "---|" * (len(files) + 2)]
    for row in files[0]["cases"]:
        cells = [beside_target(of[row["case"]], row["target"]) if row["case"] in of else "-" for of in rows]
        aim = "-" if row["target"] is None else f"{row['target']:.3g}"
        lines.append(f"| `{row['case']}` | {' | '.join(cells)} | {aim} |")
    return "\n".join(lines)


def beside_target(row: dict[str, Any], common: float | None) -> str:
    """The ratio of a case, with its own target where that is missed or is not the ``common`` one."""
    own = row["target"]
    worth_saying = own is not None and (own != common or row["ratio"] < own)
    return f"{row['ratio']:.2f}" + (f" (wanted {own:.3g})" if worth_saying else "")


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> bool:
    """Prints how the ratios differ; whether none that both have fell by more than a fifth, which noise does not do."""
    old, new = ({row["case"]: row["ratio"] for row in cases} for cases in (before, after))
    for name in old | new:
        if name in old and name in new:
            print(f"{name:<14} {old[name]:6.2f} -> {new[name]:6.2f} {new[name] / old[name] - 1:+8.1%}")
        else:
            print(f"{name:<14} only in the {'first' if name in old else 'second'} file")
    return all(new[name] >= 0.8 * old[name] for name in old.keys() & new.keys())


@until_closed
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="the cases")
    running = actions.add_parser("run", help="measure")
    running.add_argument("names", nargs="*", help="only these cases, or groups: kernels, program")
    running.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    running.add_argument("--repeats", type=positive, help="pairs, at least; by default for two seconds of ours")
    running.add_argument("--json", type=new_file)
    comparing = actions.add_parser("compare", help="ratios of two JSON files; status 1 where one fell by a fifth")
    comparing.add_argument("before", type=results_file)
    comparing.add_argument("after", type=results_file)
    actions.add_parser("table", help="a JSON file as Markdown").add_argument("json", type=results_file)
    beside = actions.add_parser("columns", help="the ratios of several JSON files as Markdown, side by side")
    beside.add_argument("files", nargs="+", type=stored_file)
    arguments = parser.parse_args()
    if arguments.action == "list":
        for case in CASES:
            print(f"{case.name:<14} against {case.against}")
    elif arguments.action == "run":
        if arguments.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU")
        if not run(arguments):
            raise SystemExit(1)
    elif arguments.action == "table":
        print(table(arguments.json))
    elif arguments.action == "columns":
        print(columns(arguments.files))
    elif not compare(arguments.before, arguments.after):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
