"""Vision transformers of timm with local weights, and the classifier that grows one linear head per task.

timm needs torchvision to import, and the torchvision of the package index is a CUDA build whose library cannot load
beside a CPU-only PyTorch ("operator torchvision::nms does not exist"). Declaring the two operators it registers fake
kernels for is enough for transforms, data sets and models (pytorch #157648, vision #9077).
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ext.checkpoint import read_tensors
from janus_ext.errors import ArgumentError, CheckpointError

EMBEDDED = Path(__file__).resolve().parent / "assets" / "backbone.safetensors"
DROP_RATES = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
_torchvision_stub: torch.library.Library | None = None


def prepare_torchvision() -> None:
    """Makes ``import torchvision`` (and timm) possible beside a CPU-only PyTorch; call it before importing either.

    Nothing is declared where torchvision's own library loads: it declares the operators itself, and twice is an abort.
    """
    global _torchvision_stub
    if torch.version.cuda is not None or _torchvision_stub is not None or _torchvision_library_loads():
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_stub = library  # the declarations live as long as this object


def _torchvision_library_loads() -> bool:
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


def load_backbone(name: str = "emoji", weights: str = "pretrained") -> nn.Module:
    """A vision transformer without classifier: "emoji" (embedded) or any timm model name.

    ``weights`` is "pretrained", "none" (random, drawn from torch's global generator) or a local file: safetensors with
    the keys "architecture" and "normalize" in its metadata for "emoji", a checkpoint that timm reads for other names.
    The result carries ``input_mean``, ``input_std`` (3 numbers each) and ``input_size`` (pixels).
    """
    if weights not in ("pretrained", "none") and not os.path.isfile(weights):
        raise CheckpointError(f"--weights {weights}: no such file (or one of: pretrained, none)")
    return _load_embedded(weights) if name == "emoji" else _load_timm(name, weights)


def _load_embedded(weights: str) -> nn.Module:
    """timm's VisionTransformer as the metadata of the weight file describes it; no dropout of any kind."""
    prepare_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    path = EMBEDDED if weights in ("pretrained", "none") else Path(weights)
    tensors, metadata = read_tensors(path)
    try:
        architecture = json.loads(metadata["architecture"])
        normalize = json.loads(metadata["normalize"])
        model = VisionTransformer(**(architecture | dict.fromkeys(DROP_RATES, 0.0) | {"num_classes": 0}))
        if weights != "none":
            model.load_state_dict({key: value.float() for key, value in tensors.items()})
        return _describe(model, normalize["mean"], normalize["std"], _first(architecture.get("img_size", 224)))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds no vision transformer of this program: {error}") from error


def _load_timm(name: str, weights: str) -> nn.Module:
    """A timm model by name; a local file goes through timm's own conversion of checkpoints."""
    prepare_torchvision()
    import timm
    from safetensors import SafetensorError

    if not timm.is_model(name):
        similar = timm.list_models(f"*{name}*")[:5]
        hint = f"; similar: {', '.join(similar)}" if similar else ""
        raise ArgumentError(f"--backbone {name}: timm {timm.__version__} has no such model{hint}")
    options: dict[str, Any] = {"pretrained": weights != "none", "num_classes": 0}
    if weights not in ("pretrained", "none"):
        options["pretrained_cfg_overlay"] = {"file": weights}
    try:
        model = timm.create_model(name, **options)
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"--backbone {name} --weights {weights} cannot be loaded: {error}") from error
    cfg = model.pretrained_cfg
    return _describe(model, cfg["mean"], cfg["std"], cfg["input_size"][-1])


def _describe(model: nn.Module, mean: Any, std: Any, size: int) -> nn.Module:
    """Attaches what images must look like: colour statistics and side length."""
    model.input_mean, model.input_std, model.input_size = tuple(mean), tuple(std), int(size)
    return model


def _first(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]


def _unfuse_attention(model: nn.Module) -> None:
    """Attention as plain products: PyTorch's fused CPU kernel takes half of a bfloat16 step at 65 tokens."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


class ContinualClassifier(nn.Module):
    """A backbone and one linear head per task; the logits of all seen classes are the heads' outputs side by side.

    The backbone runs under autocast to ``amp`` if given; features and heads are always float32.
    """

    def __init__(self, backbone: nn.Module, amp: torch.dtype | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList()
        self.amp = amp
        self.input_size: int = backbone.input_size
        device = next(backbone.parameters()).device
        if amp is not None and device.type == "cpu":
            _unfuse_attention(backbone)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(backbone, f"input_{name}"), device=device).view(3, 1, 1) * 255
            self.register_buffer(name, values, persistent=False)

    @property
    def feature_dim(self) -> int:
        """Width d of the feature."""
        return self.backbone.num_features

    def add_task(self, classes: int) -> nn.Linear:
        """Appends the head of a new task (weights normal with deviation 0.01, bias 0) and returns it."""
        head = nn.Linear(self.feature_dim, classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.heads.append(head.to(self.mean.device))
        return head

    def features(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, H, W] -> float32 [b, d]: the class token after the final norm."""
        pixels = images.float()
        if pixels.shape[-1] != self.input_size or pixels.shape[-2] != self.input_size:
            side = (self.input_size, self.input_size)
            pixels = F.interpolate(pixels, side, mode="bilinear", antialias=True, align_corners=False)
        pixels = (pixels - self.mean) / self.std
        with torch.autocast(pixels.device.type, dtype=self.amp, enabled=self.amp is not None):
            tokens = self.backbone.forward_features(pixels)
            pooled = self.backbone.forward_head(tokens, pre_logits=True)
        return pooled.float()

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, H, W] -> logits [b, classes seen so far]."""
        return self.classify(self.features(images))

    def classify(self, features: Tensor) -> Tensor:
        """Logits [b, classes seen so far] of features [b, d]."""
        return torch.cat([head(features) for head in self.heads], dim=-1)
