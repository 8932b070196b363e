"""Pretrain the embedded backbone on the emoji concepts outside the benchmark.

    python benchmarks/emoji/build_images.py --packages CACHE --pretraining CACHE/pretraining.npz
    python benchmarks/emoji/pretrain.py --images CACHE/pretraining.npz --work CACHE

Three stages. A small convolutional network learns the concepts with a margin softmax, all styles of a concept being
one class; convolutions learn such a set within minutes, a Vision Transformer does not. The transformer then learns to
give the network's feature of the same augmented image, from a random half of its patches. Last it learns the network's
coarse maps, which keep the layout of a drawing, and the concepts themselves, in the end from all patches. Every step
draws from a generator seeded by its number, so a run that was interrupted goes on from its checkpoint in WORK as if
nothing had happened. Each process works with one thread on its share of the batch and the gradients are averaged: on
cores shared with other work this is several times faster than threads, which wait for one another at every operation.
Writes ``janus_ext/assets/backbone.safetensors`` and ``benchmarks/emoji/pretrain.log``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from janus_ext.backbone import EMBEDDED, prepare_torchvision

prepare_torchvision()
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

LOG = Path(__file__).with_suffix(".log")
SEED = 2026
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
MEAN, STD = 0.75, 0.35  # of all channels: the images are mostly white
STATE_EVERY = 50
PROCESSES = 2


@dataclass(frozen=True)
class Stage:
    """Length, batch and learning rate of one stage.

    ``average`` is the decay of the weight average, ``decay`` the share of the steps in which the rate falls to zero,
    ``stream`` the number of the stage's random stream.
    """

    steps: int
    concepts: int
    rate: float
    warm_up: int
    average: float
    decay: float
    stream: int
    drawings: int = 4

    def factor(self, step: int) -> float:
        """Learning-rate factor: linear warm-up, plateau, cosine to zero."""
        fallen = max(0.0, 1 - (1 - step / self.steps) / self.decay) if self.decay else 0.0
        return min(1.0, (step + 1) / self.warm_up) * 0.5 * (1 + math.cos(math.pi * fallen))


TEACHER = Stage(steps=900, concepts=48, rate=2e-3, warm_up=100, average=0.995, decay=1.0, stream=900)
IMITATION = Stage(steps=2000, concepts=32, rate=1e-3, warm_up=200, average=0.998, decay=0.0, stream=1)
REFINEMENT = Stage(steps=2200, concepts=32, rate=1e-3, warm_up=100, average=0.998, decay=0.4, stream=2)
SCALE, MARGIN, SMOOTHING = 20.0, 0.2, 0.05
HALF_TOKENS_UNTIL = 0.7  # share of the refinement's steps on a random half of the patches, like all of the imitation
MARGIN_SHARE = 0.05  # weight of the margin softmax in the refinement
MAPS = {7: 128, 8: 256}  # teacher's blocks (index in its body) whose maps are imitated, and their channels
WEIGHT_DECAY = 0.05
MUON_RATE = 2e-3


class Drawings:
    """The pretraining images and how batches are drawn from them.

    A batch has ``concepts`` concepts, each with ``drawings`` images of different styles where the concept has so many;
    of the skin-tone variants within one style one is drawn.
    """

    def __init__(self, path: Path) -> None:
        data = np.load(path)
        self.images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2).contiguous()
        self.count = len(data["codes"])
        cells: list[dict[int, list[int]]] = [{} for _ in range(self.count)]
        labels = zip(data["concept"].tolist(), data["style"].tolist(), strict=True)
        for row, (concept, style) in enumerate(labels):
            cells[concept].setdefault(style, []).append(row)
        self._cells = [list(styles.values()) for styles in cells]
        groups = [str(data["groups"][group]) for group in data["group"]]
        self._weight = torch.tensor([self._share(g, len(c)) for g, c in zip(groups, self._cells, strict=True)])

    @staticmethod
    def _share(group: str, styles: int) -> float:
        """Weight of a concept in sampling: flags and extra art count less, and so do concepts in few styles."""
        return (0.35 if group.startswith(("Flags", "extras")) else 1.0) * math.sqrt(styles / 8)

    def batch(self, concepts: int, drawings: int) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, 3, 64, 64] and concept labels int64 [B], B = concepts * drawings."""
        labels = torch.multinomial(self._weight, concepts)
        rows = [row for concept in labels.tolist() for row in self._draw(self._cells[concept], drawings)]
        return self.images[rows], labels.repeat_interleave(drawings)

    @staticmethod
    def _draw(styles: list[list[int]], count: int) -> list[int]:
        order = torch.randperm(len(styles)).tolist()
        variants = [styles[order[i % len(styles)]] for i in range(count)]
        return [rows[int(torch.randint(len(rows), ()))] for rows in variants]


def uniform(count: int, low: float, high: float) -> Tensor:
    """Random float32 [count] in [low, high)."""
    return torch.rand(count) * (high - low) + low


def pick(count: int, probability: float) -> Tensor:
    """Random mask bool [count]."""
    return torch.rand(count) < probability


def warp(x: Tensor) -> Tensor:
    """Random rotation, scale, aspect, shear, shift and mirror of x [B, 3, H, W] in [0, 1], white outside."""
    n = len(x)
    angle, scale, aspect = uniform(n, -0.35, 0.35), uniform(n, -0.3, 0.3).exp(), uniform(n, -0.2, 0.2).exp()
    cos, sin, mirror = angle.cos() * scale, angle.sin() * scale, 1 - 2 * pick(n, 0.25).float()
    top = torch.stack([mirror * cos * aspect, uniform(n, -0.2, 0.2) - sin, uniform(n, -0.2, 0.2)], 1)
    bottom = torch.stack([mirror * sin, cos / aspect, uniform(n, -0.2, 0.2)], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(x.shape), align_corners=False)
    return 1 - F.grid_sample(1 - x, grid, align_corners=False)


def line_art(x: Tensor) -> Tensor:
    """x [B, 3, H, W] as dark outlines on white (Sobel magnitude of the grey image)."""
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None])
    return (1 - 3 * gradient.norm(dim=1, keepdim=True)).clamp(0, 1).expand_as(x)


def mix_colours(x: Tensor) -> Tensor:
    """Random linear map of the channels of x [B, 3, H, W]: jitter, exchanged channels, part or all of the colour gone.

    Rows of the map sum to one, so that white stays white.
    """
    n = len(x)
    matrix = torch.eye(3) + 0.2 * torch.randn(n, 3, 3) * pick(n, 0.8)[:, None, None]
    permuted = matrix.gather(1, torch.rand(n, 3).argsort(1)[:, :, None].expand(-1, -1, 3))
    matrix = torch.where(pick(n, 0.3)[:, None, None], permuted, matrix)
    matrix = matrix / matrix.sum(2, keepdim=True).clamp_min(0.3)
    grey = (torch.rand(n) * pick(n, 0.25))[:, None, None]
    matrix = (1 - grey) * matrix + grey * torch.tensor([0.30, 0.59, 0.11])
    return torch.einsum("bij,bjhw->bihw", matrix, x)


def change_sharpness(x: Tensor) -> Tensor:
    """x [B, 3, H, W] blurred or sharpened by a random amount."""
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    weight = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight, groups=3)
    return torch.lerp(x, blurred, uniform(len(x), -1.0, 1.5)[:, None, None, None])


def erase(x: Tensor) -> Tensor:
    """A random rectangle of x [B, 3, H, W] filled with a random colour, in two images of five."""
    n, side = len(x), x.shape[-1]
    at = torch.arange(side) / side
    across, down = ((at - torch.rand(n, 1)).abs() < uniform(n, 0.08, 0.23)[:, None] for _ in range(2))
    mask = down[:, None, :, None] & across[:, None, None, :] & pick(n, 0.4)[:, None, None, None]
    return torch.where(mask, torch.rand(n, 3, 1, 1), x)


def normalise(x: Tensor) -> Tensor:
    """x in [0, 1] as the networks see it."""
    return (x - MEAN) / STD


def augment(images: Tensor) -> Tensor:
    """Images uint8 [B, 3, 64, 64] as normalised float32 of the same shape, changed per image in form and colour."""
    x = warp(images.float() / 255)
    n = len(x)
    outlined = pick(n, 0.1)
    x[outlined] = line_art(x[outlined])
    x = mix_colours(x).clamp(0, 1).add(1e-4).pow(uniform(n, -0.5, 0.5).exp()[:, None, None, None])
    x = torch.where(pick(n, 0.06)[:, None, None, None], 1 - x, x)
    soft = pick(n, 0.3)
    x[soft] = change_sharpness(x[soft])
    return normalise(erase(x))


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


def log(message: str) -> None:
    """Print a line and add it to the log (first process only)."""
    if dist.get_rank() != 0:
        return
    print(message, flush=True)
    with LOG.open("a", encoding="utf-8") as file:
        file.write(message + "\n")


def make_optimizers(module: nn.Module, extra: nn.Module, rate: float) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of transformer blocks, AdamW for all else.

    Weight decay falls on matrices and kernels, not on embeddings, norms, biases, heads and ``extra``.
    """
    matrices, decayed, plain = [], [], list(extra.parameters())
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and ".blocks." in name:
            matrices.append(parameter)
        elif parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token")) or name.startswith("head"):
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizers = {"optimizer": torch.optim.AdamW(groups, rate, betas=(0.9, 0.98))}
    if matrices:
        optimizers["muon"] = torch.optim.Muon(
            matrices, MUON_RATE, weight_decay=WEIGHT_DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
    for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """Moving average of weights and buffers, faster at the start."""
    share = 1 - min(decay, (step + 1) / (step + 21))
    for old, new in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
        old.lerp_(new, share) if old.is_floating_point() else old.copy_(new)


def average_gradients(module: nn.Module, extra: nn.Module) -> None:
    """Make every process hold the mean gradient of all."""
    gradients = [p.grad for part in (module, extra) for p in part.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    means = flat.div_(PROCESSES).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


class Trainer:
    """One stage of the training: ``loss(module, images, labels, step)`` minimised over the stage's steps."""

    def __init__(self, name: str, stage: Stage, module: nn.Module, extra: nn.Module, folder: Path) -> None:
        self.name, self.stage, self.module, self.extra = name, stage, module, extra
        self.average = copy.deepcopy(module).eval()
        self.optimizers = make_optimizers(module, extra, stage.rate)
        self.path = folder / f"{name}.pt"
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            self._restore(torch.load(self.path))

    def _state(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {"module": self.module, "extra": self.extra, "average": self.average, **self.optimizers}

    def _restore(self, saved: dict) -> None:
        for key, part in self._state().items():
            part.load_state_dict(saved[key])
        self.step, self.seconds = saved["step"], saved["seconds"]

    def save(self) -> None:
        """Write the checkpoint in one move, so that an interruption never leaves half a file (first process only)."""
        if dist.get_rank() != 0:
            return
        parts = {key: part.state_dict() for key, part in self._state().items()}
        torch.save({**parts, "step": self.step, "seconds": self.seconds}, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def run(self, drawings: Drawings, loss: Callable[[Tensor, Tensor, int], Tensor]) -> nn.Module:
        """Train from where the checkpoint stands to the end of the stage; return the averaged module."""
        started, total = time.perf_counter() - self.seconds, 0.0
        while self.step < self.stage.steps:
            total += self._advance(drawings, loss)
            if self.step % STATE_EVERY == 0 or self.step == self.stage.steps:
                self.seconds = time.perf_counter() - started
                self.save()
                mean = total / ((self.step - 1) % STATE_EVERY + 1)
                log(f"{self.name} step {self.step}/{self.stage.steps} loss {mean:.4f} {self.seconds:.0f} s")
                total = 0.0
        for value in self.average.state_dict().values():
            dist.broadcast(value, 0)
        return self.average

    def _advance(self, drawings: Drawings, loss: Callable[[Tensor, Tensor, int], Tensor]) -> float:
        torch.manual_seed(SEED + PROCESSES * (1_000_003 * self.stage.stream + self.step) + dist.get_rank())
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.stage.factor(self.step)
        images, labels = drawings.batch(self.stage.concepts // PROCESSES, self.stage.drawings)
        value = loss(augment(images), labels, self.step)
        self.module.zero_grad()
        self.extra.zero_grad()
        value.backward()
        average_gradients(self.module, self.extra)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        update_average(self.average, self.module, self.stage.average, self.step)
        self.step += 1
        return value.item()


def train_teacher(drawings: Drawings, folder: Path) -> tuple[nn.Module, nn.Module]:
    """The convolutional network, trained to tell the concepts apart, and its class centres."""
    torch.manual_seed(SEED)
    trainer = Trainer("teacher", TEACHER, Teacher(), MarginSoftmax(drawings.count), folder)

    def loss(x: Tensor, labels: Tensor, step: int) -> Tensor:
        margin = MARGIN * min(1.0, step / (0.3 * TEACHER.steps))
        with torch.autocast("cpu", torch.bfloat16):
            feature = trainer.module(x)
        return trainer.extra(feature, labels, margin)

    return trainer.run(drawings, loss), trainer.extra


def imitate(drawings: Drawings, teacher: nn.Module, folder: Path) -> nn.Module:
    """The transformer, trained to point where the teacher points."""
    torch.manual_seed(SEED + 1)
    trainer = Trainer("imitation", IMITATION, Student(), nn.Identity(), folder)

    def loss(x: Tensor, labels: Tensor, step: int) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            target = teacher(x)
        return 1 - F.cosine_similarity(trainer.module(x)[1], target, dim=1).mean()

    return trainer.run(drawings, loss)


def refine(drawings: Drawings, teacher: nn.Module, centres: nn.Module, student: nn.Module, folder: Path) -> nn.Module:
    """The transformer, trained on the teacher's coarse maps and on the concepts as well; all patches at the end."""
    torch.manual_seed(SEED + 2)
    trainer = Trainer("refinement", REFINEMENT, student.train(), Refinement(centres), folder)

    def loss(x: Tensor, labels: Tensor, step: int) -> Tensor:
        trainer.module.keep_patches(0.5 if step < HALF_TOKENS_UNTIL * REFINEMENT.steps else 1.0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            target, maps = teacher.describe(x)
        feature, mapped = trainer.module(x)
        imitation = 1 - F.cosine_similarity(mapped, target, dim=1).mean() + trainer.extra(feature, maps)
        return imitation + MARGIN_SHARE * trainer.extra.margin(mapped, labels, MARGIN)

    return trainer.run(drawings, loss)


def export(student: nn.Module, path: Path) -> None:
    """Backbone weights as float16 safetensors with what is needed to build and feed the model."""
    weights = {name: value.half().contiguous() for name, value in student.backbone.state_dict().items()}
    normalize = {"mean": [MEAN] * 3, "std": [STD] * 3}
    metadata = {"architecture": json.dumps(ARCHITECTURE), "normalize": json.dumps(normalize), "license": "Apache-2.0"}
    save_file(weights, path, metadata)
    path.chmod(0o644)  # the writer leaves it unreadable for others
    count = sum(value.numel() for value in weights.values())
    log(f"{path.name}: {count} parameters, {path.stat().st_size / 1e6:.2f} MB")


def work(rank: int, options: argparse.Namespace) -> None:
    """All stages in the process ``rank`` of PROCESSES."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    store = dist.FileStore(str(options.work / "rendezvous"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    drawings = Drawings(options.images)
    log(f"torch {torch.__version__}, {len(drawings.images)} images of {drawings.count} concepts")
    log(f"teacher {TEACHER}\nimitation {IMITATION}\nrefinement {REFINEMENT}")
    teacher, centres = train_teacher(drawings, options.work)
    student = refine(drawings, teacher, centres, imitate(drawings, teacher, options.work), options.work)
    if rank == 0:
        export(student, options.output)
    dist.destroy_process_group()


def main() -> None:
    """Train all stages, or go on with them, and write the backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="FILE.npz", help="from build_images.py")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the checkpoints")
    parser.add_argument("--output", type=Path, default=EMBEDDED, metavar="FILE")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "rendezvous").unlink(missing_ok=True)
    mp.spawn(work, (options,), PROCESSES)


if __name__ == "__main__":
    main()
