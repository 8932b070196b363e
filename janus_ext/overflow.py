"""Where in a network a number that is not finite comes from: one more pass, which looks at what every module gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from janus_ext import processes


@torch.no_grad()
def said_of_overflow(model: nn.Module, passes: Iterable[Callable[[], Any]]) -> str:
    """Names the module whose output is the first that is not finite in ``passes`` through ``model``, as a clause.

    All processes call it, each with its own images.
    """
    found: list[str] = []
    training = model.training
    model.eval()
    hooks = [module.register_forward_hook(_looking(name, found)) for name, module in model.named_modules() if name]
    try:
        for run in passes:
            run()
            if found:
                break
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    names = [name for named in processes.gathered(found) for name in named]
    return f"the first output that is not finite is that of {names[0]}" if names else "every module's output is finite"


def _looking(name: str, found: list[str]) -> Callable[..., None]:
    """A hook that notes ``name`` where nothing was found before: modules that hold others come behind those."""

    def look(module: nn.Module, given: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
            found.append(name)

    return look
