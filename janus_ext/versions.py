"""Versions of what a result depends on beside its settings."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

PACKAGES = ("janus-ext", "torch", "torchvision", "timm", "numpy", "safetensors")


def installed(package: str) -> str | None:
    """Version of a package from its metadata, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def result_versions() -> dict[str, Any]:
    """Python, the packages, and the number of threads: what ``results.json`` keeps."""
    found = {package: installed(package) for package in PACKAGES}
    return {"python": platform.python_version(), **found, "threads": torch.get_num_threads()}
