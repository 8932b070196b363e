"""Arguments made strange, for hypothesis: values that are wrong, and right ones in memory of any kind."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from anything import LAID_OUT, altered, anything
from hypothesis import strategies as st
from torch import Tensor

HUGE = 2**40  # of what no machine has: the memory is refused, and never touched


class Another:
    """An object of a type that nobody expects."""


INFINITE = (float("nan"), float("inf"), -float("inf"))
NUMBERS = (-1, 0, 2, 0.5, HUGE, -(2**62), 2**70, 10**400, 1e308, -0.0, *INFINITE, 3 + 4j)
TEXTS = ("", "8", "exact", "Exact", "gram", "none", "exact\0", "k", "nowhere", "x" * 300, "a\nb")
OTHERS = (
    lambda: None,
    lambda: True,
    lambda: [],
    lambda: {},
    lambda: (1, 2),
    lambda: ["k", "k"],
    lambda: [None],
    lambda: b"8",
    lambda: np.ones((2, 3)),
    lambda: np.float64(0.5),
    lambda: np.int64(-3),
    lambda: torch.ones(2, 3),
    lambda: torch.tensor(-1.0),
    lambda: torch.float16,
    lambda: torch.nn.Identity(),
    lambda: Another(),
    lambda: Another,
    lambda: print,
)
WRONG = (*((lambda v=v: v) for v in (*NUMBERS, *TEXTS)), *OTHERS)


OF_TENSORS = (
    *LAID_OUT,
    lambda t: t.to(torch.int64),
    lambda t: t.to(torch.complex128),
    lambda t: t.half(),
    lambda t: t.bfloat16(),
    lambda t: t.float(),
    lambda t: t.double(),
    lambda t: t.bool(),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse() if t.dim() else t.bool(),
    lambda t: t.flatten(),
    lambda t: t[None, None],
    lambda t: t.new_zeros(0),
    lambda t: t[..., :0] if t.dim() else t[None],
    lambda t: t[:1] if t.dim() else t[None],
    lambda t: t[..., ::2] if t.dim() else t.int(),
    lambda t: t.mT if t.dim() >= 2 else t.expand(3, *t.shape),
    lambda t: t.new_zeros(1).expand(t.shape) if t.dim() else t.half(),
    lambda t: t.new_zeros(1).expand(*t.shape[:-1], HUGE) if t.dim() else t.half(),
    lambda t: t.new_zeros(1).expand(2**31, 2**31),
    lambda t: t * float("nan"),
    lambda t: t / 0,
    lambda t: t * 0,
    lambda t: t * 1e30,
    lambda t: torch.zeros(3, 7, 5, 2, dtype=t.dtype),
    lambda t: torch.nn.Parameter(t) if t.is_floating_point() else -t - 1,
    lambda t: t.cpu().numpy() if not t.dtype.itemsize == 2 else None,
)


SEEDS = st.integers(0, 2**63)


@st.composite
def strange(draw: st.DrawFn, value: Any) -> Any:
    """One argument made strange; what the right `value` is decides how, and now and then it stays right."""
    if isinstance(value, Tensor) and draw(st.integers(0, 4)):
        return draw(st.sampled_from(OF_TENSORS))(value.detach())
    if draw(st.booleans()):
        return draw(SEEDS.map(lambda seed: altered(value, seed)))
    if isinstance(value, Mapping) and value and draw(st.integers(0, 3)):
        name = draw(st.sampled_from(sorted(value)))
        rest = {key: item for key, item in value.items() if key != name}
        return draw(st.sampled_from((rest, {**value, "other": 3}))) if draw(st.booleans()) else {
            **value, name: draw(strange(value[name]))
        }  # fmt: skip
    if isinstance(value, Sequence) and not isinstance(value, str) and value and draw(st.integers(0, 3)):
        index = draw(st.integers(0, len(value)))
        items = [draw(strange(item)) if i == index else item for i, item in enumerate(value)]
        return type(value)(items) if index < len(value) and type(value) in (list, tuple) else [*value, value[0]]
    return draw(st.sampled_from(WRONG))() if draw(st.booleans()) else draw(SEEDS.map(anything))


@st.composite
def calls(draw: st.DrawFn, sample: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A right call's arguments with one or two of them made strange, and the names of these."""
    names = draw(st.lists(st.sampled_from(sorted(sample)), min_size=1, max_size=2, unique=True))
    return {**sample, **{name: draw(strange(sample[name])) for name in names}}, tuple(names)


# what was there before, and after -------------------------------------------------------------------------------------
def flat(value: Any) -> list[Tensor]:
    """The tensors in a value, one after another: those of its items, and of an object's attributes."""
    return list(_tensors(value, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    ours = type(value).__module__.startswith("janus_ext.")
    if id(value) in seen or not (ours or isinstance(value, (Mapping, list, tuple, torch.nn.Module))):
        return
    seen.add(id(value))
    if isinstance(value, torch.nn.Module):
        yield from (*value.parameters(), *value.buffers())
    if not isinstance(value, (list, tuple)):
        value = list(value.values() if isinstance(value, Mapping) else vars(value).values() if ours else ())
    for item in value:
        yield from _tensors(item, seen)


def stored(value: Any) -> list[Tensor]:
    """The memory behind the tensors in a value, as bytes, also what lies around their views."""
    return [_bytes(tensor) for tensor in readable(value)]


def readable(value: Any) -> list[Tensor]:
    """The tensors in a value whose memory can be looked at."""
    return [t.detach() for t in flat(value) if t.layout == torch.strided and not t.is_meta]


def picture(value: Any) -> Any:
    """All that a value holds, to be compared with what it holds later: bytes, numbers, names, lengths and orders.

    Of objects that are neither tensors, arrays, modules, containers nor ours it is only which ones they are.
    """
    return _picture(value, set(), True)


def _picture(value: Any, seen: set[int], modes: bool) -> Any:
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, np.ndarray):
        return ("array", value.dtype.str, value.shape, value.strides, value.tobytes())
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, range)):
        return (type(value), repr(value) if isinstance(value, (float, complex)) else value)
    ours = type(value).__module__.startswith("janus_ext.")
    if id(value) in seen or not (ours or isinstance(value, (Mapping, list, tuple, torch.nn.Module))):
        return (type(value), id(value))
    seen.add(id(value))
    modes = modes and not ours  # of a network within an object of ours each use sets the mode that it needs
    if isinstance(value, (list, tuple)):
        return (type(value), *(_picture(item, seen, modes) for item in value))
    items = dict(value) if isinstance(value, Mapping) else {}
    if isinstance(value, torch.nn.Module):
        items |= {"training": value.training, **dict(value.named_parameters()), **dict(value.named_buffers())}
    if ours:
        items |= vars(value)
    if not modes:
        items.pop("training", None)
    return (type(value), *((name, _picture(item, seen, modes)) for name, item in items.items()))


def _of_tensor(tensor: Tensor) -> Any:
    about = ("tensor", tensor.dtype, tuple(tensor.shape), tensor.requires_grad, str(tensor.layout), tensor.is_meta)
    if tensor.layout != torch.strided or tensor.is_meta:
        return about
    return (*about, tensor.stride(), tensor.storage_offset(), bytes(_bytes(tensor.detach()).cpu().numpy()))


def difference(before: Any, after: Any) -> str:
    """The first place where two pictures differ, in words; "" where they do not."""
    if before == after:
        return ""
    if not isinstance(before, tuple) or not isinstance(after, tuple) or len(before) != len(after):
        return f"{before!r:.200} has become {after!r:.200}"
    return next(found for one, other in zip(before, after, strict=True) if (found := difference(one, other)))


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def plain(value: Any) -> Any:
    """The same values in memory of their own, element after element; what has none, or no room, as it is."""
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.numel() >= HUGE):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
