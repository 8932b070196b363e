"""The paper's tables (arXiv 2605.28495), by benchmark and tasks: ACC, MAA, BWT of five seeds, ViT-B/16 of ImageNet-21k.

None is a figure that the paper does not give. Rows of methods that are not here (L2P, DualPrompt, CODA-Prompt) are left
out.
"""

from __future__ import annotations

from typing import Any

from study_rows import PAPER as ABLATION

Figures = tuple[float | None, float | None, float | None]
Setting = tuple[str, int]

# Row: what is changed of --preset paper to run it.
METHODS: dict[str, dict[str, Any]] = {
    "Fine-tuning": {"method": "lora"},
    "LoRA-DRS": {"method": "lora-drs"},
    "LoRA-GPM": {"method": "lora-gpm"},
    "BiLoRA": {"method": "bilora"},
    "InfLoRA": {"method": "inflora"},
    "Janus-LoRA": {"method": "janus", "rectify": "tangent"},
}
OURS = {"Janus-LoRA, exact": {"method": "janus"}}  # this project's rectification: nothing is reported of it
PARTS = {
    f"ablation: {name}": {"method": "janus"} | change
    for name, change in ABLATION.items()
    if name != "OE + GR + DML"  # that is Janus-LoRA
}
PLUGGED = {
    "LoRA-DRS with GR": {"method": "lora-drs", "rectify": "tangent"},
    "LoRA-GPM with GR": {"method": "lora-gpm", "rectify": "tangent"},
}
ROWS = METHODS | OURS | PARTS | PLUGGED

REPORTED: dict[Setting, dict[str, Figures]] = {
    ("imagenet-r", 5): {
        "Fine-tuning": (69.75, 78.93, -17.65),
        "LoRA-DRS": (74.51, 80.27, -4.11),
        "LoRA-GPM": (73.96, 81.16, -10.24),
        "BiLoRA": (74.93, 78.59, -2.74),
        "InfLoRA": (76.31, 81.64, -6.17),
        "Janus-LoRA": (77.19, 82.52, -6.71),
    },
    ("imagenet-r", 10): {
        "Fine-tuning": (64.24, 74.68, -21.85),
        "LoRA-DRS": (72.58, 78.34, -3.72),
        "LoRA-GPM": (71.56, 79.34, -10.95),
        "BiLoRA": (73.93, 77.92, -2.07),
        "InfLoRA": (73.90, 80.01, -6.33),
        "Janus-LoRA": (75.78, 81.64, -6.05),
        "ablation: DML": (64.47, 75.81, -24.16),
        "ablation: OE": (71.82, 79.28, -10.13),
        "ablation: GR": (70.20, 78.80, -14.01),
        "ablation: OE + GR": (74.39, 80.47, -4.43),
        "ablation: OE + DML": (73.61, 80.68, -11.26),
        "LoRA-DRS with GR": (73.52, None, None),
        "LoRA-GPM with GR": (74.14, None, -4.55),
    },
    ("imagenet-r", 20): {
        "Fine-tuning": (57.62, 69.86, -25.43),
        "LoRA-DRS": (67.60, 73.72, -3.66),
        "LoRA-GPM": (64.06, 73.91, -14.56),
        "BiLoRA": (61.70, 68.60, -5.48),
        "InfLoRA": (68.91, 76.24, -7.74),
        "Janus-LoRA": (71.57, 77.11, -5.77),
    },
    ("cifar100", 10): {
        "Fine-tuning": (83.53, 90.18, -11.47),
        "LoRA-DRS": (84.02, 89.23, -2.16),
        "LoRA-GPM": (86.01, 91.31, -5.56),
        "BiLoRA": (86.48, 91.00, -3.32),
        "InfLoRA": (86.69, 91.61, -4.61),
        "Janus-LoRA": (88.68, 92.58, -5.29),
    },
    ("imagenet-100", 10): {
        "Fine-tuning": (89.10, 92.95, -6.80),
        "LoRA-DRS": (92.42, 94.11, -2.03),
        "LoRA-GPM": (91.53, 94.00, -3.58),
        "BiLoRA": (91.74, 93.65, -2.80),
        "InfLoRA": (91.84, 93.94, -2.37),
        "Janus-LoRA": (92.47, 94.32, -3.24),
    },
    ("domainnet", 5): {
        "Fine-tuning": (69.34, 74.83, -5.14),
        "LoRA-DRS": (73.40, 79.36, -4.80),
        "LoRA-GPM": (69.24, 74.84, -5.55),
        "BiLoRA": (67.32, 73.03, -4.91),
        "InfLoRA": (72.94, 78.98, -7.38),
        "Janus-LoRA": (73.82, 79.67, -7.74),
    },
}
# What one run of each trains on: images (of ImageNet-100 at most, by its list), epochs of --preset paper.
TRAINED = {
    "imagenet-r": (24_000, 50),
    "cifar100": (50_000, 20),
    "imagenet-100": (130_000, 20),
    "domainnet": (289_082, 5),
}
