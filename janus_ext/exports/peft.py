"""PEFT: an adapter folder for every task, over the pretrained backbone that the run began with.

The factors of the slices K and V of a fused qkv [3 m, n] are exactly one LoRA on it: A = [A_k; A_v] [2 r, n], B the
blocks B_k and B_v on the diagonal below zeros for q [3 m, 2 r], lora_alpha = s 2 r. Those of any other map are PEFT's
own, lora_alpha = s r; where both are adapted, rank and alpha are patterns. All adapters together, active or merged one
by one, are what the run has merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from janus_ext import ops
from janus_ext.backbone import load_backbone, prepare_torchvision
from janus_ext.backbone.places import BIASES
from janus_ext.errors import ArgumentError
from janus_ext.exports import card, usage
from janus_ext.exports.contents import Contents, Update
from janus_ext.exports.folder import check_same, new_folder, random_images, require
from janus_ext.exports.plain import merged_backbone
from janus_ext.runs.checkpoint import to_json, write_tensors

TOLERANCE = 1e-4  # of the largest feature: float32 rounds every task's merge
CLASSIFIER = "classifier.safetensors"


def export(contents: Contents, folder: Path) -> None:
    """Writes task-<t>/adapter_config.json and adapter_model.safetensors, classifier.safetensors and README.md.

    ``folder`` is new or empty.

    Raises:
        ArgumentError: PEFT is missing, or the update is none of PEFT's kind: the reason is named.
        CheckpointError: the folder cannot be written, or what PEFT reads from it computes other features.
    """
    require("peft", "peft")
    prepare_torchvision()  # PEFT imports transformers, which takes torchvision where it is installed
    targets = _targets(contents)
    merged, base = merged_backbone(contents.model), _base(contents.settings)
    _check_layers(base, targets)
    _check_sum(base, merged, [*contents.adapters.values()], targets)
    with new_folder(folder) as made:
        for name, update in contents.adapters.items():
            _write_adapter(made / name, update, targets, str(contents.settings["backbone"]))
        rows = dict(zip(("weight", "bias"), contents.decision.rows(), strict=True))
        write_tensors(made / CLASSIFIER, rows, {"class_names": to_json(contents.class_names)})
        _check_features(made, contents, base, merged)
        card.write(made, contents, usage.peft(contents))


def pair(update: Update, name: str, targets: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """A [r, n] and B [m, r] of layer ``name``; as one, those of g ``targets`` of a fused qkv: [g r, n], [3 m, g r]."""
    A, B = update.tensors[f"{name}.A"], update.tensors[f"{name}.B"]
    if not targets:
        return A.to(B), B
    _, width, rank = B.shape
    whole = B.new_zeros(3 * width, len(targets) * rank)
    for index, target in enumerate(targets):
        row = ops.TARGETS.index(target) * width
        whole[row : row + width, index * rank : (index + 1) * rank] = B[index]
    return A.flatten(0, 1).to(B), whole


def _targets(contents: Contents) -> dict[str, tuple[str, ...]]:
    """The adapted slices of each layer that has factors, () of a map by itself; ArgumentError where there are none."""
    method, updates = contents.settings.get("method"), [*contents.adapters.values()]
    if not updates:
        raise ArgumentError("--format peft needs factors, and there are none: no task has changed the backbone")
    names = {key.removesuffix(".A") for key in updates[0].tensors if key.endswith(".A")}
    if not names or any(f"{name}.{part}" not in u.tensors for u in updates for name in names for part in "AB"):
        raise ArgumentError(f"--format peft takes low-rank factors, and the updates of --method {method} are none")
    layers = dict(contents.model.backbone.named_modules())
    return {name: getattr(layers[name], "targets", ()) for name in layers if name in names}


def _base(settings: Mapping[str, Any]) -> nn.Module:
    """The backbone that the run began with, without a classifier."""
    if settings.get("own_backbone"):
        raise ArgumentError("--format peft needs a backbone that has a name, and this one was handed over as a model")
    if settings["weights"] == "none":
        raise ArgumentError("--format peft needs pretrained weights to stand on: --weights none drew them at random")
    return load_backbone(settings["backbone"], settings["weights"], settings.get("image_size")).eval()


def _check_layers(base: nn.Module, names: Mapping[str, Any]) -> None:
    """PEFT computes W x + s B A x in a layer that is called; where only its weight is read, nothing would be added."""
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = base.get_submodule(parent)
        beside = any(getattr(owner, part, None) is not None for part in BIASES)
        if child == "qkv" and beside and not getattr(owner, "qkv_bias_separate", False):
            kind = type(owner).__name__
            raise ArgumentError(
                f"--format peft cannot adapt {name}: {kind} reads the weight of its qkv, and calls it not"
            )


@torch.no_grad()
def _check_sum(
    base: nn.Module, merged: nn.Module, updates: Sequence[Update], targets: Mapping[str, tuple[str, ...]]
) -> None:
    """ArgumentError unless W0 + sum of s B A is W, to the rounding of one merge a task."""
    for name, slices in targets.items():
        start, end = (model.get_submodule(name).weight.double() for model in (base, merged))
        pairs = [(u.scale, *pair(u, name, slices)) for u in updates]
        changes = [scale * (B.double() @ A.double()) for scale, A, B in pairs]
        rounding = torch.finfo(torch.float32).eps * (len(changes) * end.norm() + sum(c.norm() for c in changes))
        missing = float((start + sum(changes) - end).norm())
        if not missing <= rounding:
            raise ArgumentError(
                f"--format peft: the pretrained backbone and all tasks' factors do not give the weight of {name}, "
                f"|W0 + sum s B A - W| is {missing:.1e} and {float(rounding):.1e} would be rounding"
            )


def _write_adapter(folder: Path, update: Update, targets: Mapping[str, tuple[str, ...]], base: str) -> None:
    from peft import LoraConfig

    pairs = {name: pair(update, name, slices) for name, slices in targets.items()}
    ranks = {name: len(A) for name, (A, _) in pairs.items()}
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    LoraConfig(
        r=most,
        lora_alpha=_whole(update.scale * most),
        rank_pattern=others,
        alpha_pattern={name: _whole(update.scale * rank) for name, rank in others.items()},
        target_modules=list(targets),
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(folder))
    prefix = "base_model.model"
    tensors = {
        f"{prefix}.{name}.lora_{part}.weight": t for name in pairs for part, t in zip("AB", pairs[name], strict=True)
    }
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def _whole(number: float) -> float:
    """An int where it is one, as PEFT writes it."""
    return int(number) if number == int(number) else number


@torch.no_grad()
def _check_features(folder: Path, contents: Contents, base: nn.Module, merged: nn.Module) -> None:
    """Both ways in which PEFT's users put several adapters to work: all active, and merged one by one."""
    from peft import PeftModel

    model = contents.model
    pixels = (random_images(model.input_size) - model.mean.cpu()) / model.std.cpu()
    wanted = merged(pixels)  # without a classifier: features
    names = list(contents.adapters)
    adapted = PeftModel.from_pretrained(deepcopy(base), str(folder / names[0]), adapter_name=names[0]).eval()
    for name in names[1:]:
        adapted.load_adapter(str(folder / name), adapter_name=name)
    adapted.base_model.set_adapter(names, inference_mode=True)
    check_same("PEFT computes otherwise", adapted(pixels), wanted, TOLERANCE)
    alone = adapted.merge_and_unload(adapter_names=names)
    check_same("PEFT merges otherwise", alone(pixels), wanted, TOLERANCE)
