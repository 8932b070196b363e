"""Online Estimation: the Gram matrix of a layer's inputs."""

import torch
from torch import Tensor

from janus_ext.reference.checks import (
    INPUT_DTYPES,
    WORKING_DTYPES,
    require,
    require_device,
    require_dtype,
    require_last,
    require_writable,
)


def gram_update_(gram: Tensor, x: Tensor, decay: float = 1.0) -> None:
    """gram <- decay * gram + x^T x, exactly symmetric, from gram's upper triangle; see `janus_ext.ops.gram_update_`."""
    op = "gram_update_"
    require_dtype(op, "gram", gram, WORKING_DTYPES)
    require(
        gram.dim() == 2 and gram.shape[0] == gram.shape[1] and gram.shape[0] > 0,
        f"{op}: gram must be [n, n] with n > 0, got {list(gram.shape)}",
    )
    require_writable(op, "gram", gram)
    require_dtype(op, "x", x, INPUT_DTYPES)
    require_last(op, "x", x, gram.shape[0])
    require_device(op, gram, x=x)
    require(0 < decay <= 1, f"{op}: decay must be in (0, 1], got {decay:g}")
    rows = x.reshape(-1, x.shape[-1]).to(gram.dtype)
    upper = torch.triu(decay * gram + rows.mT @ rows)
    gram.copy_(upper + torch.triu(upper, 1).mT)
