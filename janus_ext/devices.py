"""Where a run computes, in which precision, and with which kernels."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from janus_ext.errors import ArgumentError

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is the first GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"--device {name}: no such device; cpu, cuda, cuda:1, ... or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"--device {name}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"--device {name}: only cpu and cuda devices are supported")
    return device


def pick_amp(name: str, device: torch.device) -> str:
    """A key of AMP_DTYPES; "auto" is bf16 where hardware multiplies it (half the time on a CPU with AMX), else off."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "off"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "off"


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor as Linux knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines() if known.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def be_deterministic(device: torch.device) -> None:
    """Chooses repeatable kernels; a GPU needs a fixed cuBLAS workspace for it, set before its first product."""
    torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
