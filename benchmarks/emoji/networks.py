"""The networks of the pretraining: the convolutional teacher, the transformer, and what each is trained with."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ext.backbone import prepare_torchvision

prepare_torchvision()
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

WIDTH = 256  # of the teacher's feature
ARCHITECTURE = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
    "num_classes": 0,
    "class_token": True,
    "qkv_bias": True,
}
SCALE, SMOOTHING = 20.0, 0.05  # of the margin softmax
MAPS = {7: 128, 8: 256}  # teacher's blocks (index in its body) whose maps are imitated, and their channels


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut; the shortcut averages before a stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*convolution(inputs, outputs, stride), nn.ReLU(), *convolution(outputs, outputs, 1))
        shortcut = (nn.AvgPool2d(stride), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        return F.relu(self.body(x) + self.shortcut(x))


def convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """3 x 3 convolution and its normalisation."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)


class Teacher(nn.Module):
    """Residual network for 64 x 64 images with a feature of WIDTH numbers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        plan = [(1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1), (4, 8, 2)]
        blocks = [ResidualBlock(width * i, width * o, stride) for i, o, stride in plan]
        self.body = nn.Sequential(*convolution(3, width, 2), nn.ReLU(), *blocks)
        self.head = nn.Linear(8 * width, WIDTH, bias=False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, 64, 64] -> float32 [B, WIDTH]."""
        pooled = self.body(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return self.norm(self.head(pooled).float())

    def describe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 3, 64, 64] -> feature float32 [B, WIDTH] and standardised 2 x 2 maps float32 [B, 4 * channels]."""
        x, maps = x.contiguous(memory_format=torch.channels_last), []
        for index, block in enumerate(self.body):
            x = block(x)
            if index in MAPS:
                quarters = F.adaptive_avg_pool2d(x, 2).flatten(1).float()
                maps.append(F.normalize(F.batch_norm(quarters, None, None, training=True), dim=1))
        return self.norm(self.head(x.mean((2, 3))).float()), torch.cat(maps, 1)


class MarginSoftmax(nn.Module):
    """Softmax over cosines with an additive margin on the true class (CosFace)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.05 * torch.randn(classes, WIDTH))

    def forward(self, feature: Tensor, labels: Tensor, margin: float) -> Tensor:
        """Mean loss of features [B, WIDTH] with labels int64 [B]."""
        cosine = F.linear(F.normalize(feature, dim=1), F.normalize(self.weight, dim=1))
        cosine = cosine - margin * F.one_hot(labels, len(self.weight))
        return F.cross_entropy(SCALE * cosine, labels, label_smoothing=SMOOTHING)


class Student(nn.Module):
    """The backbone with the linear map from its CLS feature to the teacher's feature."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = VisionTransformer(**ARCHITECTURE, patch_drop_rate=0.5)
        side = ARCHITECTURE["img_size"] // ARCHITECTURE["patch_size"]
        self.backbone.pos_embed.data[:, 1:] = 0.1 * sine_positions(side, ARCHITECTURE["embed_dim"])
        self.head = nn.Linear(ARCHITECTURE["embed_dim"], WIDTH, bias=False)
        nn.init.normal_(self.head.weight, std=0.05)

    def keep_patches(self, share: float) -> None:
        """Set the share of the patches that training steps look at."""
        self.backbone.patch_drop.prob = 1 - share

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 3, 64, 64] -> CLS feature float32 [B, D] and its image under the map [B, WIDTH]."""
        with torch.autocast("cpu", torch.bfloat16):
            feature = self.backbone.forward_features(x)[:, 0]
        return feature.float(), self.head(feature.float())


class Refinement(nn.Module):
    """What the refinement adds to the student: a map from its feature to the teacher's maps, and the class centres."""

    def __init__(self, margin: MarginSoftmax) -> None:
        super().__init__()
        self.maps = nn.Linear(ARCHITECTURE["embed_dim"], 4 * sum(MAPS.values()), bias=False)
        nn.init.normal_(self.maps.weight, std=0.05)
        self.margin = copy.deepcopy(margin)

    def forward(self, feature: Tensor, target: Tensor) -> Tensor:
        """Sum of one minus the cosine to each of the target maps, mean over the batch: [B, D], [B, M] -> scalar."""
        sizes = [4 * channels for channels in MAPS.values()]
        pairs = zip(self.maps(feature).split(sizes, 1), target.split(sizes, 1), strict=True)
        return sum(1 - F.cosine_similarity(own, other, dim=1).mean() for own, other in pairs)


def sine_positions(side: int, width: int) -> Tensor:
    """Two-dimensional sine and cosine positions float32 [side * side, width]."""
    rates = 100 ** -(torch.arange(width // 4) / (width // 4))
    down, across = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.cat([across.reshape(-1, 1) * rates, down.reshape(-1, 1) * rates], 1)
    return torch.cat([angles.sin(), angles.cos()], 1)
