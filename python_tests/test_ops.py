"""What every op owes: reference, fake, autograd, opcheck, errors alike in both (docs/method.md, property 8)."""

import pytest
import torch
from conftest import assert_close, needs_native, orthonormal, subspace

from janus_ext import ops, reference

DIFFERENTIABLE = {"lora_linear": ("x", "A", "B"), "lora_qkv": ("x", "A", "B"), "margin_loss": ("features",)}


def sample_inputs(op: str, device: str, dtype: torch.dtype = torch.float64) -> list[dict[str, object]]:
    """Keyword arguments of the raw op, several cases each; the one source of samples."""
    n, m, r, k = 12, 8, 3, 4
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(device, dtype)  # noqa: E731
    V = orthonormal(n, k, dtype, device)
    x = make(2, 5, n)
    gram = (make(30, n).mT @ make(30, n)).abs().fill_diagonal_(40)
    gram = (gram + gram.mT) / 2
    linear = {"x": x, "weight": make(m, n), "bias": make(m), "A": make(r, n), "B": make(m, r), "basis": V, "scale": 0.7}
    qkv = dict(linear, weight=make(3 * m, n), bias=None, A=make(2, r, n), B=make(2, m, r), targets=[1, 2])
    modes = [{"rectify": mode, "balance": mode == "exact"} for mode in reference.RECTIFY]
    safe = ops.project(make(r, n), V)
    backward = {
        "grad_y": make(2, 5, 3 * m), "x": x, "xA": make(2, 5, 2 * r), "effective": make(2, r, n),
        "weight": make(3 * m, n), "A": make(2, r, n), "B": make(2, m, r), "basis": V, "scale": 0.7, "damping": 0.1,
        "share": 0.5, "balance": True, "offsets": [m, 2 * m], "need_x": True,
    }  # fmt: skip
    return {
        "gram_update_": [{"gram": gram, "x": x, "decay": d} for d in (1.0, 0.5)],
        "extend_basis": [{"basis": V, "gram": gram, "energy": 0.9, "max_rank": 10, "energy_power": p} for p in (1, 2)],
        "isvd_update": [
            {"basis": V, "singular_values": make(k).abs(), "x": x, "decay": 0.5, "shrink": s} for s in (False, True)
        ],
        "extend_basis_factor": [
            {"basis": V, "U": orthonormal(n, 7, dtype, device), "S": torch.linspace(2, 0.5, 7).to(device, dtype),
             "total": torch.tensor(20.0, dtype=torch.float64, device=device), "energy": e, "max_rank": 10}
            for e in (0.2, 0.99)
        ],
        "lora_linear": [{**linear, **mode} for mode in modes] + [dict(linear, basis=None)],
        "lora_qkv": [{**qkv, **mode} for mode in modes],
        "lora_backward": [dict(backward, rectify=mode, need_x=mode != "none") for mode in reference.RECTIFY],
        "rectify_": [
            {"A": [safe], "B": [make(m, r)], "grad_A": [make(r, n)], "grad_B": [make(m, r)], "basis": [V],
             "scale": [0.7], "rectify": mode} for mode in ("none", "project", "exact")
        ],
        "margin_loss": [
            {"features": make(6, n), "prototypes": make(c, n), "margin": 0.2, "temperature": 16.0} for c in (5, 0)
        ],
    }[op]  # fmt: skip


def test_every_op_has_reference_fake_and_documentation() -> None:
    for op in ops.OPS:
        assert callable(getattr(reference, op))
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"janus_ext::{op}", "Meta")
        if op in ops.__all__:
            assert getattr(ops, op).__doc__


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.parametrize("op", ops.OPS)
def test_opcheck(device: str, op: str, grad: bool) -> None:
    for sample in sample_inputs(op, device):
        for name in DIFFERENTIABLE.get(op, ()) if grad else ():
            sample[name] = sample[name].clone().requires_grad_()
        torch.library.opcheck(getattr(torch.ops.janus_ext, op).default, (), sample)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("op", ops.OPS)
def test_compiled_agrees_with_reference(device: str, op: str, dtype: torch.dtype) -> None:
    for sample in sample_inputs(op, device, dtype):
        results = []
        for function in (getattr(torch.ops.janus_ext, op), getattr(reference, op)):
            arguments = {k: clone(v) for k, v in sample.items()}
            out = function(**arguments)
            results.append(flat(arguments if out is None else out))
        for got, want in zip(*results, strict=True):
            if op in ("extend_basis", "extend_basis_factor", "isvd_update") and got.dim() == 2:
                got, want = subspace(got), subspace(want)
            assert_close(got, want, dtype, 10)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [3, 8, 9])
def test_padded_ranks_are_the_same_everywhere(device: str, dtype: torch.dtype, r: int) -> None:
    """Compiled, reference and fake: also what the forward hands to the backward."""
    x, weight = torch.randn(2, 7, 24).to(device, dtype), torch.randn(60, 24).to(device, dtype)
    A, B = torch.randn(2, r, 24, device=device), torch.randn(2, 20, r, device=device)
    arguments = (x, weight, None, A, B, orthonormal(24, 5, torch.float32, device))
    torch.library.opcheck(torch.ops.janus_ext.lora_qkv.default, arguments)
    got, want = torch.ops.janus_ext.lora_qkv(*arguments), reference.lora_qkv(*arguments)
    for mine, other in zip(got, want, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        assert_close(mine, other, dtype)
    saved = (torch.randn_like(got[0]), x, *got[1:], weight, A, B, arguments[-1])
    options = {"scale": 1.0, "rectify": "exact", "damping": 0.1, "share": 0.5, "balance": True}
    where = {"offsets": [20, 40], "need_x": True}
    torch.library.opcheck(torch.ops.janus_ext.lora_backward.default, (*saved, *options.values(), *where.values()))
    got, want = (f(*saved, **options, **where) for f in (torch.ops.janus_ext.lora_backward, reference.lora_backward))
    for mine, other in zip(got, want, strict=True):
        assert mine.shape == other.shape
        assert_close(mine, other, dtype, 5)


@pytest.mark.cuda
@pytest.mark.parametrize("op", ops.OPS)
def test_waits_for_its_inputs_on_a_second_stream(op: str) -> None:
    """They are written late there: what ran on another stream would read zeros."""
    for sample in sample_inputs(op, "cuda", torch.float32):
        want_arguments = {k: clone(v) for k, v in sample.items()}
        want = getattr(torch.ops.janus_ext, op)(**want_arguments)
        late = {k: clone(v) for k, v in sample.items()}
        sources = [t.clone() for t in flat(late)]
        for t in flat(late):
            t.zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for t, source in zip(flat(late), sources, strict=True):
                t.copy_(source)
            got = getattr(torch.ops.janus_ext, op)(**late)
        stream.synchronize()
        pairs = zip(flat(late if got is None else got), flat(want_arguments if want is None else want), strict=True)
        for a, b in pairs:
            assert_close(a, b, torch.float32)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU at most")
@pytest.mark.parametrize("op", ops.OPS)
def test_runs_on_the_device_of_its_inputs(op: str) -> None:
    for sample in sample_inputs(op, "cuda:1", torch.float32):
        out = getattr(torch.ops.janus_ext, op)(**sample)
        assert all(t.device == torch.device("cuda:1") for t in flat(sample if out is None else out))


def clone(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return [clone(v) for v in value] if isinstance(value, list) else value


def flat(value: object) -> list[torch.Tensor]:
    """The tensors in a tensor, a sequence or a mapping."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for item in items for t in flat(item)]


FACTORS = torch.ones(5, 12, dtype=torch.float64)
BAD = [
    (
        "gram_update_",
        {"x": torch.zeros(3, dtype=torch.float64)},
        ValueError,
        r"x must be \[..., n\] with n = 12, got \[3\]",
    ),
    (
        "gram_update_",
        {"x": torch.zeros(2, 12, dtype=torch.int64)},
        TypeError,
        "x must be float32, float64, bfloat16, float16, got int64",
    ),
    ("gram_update_", {"gram": torch.zeros(3, 4)}, ValueError, r"gram must be \[n, n\] with n > 0, got \[3, 4\]"),
    ("gram_update_", {"gram": torch.zeros(12, 12).half()}, TypeError, "gram must be float32, float64, got float16"),
    ("gram_update_", {"gram": torch.zeros(0, 0)}, ValueError, r"gram must be \[n, n\] with n > 0, got \[0, 0\]"),
    (
        "gram_update_",
        {"gram": torch.zeros(1, 12, dtype=torch.float64).expand(12, 12)},
        ValueError,
        r"gram must hold every element once, got strides \[0, 1\] that overlap",
    ),
    (
        "gram_update_",
        {"gram": torch.zeros(200, dtype=torch.float64).as_strided((12, 12), (5, 1))},
        ValueError,
        r"gram must hold every element once, got strides \[5, 1\] that overlap",
    ),
    (
        "rectify_",
        {"A": [FACTORS[:3]], "grad_A": [FACTORS[2:]], "basis": [torch.zeros(12, 0, dtype=torch.float64)]},
        ValueError,
        r"A\[0\] and grad_A\[0\]|grad_A\[0\] and A\[0\] must not share memory",
    ),
    (
        "rectify_",
        {"grad_B": [torch.zeros(8, 1, dtype=torch.float64).expand(8, 3)]},
        ValueError,
        r"layer 0: grad_B must hold every element once, got strides \[1, 0\] that overlap",
    ),
    ("lora_backward", {"offsets": [8]}, ValueError, r"offsets must be 2 numbers from 0 to 16, got \[8\]"),
    ("lora_backward", {"offsets": [8, 17]}, ValueError, r"offsets must be 2 numbers from 0 to 16, got \[8, 17\]"),
    (
        "lora_backward",
        {"grad_y": torch.zeros(2, 5, 8, dtype=torch.float64)},
        ValueError,
        r"grad_y must be \[2, 5, 24\], got \[2, 5, 8\]",
    ),
    (
        "lora_backward",
        {"weight": torch.zeros(24, 7, dtype=torch.float64)},
        ValueError,
        r"weight must be \[m, 12\], got \[24, 7\]",
    ),
    ("gram_update_", {"gram": None}, TypeError, "gram must be float32, float64, got None"),
    (
        "gram_update_",
        {"gram": torch.eye(12, dtype=torch.float64).requires_grad_()},
        ValueError,
        r"gram is rewritten in place: it must not require a gradient, unless under torch.no_grad\(\)",
    ),
    ("extend_basis", {"basis": None}, TypeError, "basis must be float32, float64, got None"),
    ("isvd_update", {"basis": None}, TypeError, "basis must be float32, float64, got None"),
    ("lora_linear", {"x": None}, TypeError, "x must be float32, float64, bfloat16, float16, got None"),
    ("gram_update_", {"decay": 0.0}, ValueError, r"decay must be in \(0, 1\], got 0"),
    ("gram_update_", {"decay": float("nan")}, ValueError, "decay must be"),
    ("extend_basis", {"energy": 1.5}, ValueError, r"energy must be in \[0, 1\], got 1.5"),
    ("extend_basis", {"max_rank": 3}, ValueError, "max_rank must be from k = 4 to n = 12, got 3"),
    ("extend_basis", {"energy_power": 3}, ValueError, "energy_power must be 1 or 2, got 3"),
    (
        "extend_basis",
        {"basis": torch.zeros(3, 4)},
        ValueError,
        r"basis must be \[n, k\] with k <= n and n > 0, got \[3, 4\]",
    ),
    ("extend_basis", {"gram": torch.full((12, 12), float("nan"))}, ValueError, "gram must be finite"),
    ("extend_basis", {"gram": torch.zeros(12, 12)}, ValueError, "gram must have a positive trace, got 0"),
    (
        "isvd_update",
        {"x": torch.full((2, 12), float("inf"))},
        ValueError,
        "x and the state must be finite, got NaN or inf",
    ),
    ("isvd_update", {"decay": 2.0}, ValueError, r"decay must be in \(0, 1\], got 2"),
    ("isvd_update", {"basis": torch.zeros(3, 4)}, ValueError, r"basis must be \[n, l\] with 0 < l <= n, got \[3, 4\]"),
    ("isvd_update", {"singular_values": torch.zeros(4)}, TypeError, "singular_values must be float64, got float32"),
    ("isvd_update", {"x": torch.zeros(2, 7)}, ValueError, r"x must be \[..., n\] with n = 12, got \[2, 7\]"),
    ("extend_basis_factor", {"U": torch.zeros(9, 7)}, TypeError, "S must be float32, got float64"),
    (
        "extend_basis_factor",
        {"U": torch.zeros(9, 7, dtype=torch.float64)},
        ValueError,
        r"U must be \[n, l\] with n = 12, got \[9, 7\]",
    ),
    (
        "extend_basis",
        {"basis": torch.full((12, 4), float("nan"), dtype=torch.float64)},
        ValueError,
        "basis must be finite, got NaN or infinite entries",
    ),
    (
        "extend_basis_factor",
        {"basis": torch.full((12, 4), float("nan"), dtype=torch.float64)},
        ValueError,
        "basis must be finite, got NaN or infinite entries",
    ),
    ("extend_basis_factor", {"total": torch.tensor(1.0)}, TypeError, "total must be float64, got float32"),
    (
        "extend_basis_factor",
        {"total": torch.tensor(0.0, dtype=torch.float64)},
        ValueError,
        "total and the largest of S must be positive, got 0 and",
    ),
    (
        "extend_basis_factor",
        {"S": torch.full((7,), float("nan"), dtype=torch.float64)},
        ValueError,
        "U, S and total must be finite",
    ),
    ("extend_basis_factor", {"max_rank": 13}, ValueError, "max_rank must be from k = 4 to n = 12, got 13"),
    ("lora_linear", {"A": None}, TypeError, "A must be float32, float64, got None"),
    ("lora_linear", {"rectify": "a\nb"}, ValueError, r"rectify must be one of .*, got 'a\\nb'"),
    ("lora_linear", {"rectify": "all"}, ValueError, "rectify must be one of none, project, tangent, exact, got 'all'"),
    ("lora_linear", {"scale": 0.0}, ValueError, "scale must be finite and not zero in float32, got 0"),
    ("lora_linear", {"damping": -1.0}, ValueError, "damping must be positive and finite, got -1"),
    ("lora_linear", {"share": 2.0}, ValueError, r"share must be in \[0, 1\], got 2"),
    (
        "lora_linear",
        {"x": torch.zeros(2, 7, dtype=torch.float64)},
        ValueError,
        r"x must be \[..., n\] with n = 12, got \[2, 7\]",
    ),
    (
        "lora_linear",
        {"weight": torch.zeros(7, 12, dtype=torch.float64), "bias": None},
        ValueError,
        r"weight must be \[8, 12\], got \[7, 12\]",
    ),
    ("lora_linear", {"bias": torch.zeros(3, dtype=torch.float64)}, ValueError, r"bias must be \[8\], got \[3\]"),
    ("lora_linear", {"A": torch.zeros(3, 12).half()}, TypeError, "A must be float32, float64, got float16"),
    ("lora_linear", {"B": torch.zeros(8, 3)}, TypeError, "B must be float64, got float32"),
    (
        "lora_linear",
        {"B": torch.zeros(8, 2, dtype=torch.float64)},
        ValueError,
        r"B must be \[1, 8, 3\], got \[1, 8, 2\]",
    ),
    (
        "lora_linear",
        {"basis": torch.zeros(5, 2, dtype=torch.float64)},
        ValueError,
        r"basis must be \[n, k\] with n = 12",
    ),
    ("lora_qkv", {"targets": [1, 1]}, ValueError, r"targets must be distinct slices .* got \[1, 1\]"),
    ("lora_qkv", {"targets": [1, 5]}, ValueError, r"targets must be distinct slices .* got \[1, 5\]"),
    (
        "lora_qkv",
        {"weight": torch.zeros(8, 12, dtype=torch.float64)},
        ValueError,
        r"weight must be \[24, 12\], got \[8, 12\]",
    ),
    ("rectify_", {"B": []}, ValueError, r"must have equal lengths, got \[1, 0, 1, 1, 1, 1\]"),
    (
        "rectify_",
        {"grad_A": [torch.zeros(1, 1, dtype=torch.float64)]},
        ValueError,
        r"layer 0: grad_A must be \[3, 12\], got \[1, 1\]",
    ),
    (
        "rectify_",
        {"A": [torch.zeros(1, 3, 12, dtype=torch.float64)]},
        ValueError,
        r"layer 0: A and B must be \[r, n\] and \[m, r\], or .*, got \[1, 3, 12\] and \[8, 3\]",
    ),
    ("margin_loss", {"features": torch.zeros(3)}, ValueError, r"features must be \[N, d\], got \[3\]"),
    (
        "margin_loss",
        {"prototypes": torch.zeros(2, 5)},
        ValueError,
        r"prototypes must be \[C, d\] with d = 12, got \[2, 5\]",
    ),
    ("margin_loss", {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0"),
    ("margin_loss", {"margin": 1.5}, ValueError, r"margin must be a cosine in \[-1, 1\], got 1.5"),
]


@needs_native
@pytest.mark.parametrize(("op", "change", "kind", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_wrong_arguments_say_so_in_the_same_words(op: str, change: dict, kind: type, message: str) -> None:
    texts = []
    for function in (getattr(torch.ops.janus_ext, op), getattr(reference, op)):
        sample = {**sample_inputs(op, "cpu")[0], **change}
        before = [t.clone() for t in flat(sample)]
        with pytest.raises(kind, match=message) as caught:
            function(**sample)
        assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(flat(sample), before, strict=True))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert texts[0].startswith(op)


@pytest.mark.parametrize("kind", ["sparse", "meta"])
@pytest.mark.parametrize("op", ops.OPS)
def test_tensors_without_values_in_memory_are_refused(op: str, kind: str) -> None:
    """Not even by an op in place, which PyTorch would let do nothing where one argument is on meta."""
    sample = sample_inputs(op, "cpu")[0]
    name = [name for name, value in sample.items() if flat(value)][-1]
    spoil = torch.Tensor.to_sparse if kind == "sparse" else lambda tensor: tensor.to("meta")
    spoiled = [spoil(tensor) for tensor in flat(sample[name])]
    sample[name] = spoiled if isinstance(sample[name], list) else spoiled[0]
    wanted = "a dense tensor, got a sparse or packed one" if kind == "sparse" else "on cpu, got meta"
    with pytest.raises((TypeError, ValueError), match=f"^{op}: .*{name} must be {wanted}$"):
        getattr(torch.ops.janus_ext, op)(**sample)


@needs_native
@pytest.mark.parametrize("op", ops.OPS)
def test_compiled_kernels_are_registered(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"janus_ext::{op}", "CPU")


def test_unknown_target_name() -> None:
    sample = sample_inputs("lora_qkv", "cpu")[0]
    with pytest.raises(ValueError, match="targets must be of q, k, v, got 'z'"):
        ops.lora_qkv(**dict(sample, targets=("k", "z")))


def test_compiles_with_fullgraph() -> None:
    sample = sample_inputs("lora_qkv", "cpu", torch.float32)[3]
    sample["targets"] = ("k", "v")
    A = sample["A"].requires_grad_()

    def step(x: torch.Tensor) -> torch.Tensor:
        y = ops.lora_qkv(**dict(sample, x=x))
        return y.square().mean() + ops.margin_loss(y[0], torch.ones(3, y.shape[-1]), 0.1, 4.0)

    want = step(sample["x"])
    want.backward()
    plain, A.grad = A.grad, None
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(sample["x"])
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(A.grad, plain)
