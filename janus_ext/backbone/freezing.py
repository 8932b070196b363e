"""A backbone that stays as it is: no gradients, and normalisation whose running statistics do not move."""

from functools import cache

from torch import nn


def freeze(model: nn.Module) -> None:
    """No parameter needs a gradient any more, and normalisation with running statistics stays in evaluation mode.

    A frozen BatchNorm in training mode would go on changing: every forward pass moves its statistics, and with them the
    features of old classes. Dropout and stochastic depth stay as the model has them.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False)):
            _keep_in_evaluation(module)


def unfreeze(model: nn.Module) -> None:
    """The inverse of `freeze`: every parameter needs a gradient, and normalisation is in the model's mode again."""
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, _InEvaluation):
            module.__class__ = type(module).__mro__[2]  # behind the made class and _InEvaluation
            module.train(model.training)


def _keep_in_evaluation(module: nn.Module) -> None:
    if not isinstance(module, _InEvaluation):
        module.eval()
        module.__class__ = _in_evaluation(type(module))


class _InEvaluation:
    """Mixed into a class of modules: `train()` leaves it in evaluation mode, in copies and pickles, too."""

    def train(self, mode: bool = True) -> "_InEvaluation":
        return super().train(False)

    def __reduce_ex__(self, protocol: int) -> tuple[object, ...]:
        kind = type(self).__mro__[2]  # behind the made class and this one
        return _unpickled, (kind,), self.__dict__


@cache
def _in_evaluation(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Frozen{kind.__name__}", (_InEvaluation, kind), {})


def _unpickled(kind: type[nn.Module]) -> nn.Module:
    made = _in_evaluation(kind)
    return made.__new__(made)
