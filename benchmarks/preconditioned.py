"""Riemannian preconditioning in place of Gradient Rectification, for the study's row "OE + preconditioner".

Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models" (ICML 2024); PEFT has it, too:

    dA = (B^T B)^-1 g_A,   dB = g_B (A A^T)^-1

with g_A P in place of g_A, damping and scale as in Gradient Rectification. So nothing differs but the tangent step: the
part that both factors could carry is carried by both, and counts twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from janus_ext import ops
from janus_ext.rectification import Rectification
from janus_ext.reference.rectify import damped_inverse, mean_eigenvalue


@torch.no_grad()
def precondition_(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    basis: Sequence[Tensor | None],
    scale: Sequence[float],
    how: Rectification,
    **_: Any,
) -> None:
    """Arguments as of `ops.rectify_`; balanced as there."""
    if not how.balance:
        raise ValueError("precondition_ is written for balanced gradients, as training has them")
    for a, b, dA, dB, v in zip(A, B, grad_A, grad_B, basis, strict=True):
        gram_A, gram_B = a @ a.mT, b.mT @ b
        safe = dA if v is None or v.shape[-1] == 0 else ops.project(dA, v)
        dA.copy_(damped_inverse(gram_B, how.damping) @ safe * mean_eigenvalue(gram_B)[..., None, None])
        dB.copy_(dB @ damped_inverse(gram_A, how.damping) * mean_eigenvalue(gram_A)[..., None, None])


@contextmanager
def preconditioned(wanted: bool = True) -> Iterator[None]:
    """Within it, if wanted, `GradientRectifier` and the methods precondition instead of rectifying."""
    with mock.patch.object(ops, "rectify_", precondition_ if wanted else ops.rectify_):
        yield
