"""Where a training step's time goes on a CPU: ViT-B/16, 224 pixels, batch 16, half of each layer's inputs protected.

python benchmarks/shares.py run FILE      # JSON; minutes, on a machine that does nothing else
python benchmarks/shares.py table FILE    # as Markdown

Times of whole steps are medians of interleaved ones, without a profiler. Shares are of the operators' own time in
profiled steps that observe.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from program import Stepper
from run import about, clock, new_file, write
from torch.autograd.profiler_util import FunctionEvent

MODEL, BATCH, WIDTH, CLASSES = "vit_base_patch16_224", 16, 768, 345
PRECISIONS = ("off", "bf16")
AGED = {"protected": WIDTH // 2, "old_classes": CLASSES}
KINDS: dict[str, dict[str, Any]] = {
    "plain LoRA": {"method": "lora"},
    "Janus-LoRA": {"method": "janus"} | AGED,
    "Janus-LoRA, observing": {"method": "janus", "observe": True} | AGED,
}
REPEATS, PROFILED = 7, 3
FROZEN = "frozen q, k, v projection"
LORA = "LoRA's own products"
# An operator counts for the first of these that is in its name, or in that of one around it.
PARTS = (
    (re.compile("janus_ext::observe"), "observe: Gram matrices"),
    (re.compile("janus_ext::rectify"), "rectify"),
    (re.compile("janus_ext.*margin_loss"), "margin loss"),
    (re.compile("janus_ext.*lora"), LORA),
    (
        re.compile("scaled_dot_product|ScaledDotProduct|aten::bmm|BmmBackward|aten::_softmax|SoftmaxBackward"),
        "attention",
    ),
    (re.compile("aten::linear|AddmmBackward|MmBackward|aten::conv2d"), "frozen MLP and output projections, heads"),
    (re.compile("gelu|Gelu|layer_norm|LayerNorm|aten::add$|AddBackward"), "GELU, layer norms, residual sums"),
    (re.compile("Optimizer"), "optimizer"),
)
REST = "casts, copies, everything else"


def part(event: FunctionEvent, frozen: tuple[int, int]) -> str:
    """What an operator's own time counts for; in LoRA's op, products with the ``frozen`` [out, in] are not LoRA's."""
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    for pattern, name in PARTS:
        place = next((i for i, link in enumerate(chain) if pattern.search(link.name)), None)
        if place is not None:
            shapes = {tuple(shape) for link in chain[:place] for shape in link.input_shapes}
            return FROZEN if name == LORA and shapes & {frozen, frozen[::-1]} else name
    return REST


def profile(stepper: Stepper) -> dict[str, float]:
    """Milliseconds a step by part."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(PROFILED):
            stepper.step()
    times: Counter[str] = Counter()
    for event in profiler.events():
        times[part(event, (3 * WIDTH, WIDTH))] += event.self_cpu_time_total / 1e3 / PROFILED
    return dict(times.most_common())


def medians(steppers: dict[str, Stepper]) -> dict[str, float]:
    """Milliseconds of a step of each kind, in turn."""
    times: dict[str, list[float]] = {kind: [] for kind in steppers}
    for stepper in steppers.values():
        stepper.step()
        stepper.step()
    for _ in range(REPEATS):
        for kind, stepper in steppers.items():
            times[kind].append(1e3 * clock(stepper.step, "cpu"))
    return {kind: statistics.median(values) for kind, values in times.items()}


def measure(amp: str) -> dict[str, Any]:
    """Whole steps, eager and compiled, and the parts of an eager one."""
    eager = {kind: Stepper("cpu", MODEL, BATCH, amp=amp, **state) for kind, state in KINDS.items()}
    found: dict[str, Any] = {"amp": amp, "step_ms": medians(eager)}
    found["parts_ms"] = profile(eager["Janus-LoRA, observing"])
    del eager
    compiled = {kind: Stepper("cpu", MODEL, BATCH, amp=amp, compile=True, **state) for kind, state in KINDS.items()}
    return found | {"compiled_ms": medians(compiled)}


def table(path: Path) -> str:
    """The documents' tables of a JSON file."""
    stored = {row["amp"]: row for row in json.loads(path.read_text())["precisions"]}
    names = {"off": "float32", "bf16": "bfloat16"}
    head = " | ".join(f"{name}, ms | of plain LoRA | compiled, ms | of plain LoRA" for name in names.values())
    lines = [f"| a step | {head} |", "|---" * (1 + 4 * len(names)) + "|"]
    for kind in KINDS:
        cells = []
        for amp in names:
            for times in (stored[amp]["step_ms"], stored[amp]["compiled_ms"]):
                cells += [f"{times[kind]:.0f}", f"{times[kind] / times['plain LoRA']:.3f}"]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += ["", f"| share of an observing step, % | {' | '.join(names.values())} |", "|---" * (1 + len(names)) + "|"]
    shares = {amp: _shares(stored[amp]["parts_ms"]) for amp in names}
    for name in sorted(shares["off"], key=lambda name: -shares["off"][name]):
        lines.append(f"| {name} | {' | '.join(f'{shares[amp].get(name, 0):.1f}' for amp in names)} |")
    return "\n".join(lines)


def _shares(parts: dict[str, float]) -> dict[str, float]:
    whole = sum(parts.values())
    return {name: 100 * time / whole for name, time in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("file", type=new_file)
    commands.add_parser("table").add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table(arguments.file))
        return
    result: dict[str, Any] = {"about": about("cpu"), "model": MODEL, "batch": BATCH, "precisions": []}
    for amp in PRECISIONS:
        result["precisions"].append(measure(amp))
        print(json.dumps(result["precisions"][-1], indent=2), flush=True)
        write(arguments.file, result)


if __name__ == "__main__":
    main()
