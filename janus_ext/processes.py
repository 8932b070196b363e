"""The processes that torch.distributed runs: how many, and how all of them refuse what one refuses."""

import torch

from janus_ext.errors import JanusError, TaskBoundaryError


def count() -> int:
    """How many torch.distributed runs; 1 where it was not started."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def refuse_together(error: JanusError | None, device: torch.device) -> None:
    """Raises the error of this process, or that another one has one: else that would wait for this one for ever."""
    if count() > 1:
        refused = torch.tensor(int(error is not None), device=device)
        torch.distributed.all_reduce(refused, torch.distributed.ReduceOp.MAX)
        if error is None and bool(refused):
            error = TaskBoundaryError("another process refused, and says why: nothing has changed here either")
    if error is not None:
        raise error
