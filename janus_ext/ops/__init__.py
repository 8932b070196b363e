"""The op book: one page per capability - schemas, fakes, gradients, documented functions.

`janus_ext.reference` has the default kernel of every op, on a page of the same name; the compiled library registers CPU
and CUDA kernels over it. So every op, its fake and its gradient exist with or without a compiler. The raw ops are
``torch.ops.janus_ext.<name>``; the functions here are what users call. Wrong arguments raise ``ValueError`` or
``TypeError`` and leave every input as it was. Under autocast x, weight and bias take the autocast dtype, and so do A_s
and B inside the two products with x; A, B, V, the projection and all r x r work stay as they are (float32 or float64).
"""

from janus_ext.ops import registry
from janus_ext.ops.basis import extend_basis, extend_basis_factor
from janus_ext.ops.gram import gram_update_
from janus_ext.ops.isvd import isvd_update
from janus_ext.ops.lora import TARGETS, check_differentiation, lora_linear, lora_qkv
from janus_ext.ops.margin import margin_loss
from janus_ext.ops.rectify import rectify_
from janus_ext.ops.registry import autocast
from janus_ext.rectification import DAMPING, RECTIFY, SHARE
from janus_ext.reference import WORKING_DTYPES, check_rectify, is_empty, project

OPS = tuple(registry.OPS)

__all__ = [
    "DAMPING",
    "OPS",
    "RECTIFY",
    "SHARE",
    "TARGETS",
    "WORKING_DTYPES",
    "autocast",
    "check_differentiation",
    "check_rectify",
    "extend_basis",
    "extend_basis_factor",
    "gram_update_",
    "is_empty",
    "isvd_update",
    "lora_linear",
    "lora_qkv",
    "margin_loss",
    "project",
    "rectify_",
]
