"""Training steps of a ViT-B/16, batch 128, bfloat16: times, host waits, kernels, a profile.

python benchmarks/gpu/step.py DEVICE FILE    # the report
"""

import statistics
import sys
import warnings

sys.path.insert(0, "benchmarks")
import torch  # noqa: E402
from program import Stepper  # noqa: E402
from run import clock  # noqa: E402

from janus_ext.devices import deterministic  # noqa: E402

device, path = sys.argv[1:3]
cuda = device == "cuda"
model, batch, width, repeats = ("vit_base_patch16_224", 128, 768, 12) if cuda else ("vit_tiny_patch16_224", 2, 192, 2)
report = open(path, "w")


def say(text=""):
    print(text, flush=True)
    report.write(text + "\n")
    report.flush()


def stepper(**state):
    return Stepper(device, model, batch, amp="bf16", **state)


KINDS = {
    "plain lora": lambda: stepper(method="lora"),
    "janus, first task": lambda: stepper(method="janus"),
    "janus": lambda: stepper(method="janus", protected=width // 2, old_classes=345),
    "janus observing": lambda: stepper(method="janus", protected=width // 2, old_classes=345, observe=True),
}


def waits(s):
    """What made the host wait for the device in one step."""
    if not cuda:
        return ["no GPU"]
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        s.step()
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename.split('/')[-1]}:{w.lineno}" for w in found if "synchroniz" in str(w.message)]


def profile(name, s):
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    with torch.profiler.profile(activities=kinds) as prof:
        for _ in range(2):
            s.step()
        s.wait()
    on_device = [e for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [e for e in on_device if "janus" in e.name]
    total = sum(e.time_range.elapsed_us() for e in on_device) / 2e3
    say(
        f"\n{name}: {len(on_device) / 2:.0f} kernels and copies a step, {total:.2f} ms of them; "
        f"janus kernels {len(ours) / 2:.0f}, {sum(e.time_range.elapsed_us() for e in ours) / 2e3:.3f} ms"
    )
    for kernel in sorted({e.name for e in ours}):
        times = [e.time_range.elapsed_us() for e in ours if e.name == kernel]
        say(f"  {kernel[:90]:<90} {len(times) / 2:5.0f} x {statistics.median(times):8.1f} us")
    say(
        prof.key_averages().table(
            sort_by="self_device_time_total" if cuda else "self_cpu_time_total", row_limit=28, max_name_column_width=70
        )
    )


def compare(title, steppers):
    for s in steppers.values():
        for _ in range(3 if cuda else 1):
            s.step()
        s.wait()
    times = {name: [] for name in steppers}
    for _ in range(repeats):
        for name, s in steppers.items():
            times[name].append(1e3 * clock(s.step, device))
    plain = statistics.median(times["plain lora"])
    say(f"\n{title}: median of {repeats} interleaved steps")
    for name, values in times.items():
        middle = statistics.median(values)
        say(
            f"  {name:<20} {middle:9.2f} ms  {middle / plain:6.3f} of plain lora, "
            f"spread {min(values):.2f} .. {max(values):.2f}"
        )


steppers = {name: make() for name, make in KINDS.items()}
compare("as the benchmarks run them", steppers)
for name in ("plain lora", "janus", "janus observing"):
    say(f"host waits in a step of {name}: {waits(steppers[name]) or 'none'}")
if cuda:
    say(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB with all of them alive")
for name in ("plain lora", "janus", "janus observing"):
    profile(name, steppers[name])
if cuda:
    with deterministic(torch.device(device)):
        compare("as the trainer runs them, with repeatable kernels alone", steppers)
report.close()
