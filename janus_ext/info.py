"""``janus_ext.info``: what is installed, what was built, and which kernel serves each op. Paste it into an issue.

Exit status 1 if JANUS_EXT_REQUIRE_NATIVE=1 and the compiled ops are missing; the report is printed all the same.
"""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from janus_ext import _native, ops
from janus_ext.terminal import escaping, until_closed
from janus_ext.versions import PACKAGES, installed

ABOUT = "Prints what is installed, what was built, and which kernel serves each op. Paste it into an issue."
KEYS = ("CPU", "CUDA")


def versions() -> list[tuple[str, str, str]]:
    """Rows (what, built with, found)."""
    built = _native.build_info()
    rows = {
        "Python": (built.get("python", ""), platform.python_version()),
        "CUDA of torch": (built.get("torch_cuda", ""), torch.version.cuda or ""),
        **{name: ("", installed(name) or "not installed") for name in PACKAGES},
        "janus-ext": (built.get("version", ""), installed("janus-ext") or "not installed"),
        "torch": (built.get("torch", ""), torch.__version__),
        "C++ compiler": (built.get("compiler", ""), ""),
        "nvcc": (built.get("nvcc", ""), ""),
        "CUDA architectures": (built.get("cuda_architectures", ""), ""),
    }
    return [(what, with_ or "-", found or "-") for what, (with_, found) in rows.items()]


def has_kernel(op: str, key: str) -> bool:
    """Whether the dispatcher holds a kernel of its own for the op under this key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"janus_ext::{op}", key)


def kernels(op: str) -> tuple[str, str, str, str]:
    """What serves the op on CPU and CUDA, "compiled" or "reference"; whether it has a fake kernel and a gradient."""
    devices = ["compiled" if has_kernel(op, key) else "reference" for key in KEYS]
    return (*devices, *("yes" if has_kernel(op, key) else "-" for key in ("Meta", "Autograd")))


def devices() -> list[str]:
    """One line for each GPU: name, compute capability, memory."""
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.append(f"{card.name}, capability {card.major}.{card.minor}, {card.total_memory / 2**30:.0f} GiB")
    return found


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)


def report() -> str:
    """The whole report as text."""
    parts = [
        table(("version of", "built with", "found"), versions()),
        table(("op", "CPU", "CUDA", "fake", "autograd"), [(op, *kernels(op)) for op in ops.OPS]),
        f"compiled CPU ops: {_native.reason() or f'loaded from {_native.folder()}'}",
        f"compiled CUDA ops: {_native.cuda_reason() or 'loaded'}",
        "GPU: " + ("; ".join(devices()) or "none"),
    ]
    return "\n\n".join(parts[:2]) + "\n\n" + "\n".join(parts[2:])


@escaping()
@until_closed
def main() -> None:
    """Prints the report; the console script."""
    argparse.ArgumentParser(prog="janus_ext.info", description=ABOUT).parse_args()
    print(report())
    if _native.required() and not _native.available():
        sys.exit(1)


if __name__ == "__main__":
    main()
