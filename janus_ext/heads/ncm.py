"""``ncm``: the nearest class mean by cosine (Rebuffi et al., CVPR 2017, for unit features)."""

from __future__ import annotations

from janus_ext.heads.base import NEVER, Decision
from janus_ext.heads.knowledge import Knowledge

SHARPNESS = 16.0  # what cosines are multiplied by before a softmax: the margin loss's temperature


def fit(known: Knowledge) -> Decision:
    """Unit means as rows."""
    known.require("ncm")
    prototypes = known.prototypes
    weight = prototypes.matrix.new_zeros(known.classes, prototypes.matrix.shape[1])
    bias = weight.new_full((known.classes,), NEVER)
    weight[prototypes.classes], bias[prototypes.classes] = SHARPNESS * prototypes.matrix, 0.0
    return Decision(weight, bias, unit=True)
