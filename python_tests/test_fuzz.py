"""2,000 wrong calls of the ops, drawn at random: a Python exception each, never a crash, inputs as they were."""

import random

import pytest
import torch
from test_ops import clone, flat, sample_inputs

from janus_ext import ops

CALLS = 2000


def spoil(value: object, rng: random.Random) -> object:
    """One argument made wrong (or, now and then, still right): what `value` is decides how."""
    if isinstance(value, torch.Tensor):
        return rng.choice(TENSOR_FAULTS)(value)
    if isinstance(value, list):
        return rng.choice([[], value + value, [spoil(v, rng) for v in value], None])
    if isinstance(value, bool):
        return rng.choice([None, "yes", 2.5])
    if isinstance(value, str):
        return rng.choice(["", "Exact", "exact\0", 3, None])
    return rng.choice([-1, 0, 2**40, -(2**62), 1e308, float("nan"), float("inf"), None, "1", 0.5])


TENSOR_FAULTS = (
    lambda t: t.to(torch.int64),
    lambda t: t.to(torch.complex128),
    lambda t: t.half(),
    lambda t: t.float(),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse() if t.dim() else t.bool(),
    lambda t: t.flatten(),
    lambda t: t[None, None],
    lambda t: t.new_zeros(0),
    lambda t: t[..., :0] if t.dim() else t[None],
    lambda t: t[..., ::2] if t.dim() else t.int(),
    lambda t: t.mT if t.dim() >= 2 else t.expand(3, *t.shape),
    lambda t: t.new_zeros(1).expand(t.shape) if t.dim() else t.half(),
    lambda t: t.new_zeros(1).expand(*t.shape[:-1], 2**40) if t.dim() else t.half(),
    lambda t: t * float("nan"),
    lambda t: torch.zeros(3, 7, 5, 2, dtype=t.dtype),
    lambda t: None,
    lambda t: "tensor",
)


@pytest.mark.parametrize("op", ops.OPS)
def test_wrong_calls_raise_and_change_nothing(op: str) -> None:
    rng = random.Random(op)
    wanted, refused = -(-CALLS // len(ops.OPS)), 0
    for _ in range(3 * wanted):
        if refused == wanted:
            return
        sample = {name: clone(value) for name, value in rng.choice(sample_inputs(op, "cpu")).items()}
        for name in rng.sample(sorted(sample), rng.choice([1, 1, 2])):
            sample[name] = spoil(sample[name], rng)
        before = [t.clone() for t in _strided(sample)]
        try:
            getattr(torch.ops.janus_ext, op)(**sample)  # some are right by chance: those must not crash
        except (ValueError, TypeError, RuntimeError):  # the last by the dispatcher: schema, layout, device
            refused += 1
            after = _strided(sample)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, before, strict=True))
    pytest.fail(f"of {3 * wanted} spoiled calls only {refused} were refused")


def _strided(sample: dict[str, object]) -> list[torch.Tensor]:
    """The tensors that hold their elements one by one."""
    tensors = (t for t in flat(sample) if t.layout == torch.strided and t.device.type == "cpu")
    return [t for t in tensors if t.numel() < 2**20]
