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

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from drawings import MEAN, STD, Drawings, augment
from networks import ARCHITECTURE, MarginSoftmax, Refinement, Student, Teacher
from safetensors.torch import save_file
from torch import Tensor, nn

from janus_ext.backbone import EMBEDDED

LOG = Path(__file__).with_suffix(".log")
SEED = 2026
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
MARGIN = 0.2  # of the softmax, in the end
HALF_TOKENS_UNTIL = 0.7  # share of the refinement's steps on a random half of the patches, like all of the imitation
MARGIN_SHARE = 0.05  # weight of the margin softmax in the refinement
WEIGHT_DECAY = 0.05
MUON_RATE = 2e-3


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
