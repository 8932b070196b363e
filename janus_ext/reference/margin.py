"""Decoupled Margin Loss."""

import math

import torch
from torch import Tensor

from janus_ext.reference.checks import INPUT_DTYPES, WORKING_DTYPES, require, require_device, require_dtype


def margin_loss(features: Tensor, prototypes: Tensor, margin: float, temperature: float) -> tuple[Tensor, Tensor]:
    """mean_i (1/tau) log(1 + sum_c exp(tau (f^_i . p_c - margin))) and its gradient; see `ops.margin_loss`."""
    op = "margin_loss"
    require_dtype(op, "features", features, INPUT_DTYPES)
    require(features.dim() == 2, f"{op}: features must be [N, d], got {list(features.shape)}")
    require_dtype(op, "prototypes", prototypes, WORKING_DTYPES)
    require(
        prototypes.dim() == 2 and prototypes.shape[1] == features.shape[1],
        f"{op}: prototypes must be [C, d] with d = {features.shape[1]}, got {list(prototypes.shape)}",
    )
    require_device(op, features, prototypes=prototypes)
    require(-1 <= margin <= 1, f"{op}: margin must be a cosine in [-1, 1], got {margin:g}")
    require(0 < temperature < float("inf"), f"{op}: temperature must be positive and finite, got {temperature:g}")
    temperature = float(temperature)  # torch multiplies by no larger integer than int64
    dtype = torch.promote_types(prototypes.dtype, features.dtype)
    N, C = features.shape[0], prototypes.shape[0]
    if N == 0 or C == 0:
        return features.new_zeros((), dtype=dtype), features.new_zeros((N, features.shape[1]), dtype=dtype)
    f, p = features.to(dtype), prototypes.to(dtype)
    norm = f.norm(dim=1, keepdim=True)
    norm = norm.masked_fill(norm < torch.finfo(dtype).tiny ** 0.5, math.inf)  # no direction: cosines 0, no gradient
    unit = f / norm
    z = temperature * (unit @ p.mT - margin)
    log_sum = torch.logsumexp(torch.cat([z.new_zeros(N, 1), z], dim=1), dim=1, keepdim=True)
    pull = torch.exp(z - log_sum) @ p  # d loss_i / d f^_i
    grad = (pull - (pull * unit).sum(1, keepdim=True) * unit) / (norm * N)
    return log_sum.mean() / temperature, grad
