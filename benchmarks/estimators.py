"""When is the Gram matrix the better estimator, and when the incremental SVD? Time and peak memory of both by width.

python benchmarks/estimators.py [--json FILE]
python benchmarks/estimators.py --table FILE

Each measurement is a process of its own (Linux: the peak is VmHWM, reset before the call): an observation of 2,048
rows, then the commit to an energy of 0.9. Rows are Gaussian with a spectrum that falls by a factor of 1,000.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import peak_mb, reset_peak
from run import about, new_file, write

from janus_ext import OnlineEstimator

WIDTHS = (384, 768, 2048, 4096, 8192)
ROWS, RANK = 2048, 256


def cost(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and MB above the present size that one call takes."""
    reset_peak()
    before, started = peak_mb(), time.perf_counter()
    function()
    return time.perf_counter() - started, peak_mb() - before


def measure(kind: str, width: int) -> dict[str, Any]:
    """One estimator at one width, in this process."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, width) * torch.logspace(0, -3, width)
    warm_up = OnlineEstimator(64, kind)  # libraries load and threads start here
    warm_up.observe(torch.randn(128, 64))
    warm_up.commit(0.9)
    reset_peak()
    empty = peak_mb()
    estimator = OnlineEstimator(width, kind, RANK if kind == "isvd" else None)
    estimator.observe(x[:RANK])
    seconds, _ = cost(lambda: estimator.observe(x))
    row = {"estimator": kind, "width": width, "observe_ms": 1e3 * seconds, "observe_mb": peak_mb() - empty}
    seconds, extra = cost(lambda: estimator.commit(0.9))
    row |= {"commit_ms": 1e3 * seconds, "commit_mb": extra, "basis_rank": estimator.basis.shape[1]}
    return row


def table(path: Path) -> str:
    """The documents' table of a JSON file."""
    lines = ["| width | estimator | observe, ms | peak, MB | commit, ms | peak, MB |", "|---|---|---|---|---|---|"]
    for row in json.loads(path.read_text())["cases"]:
        cells = "| {width} | {estimator} | {observe_ms:.1f} | {observe_mb:.1f} | {commit_ms:.0f} | {commit_mb:.0f} |"
        lines.append(cells.format(**row))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=new_file)
    parser.add_argument("--one", nargs=2, metavar=("ESTIMATOR", "WIDTH"), help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help="print a JSON file as Markdown")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    result: dict[str, Any] = {"about": about("cpu"), "cases": []}
    for width in WIDTHS:
        for kind in ("gram", "isvd"):
            command = [sys.executable, __file__, "--one", kind, str(width)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result["cases"].append(json.loads(printed))
            print(result["cases"][-1], flush=True)
            if arguments.json is not None:
                write(arguments.json, result)


if __name__ == "__main__":
    main()
