"""Every op in plain PyTorch: the oracle of the tests, and what runs where no compiled kernel exists.

One page per capability, as in `janus_ext.ops`. Each function takes the arguments of its raw op by name.

Notation of the whole project: an adapted linear map y = x W^T + b with W [m, n], factors A [r, n] and B [m, r], scale
s, and V [n, k], an orthonormal basis of the protected input subspace. P = I - V V^T is applied, never formed. "The
paper" is Chen et al., "Janus-LoRA", ICML 2026, arXiv 2605.28495; what is not marked so is this project's definition.
"""

from janus_ext.rectification import DAMPING, RECTIFY, SHARE
from janus_ext.reference.basis import extend_basis, extend_basis_factor, is_empty, project
from janus_ext.reference.checks import INPUT_DTYPES, WORKING_DTYPES, check_rectify
from janus_ext.reference.gram import gram_update_
from janus_ext.reference.isvd import isvd_update
from janus_ext.reference.lora import lora_backward, lora_linear, lora_qkv
from janus_ext.reference.margin import margin_loss
from janus_ext.reference.precision import full_float32
from janus_ext.reference.rectify import check_lengths, rectified, rectify_

__all__ = [
    "DAMPING",
    "INPUT_DTYPES",
    "RECTIFY",
    "SHARE",
    "WORKING_DTYPES",
    "check_lengths",
    "check_rectify",
    "extend_basis",
    "extend_basis_factor",
    "full_float32",
    "gram_update_",
    "is_empty",
    "isvd_update",
    "lora_backward",
    "lora_linear",
    "lora_qkv",
    "margin_loss",
    "project",
    "rectified",
    "rectify_",
]
