"""torchvision beside a CPU-only PyTorch.

timm needs torchvision to import, and transformers takes it where it is installed. The torchvision of the package index
is a CUDA build whose library cannot load beside a CPU-only PyTorch: importing any of the three ends with "operator
torchvision::nms does not exist" (transformers shows it as "Could not import module 'ViTModel'"). Declaring the two
operators that torchvision registers fake kernels for is enough for transforms, data sets and models (pytorch #157648,
vision #9077); the operators themselves (`torchvision.ops.nms`, `torchvision.io`) stay without a kernel.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: torch.library.Library | None = None


def prepare_torchvision() -> None:
    """Lets torchvision, timm and transformers be imported beside a CPU-only PyTorch; call it before importing them.

    Nothing is declared where the operators are known or torchvision's own library loads: twice would be an abort.
    ``import janus_ext.torchvision_shim`` is the same as one line.
    """
    global _declared
    missing = [name for name in ("nms", "qnms") if not hasattr(torch.ops.torchvision, name)]
    if not missing or torch.version.cuda is not None or _library_loads():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(name + SCHEMA)
    _declared = library  # the declarations live as long as this object


def _library_loads() -> bool:
    """Whether torchvision's compiled library can be loaded into this process; afterwards it is."""
    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec is not None else None
    libraries = [path for folder in folders or () for path in sorted(Path(folder).glob("_C*.so"))]
    try:
        for path in libraries:
            torch.ops.load_library(path)
    except OSError:  # a CUDA build beside a CPU torch: what it links is not there
        return False
    return bool(libraries)
