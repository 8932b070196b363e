"""What rounding W to half precision costs: violation of one merge, by the size of the update.

    python benchmarks/half_precision.py

W is 768 x 768 with entries of deviation 0.02, half of the inputs are protected, rank 10, seed 0.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from janus_ext import LoRALinear
from janus_ext.protection import violation

WIDTH, RANK = 768, 10
SIZES = (0.3, 0.05, 0.01, 0.003)  # |dW| / |W|


def violation_of_a_merge(dtype: torch.dtype, size: float, master: bool) -> float:
    """|dW V| / |dW| of the update as it came out of the merge."""
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    layer = LoRALinear(linear.to(dtype), RANK)
    layer.protect(torch.linalg.qr(torch.randn(WIDTH, WIDTH // 2)).Q)
    nn.init.normal_(layer.B)
    with torch.no_grad():
        layer.B.mul_(size * linear.weight.float().norm() / layer.delta().norm())
    return violation(layer.merge(master), layer.basis)


def main() -> None:
    warnings.simplefilter("ignore", UserWarning)  # the warning that is measured here
    print("weights                 " + "".join(f"  |dW|/|W| {size:<6g}" for size in SIZES))
    for dtype, master in (
        (torch.float32, False),
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float16, False),
    ):
        name = str(dtype).removeprefix("torch.") + (", master weights" if master else "")
        print(f"{name:<24}" + "".join(f"  {violation_of_a_merge(dtype, size, master):<15.1e}" for size in SIZES))


if __name__ == "__main__":
    main()
