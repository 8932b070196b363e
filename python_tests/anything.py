"""Values of any kind, of which a seed decides all: the kind, the sizes, the numbers, how they lie in memory."""

import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from janus_ext import ClassPrototypes, FeatureStatistics, OnlineEstimator

DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64),
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int32, torch.int64),
)
# The last is half of a pair. Of slashes there is none: what the texts name is to lie within the folder of the test.
LETTERS = "aAkvz089 .-_\\%{}'\"\n\0\x1b\u00e9\u2028\u4e2d\U0001f600\ud800"


# how a tensor lies in memory ------------------------------------------------------------------------------------------
def overlapping(tensor: Tensor) -> Tensor:
    """The tensor's shape over memory whose elements are read several times."""
    strides = [1] * tensor.dim()
    return torch.as_strided(tensor.flatten()[: max(1, sum(tensor.shape))].clone(), tensor.shape, strides)


def strided(tensor: Tensor) -> Tensor:
    """The same values, every other element of a larger memory."""
    if not tensor.dim():
        return tensor.new_full((3,), 7)[1].copy_(tensor)
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), 7)
    return wide[..., 1::2].copy_(tensor)


def turned(tensor: Tensor) -> Tensor:
    """The same values, laid out by columns."""
    return tensor.mT.contiguous().mT if tensor.dim() >= 2 else strided(tensor)


def padded(tensor: Tensor) -> Tensor:
    """The same values in the middle of a memory, at an odd place."""
    return tensor.new_full((tensor.numel() + 5,), 7)[3 : 3 + tensor.numel()].view(tensor.shape).copy_(tensor)


LAID_OUT = (strided, turned, padded, overlapping)


# values of any kind ---------------------------------------------------------------------------------------------------
def anything(seed: int) -> Any:
    """A value of any kind."""
    return _anything(random.Random(seed))


def altered(value: Any, seed: int) -> Any:
    """A value that is like this one: a tensor of other numbers, a number near it, a name with another letter."""
    r = random.Random(seed)
    if isinstance(value, Tensor):
        return _like(r, value)
    if isinstance(value, str):
        return _misspelt(r, value)
    if isinstance(value, (int, float)) and r.random() < 0.5:
        return type(value)(value * r.choice((-1, 1, 2, 1.5)) + r.choice((-1, 0, 1, 1e-9)))
    if isinstance(value, Mapping) and value:
        name = r.choice(sorted(value))
        return {**value, name: altered(value[name], r.getrandbits(60))}
    if isinstance(value, (list, tuple)) and value:
        return _other_items(r, list(value))
    return _anything(r)


def _anything(r: random.Random, depth: int = 0) -> Any:
    if depth < 2 and r.random() < 0.2:
        items = [_anything(r, depth + 1) for _ in range(r.randrange(5))]
        return r.choice((list, tuple, lambda made: {_text(r): item for item in made}))(items)
    return r.choice(KINDS)(r)


def _integer(r: random.Random) -> int:
    """Small or beyond what any machine has: of sizes between, the memory would be asked for."""
    return r.choice((-1, 1)) * r.choice((r.randrange(100), 2**40 + r.getrandbits(62), 10 ** r.randrange(13, 400)))


def _float(r: random.Random) -> float:
    return r.choice((r.uniform(-2, 2), r.choice((-1, 1)) * 10 ** r.uniform(-320, 308)))


def _number(r: random.Random) -> Any:
    """One of the types that are numbers, too."""
    kinds = (np.float32, np.float64, np.float16, Fraction, complex, lambda x: np.int64(x), lambda x: np.uint8(abs(x)))
    return r.choice(kinds)(r.uniform(-100, 100))


def _text(r: random.Random) -> str:
    return "".join(r.choices(LETTERS, k=r.randrange(r.choice((4, 40)))))


def _misspelt(r: random.Random, text: str) -> str:
    place = r.randrange(len(text) + 1)
    return text[:place] + r.choice(("", *LETTERS)) + text[place + r.randrange(2) :]


def _tensor(r: random.Random) -> Tensor:
    return _laid_out(r, _numbers(r, [_size(r) for _ in range(r.randrange(5))], r.choice(DTYPES)))


def _like(r: random.Random, tensor: Tensor) -> Tensor:
    """Other numbers; shape and dtype are now and then another one."""
    shape = list(tensor.shape)
    if shape and r.random() < 0.3:
        shape[r.randrange(len(shape))] = _size(r)
    return _laid_out(r, _numbers(r, shape, tensor.dtype if r.random() < 0.7 else r.choice(DTYPES)))


def _size(r: random.Random) -> int:
    return r.choice((r.randrange(6), 12))


def _numbers(r: random.Random, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Normal ones of any order of magnitude, now and then with one among them that is none."""
    size = 10.0 ** r.choice((0, 0, r.randint(-9, 9), r.randint(-45, 38)))
    made = torch.randn(shape, generator=torch.Generator().manual_seed(r.getrandbits(60)), dtype=torch.float64) * size
    if not (dtype.is_floating_point or dtype.is_complex):
        return made.clamp(-4 if dtype.is_signed else 0, 9).to(dtype)
    if made.numel() and r.random() < 0.2:
        made.view(-1)[r.randrange(made.numel())] = r.choice((float("nan"), float("inf"), -float("inf"), 0.0))
    return made.to(dtype)


def _laid_out(r: random.Random, tensor: Tensor) -> Tensor:
    return r.choice((lambda t: t, *LAID_OUT))(tensor)


def _array(r: random.Random) -> np.ndarray:
    kinds = (np.float32, np.float64, np.int64, np.bool_, np.complex128, np.str_)
    return (100 * np.random.default_rng(r.getrandbits(60)).standard_normal([_size(r)] * r.randrange(3))).astype(
        r.choice(kinds)
    )


def _other_items(r: random.Random, items: list[Any]) -> Any:
    """The same items in another order, some of them twice or left out, or one of them altered."""
    if r.random() < 0.5:
        return r.choices(items, k=r.randrange(2 * len(items) + 1))
    place = r.randrange(len(items))
    items[place] = altered(items[place], r.getrandbits(60))
    return items


def _module(r: random.Random) -> nn.Module:
    n, m = r.choice((1, 5, 12)), r.choice((1, 5, 8, 24))
    dtype = r.choice((torch.float16, torch.float32, torch.float64))
    return r.choice(
        (
            lambda: nn.Linear(n, m, bias=r.random() < 0.5, dtype=dtype),
            lambda: nn.Sequential(nn.Linear(n, m), nn.ReLU(), nn.Linear(m, n)),
            lambda: nn.Conv2d(n, m, 1),
            lambda: nn.LayerNorm(n),
            lambda: nn.Bilinear(n, n, m),
        )
    )()


def _accumulator(r: random.Random) -> Any:
    """One of ours, of another width or kind."""
    dim = r.choice((1, 5, 12))
    made: Callable[[], Any] = r.choice(
        (
            lambda: OnlineEstimator(dim),
            lambda: OnlineEstimator(dim, "isvd", r.randint(1, dim)),
            lambda: FeatureStatistics(dim),
            lambda: ClassPrototypes(dim),
        )
    )
    return made()


KINDS = (
    *(_integer, _float, _number, _text, _tensor, _array, _module, _accumulator),
    lambda r: r.randbytes(r.randrange(9)),
    lambda r: range(r.randrange(9)),
    lambda r: torch.optim.SGD(_module(r).parameters(), abs(_float(r))),
)
