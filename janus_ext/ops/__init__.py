"""The op book: one page per capability - schemas, fakes, gradients, documented functions.

`janus_ext.reference` has the default kernel of every op, on a page of the same name; the compiled library registers CPU
and CUDA kernels over it. So every op, its fake and its gradient exist with or without a compiler. The raw ops are
``torch.ops.janus_ext.<name>``; the functions here are what users call. Wrong arguments raise ``ValueError`` or
``TypeError`` and leave every input as it was. Under autocast x, weight and bias take the autocast dtype, and so do A_s
and B inside the two products with x; A, B, V, the projection and all r x r work stay as they are (float32 or float64).
What is imported under its own name, and is not in ``__all__``, is for the layers of this package: it checks nothing.
"""

from janus_ext.ops import registry
from janus_ext.ops.basis import extend_basis, extend_basis_factor
from janus_ext.ops.gram import gram_update_
from janus_ext.ops.isvd import isvd_update
from janus_ext.ops.lora import TARGETS, lora_linear, lora_qkv
from janus_ext.ops.lora import check_differentiation as check_differentiation
from janus_ext.ops.margin import margin_loss
from janus_ext.ops.rectify import rectify_
from janus_ext.ops.registry import autocast as autocast
from janus_ext.rectification import DAMPING, RECTIFY, SHARE
from janus_ext.reference import WORKING_DTYPES
from janus_ext.reference import check_rectify as check_rectify
from janus_ext.reference import is_empty as is_empty
from janus_ext.reference import project as project

OPS = tuple(registry.OPS)

__all__ = [
    "DAMPING",
    "OPS",
    "RECTIFY",
    "SHARE",
    "TARGETS",
    "WORKING_DTYPES",
    "extend_basis",
    "extend_basis_factor",
    "gram_update_",
    "isvd_update",
    "lora_linear",
    "lora_qkv",
    "margin_loss",
    "rectify_",
]
