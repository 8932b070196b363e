"""Benchmarks of kernels and program: each case checks that both sides agree, times them in turn, prints the ratio.

python benchmarks/run.py list
python benchmarks/run.py run [names or groups] [--device cuda] [--json FILE]
python benchmarks/run.py compare a.json b.json
python benchmarks/run.py table FILE
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Idle threads of NumPy's BLAS would spin on a core for 30 ms, into the next measurement; read when NumPy is imported.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import torch
from cases import CASES, GROUPS, Case

from janus_ext import _native

LEAST_SECONDS = 2.0  # of our side of a case: the median of a few short calls is noise


def clock(function: Callable[[], Any], device: str) -> float:
    """Seconds of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
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


def measure(case: Case, device: str, repeats: int | None) -> dict[str, Any]:
    """Medians of interleaved repeats; the ratio is theirs over ours, so above 1 is faster."""
    torch.manual_seed(0)
    ours, theirs = case.build(device)
    difference = agree(ours(), theirs(), case.tolerance)
    repeats = max(repeats or case.repeats, int(LEAST_SECONDS / clock(ours, device)))
    times = [(clock(ours, device), clock(theirs, device)) for _ in range(repeats)]
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(t / o for o, t in times)
    return {
        "case": case.name,
        "against": case.against,
        "ms": 1e3 * mine,
        "against_ms": 1e3 * other,
        "ratio": ratio,
        "target": case.targets.get(device),
        "difference": difference,
        "repeats": repeats,
    }


def about(device: str) -> dict[str, Any]:
    """Where and with what this was measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--", "csrc", "janus_ext", "benchmarks/*.py")  # results are no sources
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiled": _native.available(),
        "commit": f"{commit}-dirty" if changed else commit,
    }


def git(*words: str) -> str:
    """What git says in this checkout; nothing where there is no git."""
    root = Path(__file__).parent.parent
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False).stdout.strip()


def processor() -> str:
    """The CPU's name as Linux knows it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def chosen(names: list[str]) -> list[Case]:
    """The cases of these names or groups, all of them for no name."""
    unknown = set(names) - {case.name for case in CASES} - GROUPS.keys()
    if unknown:
        raise SystemExit(
            f"no such case: {', '.join(sorted(unknown))}; `list` prints them, groups are {', '.join(GROUPS)}"
        )
    wanted = {*names, *(case.name for group in GROUPS.keys() & set(names) for case in GROUPS[group])}
    return [case for case in CASES if not names or case.name in wanted]


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write JSON where asked."""
    rows = []
    for case in chosen(arguments.names):
        rows.append(measure(case, arguments.device, arguments.repeats))
        print(
            "{case:<14} {ms:8.2f} ms  against {against_ms:8.2f} ms  ratio {ratio:5.2f}  ({against})".format(**rows[-1])
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"about": about(arguments.device), "cases": rows}, indent=1) + "\n")


def results_file(name: str) -> list[dict[str, Any]]:
    """The cases in a JSON file of `run`."""
    try:
        cases = json.loads(Path(name).read_text())["cases"]
    except (OSError, ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{name} is no result of `run --json`: {error}") from error
    if not all({"case", "ratio"} <= row.keys() for row in cases):
        raise argparse.ArgumentTypeError(f"{name} is no result of `run --json`: a row has no case or no ratio")
    return cases


def new_file(name: str) -> Path:
    """A path that can be written, known before anything is measured."""
    if not Path(name).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{Path(name).parent} is no folder")
    return Path(name)


def table(cases: list[dict[str, Any]]) -> str:
    """The README's table."""
    lines = ["| case | against | ours, ms | theirs, ms | ratio | target |", "|---|---|---|---|---|---|"]
    for row in cases:
        target = "-" if row["target"] is None else f"{row['target']:.3g}"
        lines.append(
            "| `{case}` | {against} | {ms:.2f} | {against_ms:.2f} | {ratio:.2f} | ".format(**row) + f"{target} |"
        )
    return "\n".join(lines)


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> bool:
    """Prints how the ratios differ; whether none that both have fell by more than a fifth, which noise does not do."""
    old, new = ({row["case"]: row["ratio"] for row in cases} for cases in (before, after))
    for name in old | new:
        if name in old and name in new:
            print(f"{name:<14} {old[name]:6.2f} -> {new[name]:6.2f} {new[name] / old[name] - 1:+8.1%}")
        else:
            print(f"{name:<14} only in the {'first' if name in old else 'second'} file")
    return all(new[name] >= 0.8 * old[name] for name in old.keys() & new.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="the cases")
    running = actions.add_parser("run", help="measure")
    running.add_argument("names", nargs="*", help="only these cases, or groups: kernels, program")
    running.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    running.add_argument("--repeats", type=int, help="at least, and for two seconds; by default the case's own")
    running.add_argument("--json", type=new_file)
    comparing = actions.add_parser("compare", help="ratios of two JSON files; status 1 where one fell by a fifth")
    comparing.add_argument("before", type=results_file)
    comparing.add_argument("after", type=results_file)
    actions.add_parser("table", help="a JSON file as Markdown").add_argument("json", type=results_file)
    arguments = parser.parse_args()
    if arguments.action == "list":
        for case in CASES:
            print(f"{case.name:<14} against {case.against}")
    elif arguments.action == "run":
        if arguments.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU")
        run(arguments)
    elif arguments.action == "table":
        print(table(arguments.json))
    elif not compare(arguments.before, arguments.after):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
