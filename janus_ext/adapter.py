"""What every adapter of this package is: a module around a frozen linear map, whose update can become part of it."""

from typing import Any

from torch import nn


class Adapter(nn.Module):
    """Computes an nn.Linear and an update beside it, which `merge` adds to its weight.

    Attributes:
        linear: the frozen map; after `merge` it alone computes what the adapter does.
        has_master: whether `linear` is kept in float32 in a model of half precision.
    """

    linear: nn.Linear
    has_master = False

    def merge(self) -> Any:
        """W <- W and the update, in place; the update is zero from then on."""
        raise NotImplementedError
