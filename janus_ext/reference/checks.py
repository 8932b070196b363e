"""Checks of arguments. The texts equal those of csrc/checks.h: a test compares them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from janus_ext.rectification import Rectification, rectification_of

WORKING_DTYPES = (torch.float32, torch.float64)
INPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOO_MANY = 2**40  # elements of an expanded tensor; products of such sizes would overflow


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Of an allowed dtype, smaller than a memory, and dense: the compiled kernels get no other, none is registered."""
    found = None if tensor is None else tensor.dtype  # the dispatcher lets None pass for a tensor
    if found not in allowed:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} must be {wanted}, got {str(found).removeprefix('torch.')}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got a sparse or packed one")
    few = tensor.numel() < TOO_MANY
    require(few, f"{op}: {name} must have fewer than 2^40 elements, got {list(tensor.shape)}")


def require_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    require(list(tensor.shape) == list(shape), f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")


def require_device(op: str, like: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None:
            require(tensor.device == like.device, f"{op}: {name} must be on {like.device}, got {tensor.device}")


def require_last(op: str, name: str, tensor: Tensor, n: int) -> None:
    require(
        tensor.dim() >= 1 and tensor.shape[-1] == n,
        f"{op}: {name} must be [..., n] with n = {n}, got {list(tensor.shape)}",
    )


def require_writable(op: str, name: str, tensor: Tensor) -> None:
    """What is rewritten in place must hold each element once; expanded tensors and sliding windows do not."""
    recorded = tensor.requires_grad and torch.is_grad_enabled()
    require(
        not recorded,
        f"{op}: {name} is rewritten in place: it must not require a gradient, unless under torch.no_grad()",
    )
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            found = f"strides {list(tensor.stride())} that overlap"
            require(stride > reach, f"{op}: {name} must hold every element once, got {found}")
            reach += stride * (size - 1)


def require_apart(op: str, written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """What is rewritten in place must share no memory with other arguments, as far as these have no gaps.

    Tensors with gaps, such as columns of one matrix, may lie within each other without sharing an element.
    """
    spans = []
    for name, tensor in (*written.items(), *read.items()):
        steps = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        if 0 < tensor.numel() > steps:
            begin = tensor.data_ptr()
            spans.append((begin, begin + (steps + 1) * tensor.element_size(), name, name in written))
    last, last_written = (0, ""), (0, "")  # where the spans so far end, and the name of the one that does
    for begin, end, name, is_written in sorted(spans, key=lambda span: span[0]):
        other_end, other = last if is_written else last_written
        require(begin >= other_end, f"{op}: {name} and {other} must not share memory, got some of both at one place")
        last = max(last, (end, name), key=lambda found: found[0])
        last_written = max(last_written, (end, name), key=lambda found: found[0]) if is_written else last_written


def check_rectify(op: str, scale: float, rectify: str | Rectification, **options: Any) -> Rectification:
    """The options that `lora_linear`, `lora_qkv` and `rectify_` share, as one; without balance unless it is asked."""
    how = rectification_of(op, rectify, options, balance=False)
    check_scale(op, scale)
    return how


def check_scale(op: str, scale: float) -> float:
    """s of W + s B A, as a float."""
    wanted, float32 = "finite and not zero in float32", torch.finfo(torch.float32)  # what factors are kept in
    number = as_float(op, "scale", wanted, scale)
    require(float32.tiny <= abs(number) <= float32.max, f"{op}: scale must be {wanted}, got {number:g}")
    return number


def as_float(op: str, name: str, wanted: str, number: float) -> float:
    """A number as a float, where it was an integer: torch itself takes none beyond 2^63."""
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{op}: {name} must be {wanted}, got an integer that no float holds") from None


def check_factor(op: str, name_U: str, U: Tensor, name_S: str, S: Tensor) -> None:
    """U [n, l] and S [l] of an incremental SVD, alike: float32 or float64, on one device, 1 <= l <= n."""
    require_dtype(op, name_U, U, WORKING_DTYPES)
    require(
        U.dim() == 2 and 0 < U.shape[1] <= U.shape[0],
        f"{op}: {name_U} must be [n, l] with 0 < l <= n, got {list(U.shape)}",
    )
    require_dtype(op, name_S, S, (U.dtype,))
    require_shape(op, name_S, S, (U.shape[1],))
    require_device(op, U, **{name_S: S})


def check_factors(op: str, A: Tensor, B: Tensor, basis: Tensor | None) -> None:
    """A [g, r, n], B [g, m, r] and V [n, k]: float32 or float64, alike, on one device, k <= n."""
    require_dtype(op, "A", A, WORKING_DTYPES)
    require_dtype(op, "B", B, (A.dtype,))
    require(A.dim() == 3, f"{op}: A must be [r, n] for each target, got {A.dim() - 1} dimensions")
    require(B.dim() == 3, f"{op}: B must be [m, r] for each target, got {B.dim() - 1} dimensions")
    g, r, n = A.shape
    require(r > 0 and n > 0, f"{op}: A must be [r, n] with r > 0 and n > 0, got {list(A.shape[1:])}")
    require_shape(op, "B", B, (g, B.shape[1], r))
    if basis is not None:
        require_dtype(op, "basis", basis, (A.dtype,))
        require(
            basis.dim() == 2 and basis.shape[0] == n and basis.shape[1] <= n,
            f"{op}: basis must be [n, k] with n = {n} and k <= n, got {list(basis.shape)}",
        )
    require_device(op, A, B=B, basis=basis)
