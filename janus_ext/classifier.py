"""The model that all methods train: a backbone, and a linear head that comes with every task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ext.errors import ArgumentError
from janus_ext.reference import full_float32

MOST_IMAGES = 200  # of a pass without gradients; a ViT-B/16 takes as many at 224 pixels
NUMBERS = MOST_IMAGES * 14**2 * 768  # of a block's output in such a pass
FEW_PATCHES = 256  # up to here the attention of a head of 64 takes no more memory than the block's MLP


class ContinualClassifier(nn.Module):
    """A backbone and one linear head per task; the logits of all seen classes are the heads' outputs side by side.

    The backbone runs under autocast to ``amp`` if given; features and heads are always float32. Colours are
    normalized as the backbone was pretrained (``normalize`` "model"), or stay in [0, 1] ("identity").
    ``images_at_once`` is how many a pass without gradients should take: 200, or as many as need no more memory than 200
    do in a ViT-B/16 at 224 pixels.
    """

    def __init__(self, backbone: nn.Module, amp: torch.dtype | None = None, normalize: str = "model") -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList()
        self.amp = amp
        self.input_size: int = backbone.input_size
        device = next(backbone.parameters()).device
        patches = _patches(backbone)
        width = getattr(backbone, "embed_dim", None)
        width = width if isinstance(width, int) else backbone.num_features
        self.images_at_once = max(1, min(MOST_IMAGES, NUMBERS // (patches * width)))
        if amp is not None and device.type == "cpu" and patches <= FEW_PATCHES:
            unfuse_attention(backbone)
        if normalize not in ("model", "identity"):
            raise ArgumentError(f"normalize must be 'model' or 'identity', got {normalize!r}")
        colours = (backbone.input_mean, backbone.input_std) if normalize == "model" else ((0.0,) * 3, (1.0,) * 3)
        for name, values in zip(("mean", "std"), colours, strict=True):
            pixels = torch.tensor(values, device=device).view(3, 1, 1) * 255
            self.register_buffer(name, pixels, persistent=False)

    @property
    def feature_dim(self) -> int:
        """Width d of the feature."""
        return self.backbone.num_features

    def add_task(self, classes: int, head_init: str = "small") -> nn.Linear:
        """Appends the head of a new task and returns it.

        ``head_init``: "default" starts as nn.Linear does (weights and bias uniform within 1 / sqrt(d)), "small" with
        normal weights of deviation 0.01 and bias 0.
        """
        if head_init not in ("default", "small"):
            raise ArgumentError(f"head_init must be 'default' or 'small', got {head_init!r}")
        head = nn.Linear(self.feature_dim, classes)
        if head_init == "small":
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        self.heads.append(head.to(self.mean.device))
        return head

    def features(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, H, W] -> float32 [b, d]: the class token after the final norm, or what the backbone pools."""
        pixels = images.float()
        if pixels.shape[-1] != self.input_size or pixels.shape[-2] != self.input_size:
            side = (self.input_size, self.input_size)
            pixels = F.interpolate(pixels, side, mode="bilinear", antialias=True, align_corners=False)
        pixels = (pixels - self.mean) / self.std
        with torch.autocast(pixels.device.type, dtype=self.amp, enabled=self.amp is not None):
            pooled = self.embed(pixels)
        return pooled.float()

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within it the backbone computes in IEEE float32, whatever `amp` and PyTorch's settings of products say."""
        amp, self.amp = self.amp, None
        try:
            with full_float32():
                yield
        finally:
            self.amp = amp

    def embed(self, pixels: Tensor) -> Tensor:
        """The backbone's pass from normalised pixels [b, 3, s, s] to [b, d]."""
        return self.backbone.forward_head(self.backbone.forward_features(pixels), pre_logits=True)

    def compile_backbone(self) -> None:
        """From now on training steps run the backbone as a compiled graph, for every batch size; no name changes.

        Passes without gradients run it as it is: they are few, a graph of their own takes half a minute to make, and
        PyTorch 2.11 makes a wrong one for bfloat16 on a GPU (docs/performance.md).
        """
        plain, graph = self.embed, torch.compile(self.embed, fullgraph=True)

        def embed(pixels: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return plain(pixels)
            torch._dynamo.maybe_mark_dynamic(pixels, 0)
            return graph(pixels)

        self.embed = embed

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, H, W] -> logits [b, classes seen so far]."""
        return self.classify(self.features(images))

    def classify(self, features: Tensor) -> Tensor:
        """Logits [b, classes seen so far] of features [b, d]; in float32 under the caller's autocast, too."""
        with torch.autocast(features.device.type, enabled=False):
            return torch.cat([head(features) for head in self.heads], dim=-1)


def _patches(backbone: nn.Module) -> int:
    """Patches of an image where the backbone begins; where it does not tell, of 16 x 16 pixels."""
    found = getattr(getattr(backbone, "patch_embed", None), "num_patches", None)
    return found or max(1, backbone.input_size // 16) ** 2


def unfuse_attention(model: nn.Module) -> None:
    """Attention as plain products: PyTorch's fused CPU kernel takes half of a bfloat16 step at 65 tokens.

    Not for many tokens: their products hold tokens^2 numbers per head and image, 9 GB in a pass at 518 pixels.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
