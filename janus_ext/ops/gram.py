"""Online Estimation: the Gram matrix of a layer's inputs."""

import torch
from torch import Tensor

from janus_ext import reference
from janus_ext.ops.registry import define


def gram_update_(gram: Tensor, x: Tensor, decay: float = 1.0) -> Tensor:
    """gram <- decay * gram + x^T x, in place, bit-symmetric (Online Estimation).

    Args:
        gram: [n, n], float32 or float64, symmetric: its upper triangle is read, the lower one is not looked at.
        x: [..., n], float64, float32, bfloat16 or float16; products accumulate in gram's dtype. float32
            products follow torch's matmul precision setting; bfloat16 products may flush denormals to zero.
        decay: in (0, 1]; 1 keeps every observation at full weight.

    Returns:
        gram itself.
    """
    with torch.no_grad():
        torch.ops.janus_ext.gram_update_(gram, x, decay)
    return gram


def _fake(gram: Tensor, x: Tensor, decay: float = 1.0) -> None:
    return None


define("gram_update_(Tensor(a!) gram, Tensor x, float decay=1.0) -> ()", reference.gram_update_, _fake)
