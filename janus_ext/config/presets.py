"""What a run takes where the user says nothing: the published protocol of each benchmark, and each method's own values.

``default`` is the published protocol where a benchmark has one, with the colours as the backbone wants them, linear
discriminant analysis behind features that a guard keeps in place, heads that start small and one seed, and what was
tuned here for the embedded images. ``paper`` is the published protocol to the letter: InfLoRA's line, which Janus-LoRA
follows, linear heads and quirks included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janus_ext.errors import ArgumentError

VIT_B16 = "vit_base_patch16_224.augreg_in21k"  # ImageNet-21k; the fine-tuned ..._in21k_ft_in1k gives other numbers

# Tuned on the embedded images, for Janus-LoRA; with linear heads held-out images choose the same rate and energies
# (`python benchmarks/study.py details emoji`).
EMBEDDED: dict[str, Any] = {
    "backbone": "emoji",
    "rank": 8,
    "epochs": 12,
    "batch_size": 32,
    "optimizer": "adam",
    "lr": 1.6e-2,
    "head_lr": 1e-2,
    "schedule": "cosine",
    "energy_start": 0.97,
    "energy_end": 0.99,
    "energy_power": 1,
}

# InfLoRA's configuration files and code: Adam without decay, one rate for factors and head, CODA-Prompt's quarter of
# a cosine, stepped per epoch from the second on. Its thresholds are shares of the Gram matrix's squared eigenvalues:
# energy_power 2.
IMAGENET_R: dict[str, Any] = {
    "backbone": VIT_B16,
    "rank": 10,
    "epochs": 50,
    "batch_size": 128,
    "optimizer": "adam",
    "lr": 5e-4,
    "head_lr": 5e-4,
    "schedule": "quarter",
    "energy_start": 0.98,
    "energy_end": 1.0,
    "energy_power": 2,
}
CIFAR100 = IMAGENET_R | {"epochs": 20, "energy_start": 0.95}
DOMAINNET = IMAGENET_R | {
    "rank": 30,
    "epochs": 5,
    "optimizer": "sgd",
    "lr": 5e-3,
    "head_lr": 1e-2,
    "schedule": "step",
    "milestones": (4,),
    "energy_start": 0.95,
}
BENCHMARKS: dict[str, dict[str, Any]] = {
    "emoji": EMBEDDED,
    "imagenet-r": IMAGENET_R,
    "cifar100": CIFAR100,
    "fashion-mnist": CIFAR100,  # no configuration is published, as for the others that take this one
    "imagenet-100": CIFAR100,
    "imagenet-a": CIFAR100,
    "cub": CIFAR100,
    "cars": CIFAR100,
    "domainnet": DOMAINNET,
    "folder": CIFAR100,
}
PUBLISHED = ("imagenet-r", "cifar100", "imagenet-100", "domainnet")

# What makes a method itself, on every benchmark.
METHODS: dict[str, dict[str, Any]] = {
    "janus": {"rectify": "exact", "estimator": "gram", "margin_weight": 0.5, "margin": 0.2},
    "lora": {"rectify": "none", "estimator": "none", "margin_weight": 0.0},
    "lora-gpm": {"rectify": "project", "estimator": "gram", "margin_weight": 0.0},
    "inflora": {"rectify": "none", "estimator": "gram", "margin_weight": 0.0, "energy_power": 2},
    "lora-drs": {
        "rectify": "none",
        "estimator": "gram",
        "margin_weight": 0.05,
        "margin": 1.0,
        "head": "ncm",
        "energy_start": 0.99,
        "energy_end": 0.99,
        "energy_power": 1,
    },
    "bilora": {"rectify": "none", "estimator": "none", "margin_weight": 0.0, "scale": 300.0},
    "joint": {"rectify": "none", "estimator": "none", "margin_weight": 0.0, "tasks": 1},
}
# What a method takes on one benchmark alone; on the embedded images what held-out ones choose with linear heads.
SPECIAL: dict[tuple[str, str], dict[str, Any]] = {
    ("lora", "emoji"): {"lr": 8e-3},
    ("lora-gpm", "emoji"): {"lr": 4e-3, "energy_start": 0.7, "energy_end": 0.9},
    ("inflora", "emoji"): {"lr": 4e-3, "energy_start": 0.9, "energy_end": 1.0},
    ("lora-drs", "emoji"): {"lr": 4e-3, "margin_weight": 0.2},
    ("bilora", "emoji"): {"lr": 2e-3},
    ("lora-drs", "domainnet"): {"rank": 40},
    ("inflora", "domainnet"): {"gpm": "plain"},
}
COMMON: dict[str, Any] = {
    "normalize": "model",
    "head": "lda",
    "head_init": "small",
    "scale": 1.0,
    "margin": 0.2,
    "gpm": "dual",
    "seed": (0,),
}
# What all heads take but "linear": they are fitted to features of earlier tasks, and wrong where these have moved.
GUARD: dict[str, Any] = {"drift_budget": 0.1}
# What they take beside it on one benchmark; chosen with `lda`, on held-out images (REPRODUCIBILITY.md).
GENTLE: dict[tuple[str, str], dict[str, Any]] = {
    ("janus", "emoji"): {"lr": 4e-3, "energy_start": 0.999, "energy_end": 0.9999},
    ("lora", "emoji"): {"lr": 2.5e-4},
    ("lora-gpm", "emoji"): {"lr": 1e-3},
    ("inflora", "emoji"): {"energy_start": 0.98},
    ("lora-drs", "emoji"): {"lr": 1e-3},
    ("bilora", "emoji"): {"lr": 3.125e-5},
}
PAPER: dict[str, Any] = {"normalize": "identity", "head": "linear", "head_init": "default", "seed": (0, 1, 2, 3, 4)}


def values(
    preset: str,
    benchmark: str,
    method: str,
    declared: Mapping[str, Any],
    backbone: str | None = None,
    head: str = "auto",
) -> dict[str, Any]:
    """Fields of the configuration and what they are unless the user says otherwise; the later table wins.

    ``declared`` are those of a method from elsewhere, which is like ``method``; a benchmark from elsewhere is like
    ``folder``. Where no protocol is published, the embedded ``backbone`` takes what was tuned for it, whatever the
    images are.
    """
    if preset == "paper" and benchmark not in PUBLISHED:
        raise ArgumentError(
            f"--preset paper is a published protocol, and --benchmark {benchmark} has none; it belongs to "
            f"{', '.join(PUBLISHED)}"
        )
    published = PAPER if preset == "paper" else {}
    tuned = "emoji" if backbone == "emoji" and benchmark not in PUBLISHED else benchmark
    of_benchmark = BENCHMARKS.get(tuned, BENCHMARKS["folder"])
    tables = [COMMON, published, of_benchmark, METHODS[method], SPECIAL.get((method, tuned), {})]
    chosen = _merged(*tables, declared)["head"] if head == "auto" else head
    if preset == "default" and chosen != "linear":
        tables += [GUARD, GENTLE.get((method, tuned), {})]
    return _merged(*tables, declared)


def _merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for table in tables for name, value in table.items()}
