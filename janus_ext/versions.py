"""Versions of what a result depends on beside its settings."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from janus_ext import processes

PACKAGES = ("janus-ext", "torch", "torchvision", "timm", "numpy", "safetensors")


def installed(package: str) -> str | None:
    """Version of a package from its metadata, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def result_versions() -> dict[str, Any]:
    """Python, the packages, and the numbers of threads and processes: what ``results.json`` keeps."""
    found = {package: installed(package) for package in PACKAGES}
    parallel = {"threads": torch.get_num_threads(), "processes": processes.count()}
    return {"python": platform.python_version(), **found, **parallel}
