"""The library of all ops: how a page defines its own, with a kernel for every device, a fake and a gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from janus_ext import _native
from janus_ext.rectification import DAMPING, SHARE

# The options of a Rectification as raw ops declare them; these balance only where they are asked to.
RECTIFICATION = f'str rectify="exact", float damping={DAMPING}, float share={SHARE}, bool balance=False'

OPS: list[str] = []
"""The names of all ops that are defined."""
_library = torch.library.Library("janus_ext", "DEF")


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    cast: int = 0,
) -> None:
    """Make ``torch.ops.janus_ext.<name>``.

    Args:
        schema: name, arguments and returns.
        reference: the default kernel, over which the compiled library registers its own; takes arguments by name.
        fake: shapes and dtypes of the returns.
        autograd: backward and setup_context of an op that is differentiable.
        cast: how many of the first arguments take the autocast dtype.
    """
    name = schema.partition("(")[0]
    with _native.loading():
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    op = getattr(torch.ops.janus_ext, name).default
    _library.impl(name, _by_name(op, reference), "CompositeExplicitAutograd")
    for device in ("cpu", "cuda"):
        _library.impl(name, _autocast_kernel(op, cast, device), f"Autocast{device.upper()}")
    torch.library.register_fake(f"janus_ext::{name}", _on_one_device(op, fake), lib=_library)
    if autograd is not None:
        backward, setup = autograd
        torch.library.register_autograd(f"janus_ext::{name}", backward, setup_context=setup, lib=_library)
    OPS.append(name)


def _by_name(op: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that calls `function` by the names of the schema; defaults at the end do not come along."""
    names = [argument.name for argument in op._schema.arguments]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return function(**dict(zip(names, args, strict=False)), **kwargs)

    return kernel


def _on_one_device(op: Any, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which also runs where a single argument is on meta: there an op in place would do nothing, unsaid."""
    names = [argument.name for argument in op._schema.arguments]

    def checked(*args: Any, **kwargs: Any) -> Any:
        given = [*zip(names, args, strict=False), *kwargs.items()]
        items = [(name, t) for name, value in given for t in (value if isinstance(value, list) else [value])]
        devices = [(name, t.device) for name, t in items if isinstance(t, Tensor) and (t.dim() or t.is_meta)]
        for name, device in devices:
            if device != devices[0][1]:
                who = op._schema.name.partition("::")[2]
                raise ValueError(f"{who}: {name} must be on {devices[0][1]}, got {device}")
        return fake(*args, **kwargs)

    return checked


def _autocast_kernel(op: Any, inputs: int, device: str) -> Callable[..., Any]:
    """Casts the first `inputs` tensors to the autocast dtype, then runs `op` with autocast off inside."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(tensor: Tensor | None) -> Tensor | None:
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(torch.get_autocast_dtype(device)) if eligible else tensor

    def kernel(*args: Any, **kwargs: Any) -> Any:
        cast_args = [cast(a) for a in args[:inputs]]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast_args, *args[inputs:], **kwargs)

    return kernel


def autocast(x: Tensor) -> Tensor:
    """x in the dtype in which a product takes it: that of autocast where it is on, else its own; float64 stays."""
    device = x.device.type
    eligible = torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if eligible else x


def require_frozen(op: str, **inputs: Tensor | None) -> None:
    """What an op is not differentiable in would get no gradient, unsaid."""
    trainable = [name for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad]
    if trainable and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {' and '.join(trainable)} must be frozen (requires_grad=False), got requires_grad=True"
        )


def require_reverse_mode(op: str, *inputs: Tensor) -> None:
    """Forward-mode derivatives would come out as zero, and torch.func's do not reach a custom op's backward."""
    if torch.compiler.is_compiling():
        return
    interpreter = torch._C._functorch.peek_interpreter_stack()
    transformed = interpreter is not None and interpreter.key() != torch._C._functorch.TransformType.Vmap
    in_forward_mode = forward_ad._current_level >= 0
    if transformed or (in_forward_mode and any(forward_ad.unpack_dual(t).tangent is not None for t in inputs)):
        raise NotImplementedError(
            f"{op}: differentiable by backward() and torch.autograd.grad only, got a transform of torch.func "
            "(grad, vjp, jacrev, jvp, jacfwd) or forward-mode differentiation"
        )
