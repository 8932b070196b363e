"""Where a run computes, in which precision, and with which kernels."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from janus_ext.errors import ArgumentError

LOG = logging.getLogger("janus_ext")
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is the first GPU if there is one, else the CPU."""
    if isinstance(name, str) and name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(f"--device {name}: no such device; cpu, cuda, cuda:1, ... or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise ArgumentError(
            f"--device {name}: no such device; cpu, cuda, cuda:1, ... or auto, "
            f"and PyTorch {torch.__version__} sees {seen} GPUs"
        )
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"--device {name}: only cpu and cuda devices are supported")
    return device


def pick_amp(name: str, device: torch.device) -> str:
    """A key of AMP_DTYPES; "auto" is bf16 where hardware multiplies it (half the time on a CPU with AMX), else off.

    fp16 on a CPU without such hardware is a warning: its products are many times slower than float32's.
    """
    if device.type == "cuda":
        best = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "off"
    else:
        best = "bf16" if _processor_multiplies("bf16") else "off"
    known = platform.machine() in ("x86_64", "AMD64")  # of others PyTorch does not tell
    if name == "fp16" and device.type == "cpu" and known and not _processor_multiplies("fp16"):
        LOG.warning(
            "--amp fp16: this processor has no float16 arithmetic, a step takes many times as long as with --amp %s",
            best,
        )
    return best if name == "auto" else name


def _processor_multiplies(dtype: str) -> bool:
    """Whether it has instructions for products of matrices in ``dtype``."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(f"{unit}_{dtype}") for unit in ("amx", "avx512"))


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor as Linux knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines() if known.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def available_cores() -> int:
    """Cores this process may use: a container's or a batch system's share, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def be_deterministic(device: torch.device) -> None:
    """From now on PyTorch takes repeatable kernels; a GPU needs a fixed cuBLAS workspace, set before its first product.

    An operator without one then raises. That is wanted: with ``warn_only`` the backward of fused attention stays as it
    is, although it has a repeatable kernel. New tensors are not filled with NaN, which PyTorch does beside it to show
    reads of memory that nobody wrote: hundreds of fills a step.
    """
    torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


@contextmanager
def at_work(device: torch.device) -> Iterator[None]:
    """`deterministic` within it, and the caller's random numbers go on behind it as if nothing had been drawn.

    PyTorch's generators and switches are the process's: not for two threads at once.
    """
    cards = [device] if device.type == "cuda" else []
    with deterministic(device), torch.random.fork_rng(devices=cards):
        yield


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """`be_deterministic` within it, in float32, without the caller's autocast, `no_grad` and `inference_mode`.

    What he had is his again behind it.
    """
    dtype = torch.get_default_dtype()
    mode = torch.get_deterministic_debug_mode()
    fill, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    be_deterministic(device)
    try:
        torch.set_default_dtype(torch.float32)
        with torch.autocast(device.type, enabled=False), torch.inference_mode(False):  # which turns gradients on
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = fill, benchmark
