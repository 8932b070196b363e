"""Kernel benchmarks: each case checks that both sides agree, times them interleaved, and prints the ratio.

python benchmarks/run.py list
python benchmarks/run.py run [names] [--device cuda] [--json FILE]
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case

from janus_ext import _native


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
    """Largest relative difference; raises where it exceeds the tolerance."""
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, list) else [(ours, theirs)]
    worst = max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)
    if not worst <= tolerance:
        raise ValueError(f"the two sides differ by {worst:.1e}, more than {tolerance:.0e}")
    return worst


def measure(case: Case, device: str, repeats: int) -> dict[str, Any]:
    """Medians of interleaved repeats; the ratio is theirs over ours, so above 1 is faster."""
    torch.manual_seed(0)
    ours, theirs = case.build(device)
    difference = agree(ours(), theirs(), case.tolerance)
    times = [(clock(ours, device), clock(theirs, device)) for _ in range(repeats)]
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(t / o for o, t in times)
    return {
        "case": case.name,
        "against": case.against,
        "ms": 1e3 * mine,
        "against_ms": 1e3 * other,
        "ratio": ratio,
        "difference": difference,
    }


def about(device: str) -> dict[str, Any]:
    """Where and with what this was measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiled": _native.available(),
        "commit": commit.stdout.strip(),
    }


def processor() -> str:
    """The CPU's name as Linux knows it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["list", "run"])
    parser.add_argument("names", nargs="*", help="only these cases")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {case.name for case in CASES}
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; `list` prints them")
    rows = []
    for case in CASES:
        if arguments.names and case.name not in arguments.names:
            continue
        if arguments.action == "list":
            print(f"{case.name:<12} against {case.against}")
            continue
        rows.append(measure(case, arguments.device, arguments.repeats))
        print(
            "{case:<12} {ms:8.2f} ms  against {against_ms:8.2f} ms  ratio {ratio:.2f}  ({against})".format(**rows[-1])
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"about": about(arguments.device), "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
