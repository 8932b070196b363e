"""The op book: one page per operator - schema, reference kernel, fake, autograd, documented function.

The schemas live here, with `janus_ext.reference` as the default kernel of every op; the compiled library registers CPU
and CUDA kernels over it. So every op, its fake and its gradient exist with or without a compiler. The raw ops are
``torch.ops.janus_ext.<name>``; the functions below are what users call. Wrong arguments raise ``ValueError`` or
``TypeError`` and leave every input as it was. Under autocast x, weight and bias take the autocast dtype, and so do A_s
and B inside the two products with x; A, B, V, the projection and all r x r work stay as they are (float32 or float64).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from janus_ext import _native, reference
from janus_ext.reference import DAMPING, RECTIFY, SHARE, WORKING_DTYPES, check_rectify, is_empty, project

__all__ = [
    "DAMPING",
    "OPS",
    "RECTIFY",
    "SHARE",
    "TARGETS",
    "WORKING_DTYPES",
    "autocast",
    "check_differentiation",
    "check_rectify",
    "extend_basis",
    "extend_basis_factor",
    "gram_update_",
    "is_empty",
    "isvd_update",
    "lora_linear",
    "lora_qkv",
    "margin_loss",
    "project",
    "rectify_",
]

TARGETS = ("q", "k", "v")  # slices of a fused qkv projection, in this order
_OPTIONS = (
    f'float scale=1.0, str rectify="exact", float damping={DAMPING}, float share={SHARE}, bool balance=False, '
    "bool defer=False"
)
_SCHEMAS = (
    "gram_update_(Tensor(a!) gram, Tensor x, float decay=1.0) -> ()",
    "isvd_update(Tensor basis, Tensor singular_values, Tensor x, float decay=1.0, bool shrink=False) "
    "-> (Tensor, Tensor)",
    "extend_basis(Tensor basis, Tensor gram, float energy, int max_rank, int energy_power=1) -> Tensor",
    "extend_basis_factor(Tensor basis, Tensor U, Tensor S, Tensor total, float energy, int max_rank) -> Tensor",
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor? basis=None, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    "lora_qkv(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor? basis=None, "
    f"{_OPTIONS}, int[] targets=[1, 2]) -> (Tensor, Tensor, Tensor)",
    "lora_backward(Tensor grad_y, Tensor x, Tensor xA, Tensor effective, Tensor weight, Tensor A, Tensor B, "
    "Tensor? basis, float scale, str rectify, float damping, float share, bool balance, int[] offsets, "
    "bool need_x) -> (Tensor, Tensor, Tensor)",
    "rectify_(Tensor[] A, Tensor[] B, Tensor(a!)[] grad_A, Tensor(b!)[] grad_B, Tensor[] basis, float[] scale, "
    f'str rectify="exact", float damping={DAMPING}, float share={SHARE}, bool balance=False) -> ()',
    "margin_loss(Tensor features, Tensor prototypes, float margin, float temperature) -> (Tensor, Tensor)",
)
OPS = tuple(schema.partition("(")[0] for schema in _SCHEMAS)

_library = torch.library.Library("janus_ext", "DEF")


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


with _native.loading():
    for _schema in _SCHEMAS:
        _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)
for _name in OPS:
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    for _device in ("cpu", "cuda"):
        _inputs = 3 if _name in ("lora_linear", "lora_qkv") else 0
        _op = getattr(torch.ops.janus_ext, _name).default
        _library.impl(_name, _autocast_kernel(_op, _inputs, _device), f"Autocast{_device.upper()}")


# --------------------------------------------------------------------------------------------------------- gram_update_


def gram_update_(gram: Tensor, x: Tensor, decay: float = 1.0) -> Tensor:
    """gram <- decay * gram + x^T x, in place; symmetric in, bit-symmetric out (Online Estimation).

    Args:
        gram: [n, n], float32 or float64, symmetric (only its sum with the update is formed, symmetry is not checked).
        x: [..., n], float64, float32, bfloat16 or float16; products accumulate in gram's dtype. float32
            products follow torch's matmul precision setting; bfloat16 products may flush denormals to zero.
        decay: in (0, 1]; 1 keeps every observation at full weight.

    Returns:
        gram itself.
    """
    with torch.no_grad():
        torch.ops.janus_ext.gram_update_(gram, x, decay)
    return gram


@torch.library.register_fake("janus_ext::gram_update_", lib=_library)
def _(gram: Tensor, x: Tensor, decay: float = 1.0) -> None:
    return None


# ---------------------------------------------------------------------------------------------------------- isvd_update


def isvd_update(
    basis: Tensor, singular_values: Tensor, x: Tensor, decay: float = 1.0, shrink: bool = False
) -> tuple[Tensor, Tensor]:
    """Incremental SVD of all rows seen: memory n x l where `gram_update_` takes n x n (Online Estimation).

    Rows X are taken in blocks of l; of [diag(S) U^T; X] the l leading right singular vectors and values are kept. Exact
    as long as all rows seen have rank l or less, else what is dropped is lost.

    Args:
        basis: U, [n, l], float32 or float64, orthonormal columns (zero columns where the singular value is 0); l <= n.
        singular_values: S, [l], U's dtype, not negative; all zero at the start.
        x: [..., n], float64, float32, bfloat16 or float16; finite.
        decay: in (0, 1], of what was seen before, in its Gram matrix: S is multiplied by its square root.
        shrink: subtract the smallest of the l squared values from each of them, so that l - 1 directions remain
            (Frequent Directions, Liberty 2013; with
            decay 1, M all rows and M_j its best rank-j approximation, for every unit v and every j < l:
            0 <= |M v|^2 - |diag(S) U^T v|^2 <= |M - M_j|_F^2 / (l - j)).

    Returns:
        New U [n, l], orthonormal, and S [l], descending.
    """
    with torch.no_grad():
        return torch.ops.janus_ext.isvd_update(basis, singular_values, x, decay, shrink)


@torch.library.register_fake("janus_ext::isvd_update", lib=_library)
def _(
    basis: Tensor, singular_values: Tensor, x: Tensor, decay: float = 1.0, shrink: bool = False
) -> tuple[Tensor, Tensor]:
    return basis.new_empty(basis.shape), singular_values.new_empty(singular_values.shape)


# ------------------------------------------------------------------------------------ extend_basis, extend_basis_factor


def extend_basis(basis: Tensor, gram: Tensor, energy: float, max_rank: int, energy_power: int = 1) -> Tensor:
    """Grow an orthonormal basis by the fewest directions that capture `energy` of a Gram matrix (GPM).

    With C the Gram matrix, p the power and V the basis, as in Saha et al. 2021: the leading eigenvectors of P C^p P are
    appended until tr(V^T C^p V) >= energy * tr(C^p); directions below n * eps * (largest eigenvalue) never count.

    Args:
        basis: [n, k], float32 or float64, orthonormal; k = 0 starts from nothing.
        gram: [n, n], float32 or float64, symmetric positive semidefinite, finite, not zero.
        energy: share to capture, in [0, 1].
        max_rank: the basis never exceeds this many columns, k <= max_rank <= n.
        energy_power: 1 (energy as GPM defines it) or 2 (squared eigenvalues, as InfLoRA's code thresholds).

    Returns:
        [n, k'], k <= k' <= max_rank, basis's dtype: the old columns as they are, then new ones; computed in float64.
    """
    with torch.no_grad():
        return torch.ops.janus_ext.extend_basis(basis, gram, energy, max_rank, energy_power)


@torch.library.register_fake("janus_ext::extend_basis", lib=_library)
def _(basis: Tensor, gram: Tensor, energy: float, max_rank: int, energy_power: int = 1) -> Tensor:
    return basis.new_empty(basis.shape[0], torch.library.get_ctx().new_dynamic_size())


def extend_basis_factor(
    basis: Tensor, U: Tensor, S: Tensor, total: float | Tensor, energy: float, max_rank: int
) -> Tensor:
    """`extend_basis` from an incremental SVD, C = U diag(S^2) U^T; no n x n matrix is formed.

    Directions whose singular value is below n * eps or 1.5e-8 sqrt(n) times the largest of S never count. A sketch has
    lost energy: where it cannot reach the share of `total` that is asked for, all it holds is taken.

    Args:
        basis: [n, k], float32 or float64, orthonormal; k = 0 starts from nothing.
        U, S: [n, l] and [l] as `isvd_update` returns them, float32 or float64, finite, not all zero.
        total: sum |x|^2 of all rows seen (decayed as they were), a positive number or a float64 scalar tensor.
        energy, max_rank: as in `extend_basis`.

    Returns:
        As `extend_basis`.
    """
    if not isinstance(total, Tensor):
        total = torch.tensor(float(total), dtype=torch.float64, device=basis.device)
    with torch.no_grad():
        return torch.ops.janus_ext.extend_basis_factor(basis, U, S, total, energy, max_rank)


@torch.library.register_fake("janus_ext::extend_basis_factor", lib=_library)
def _(basis: Tensor, U: Tensor, S: Tensor, total: Tensor, energy: float, max_rank: int) -> Tensor:
    return basis.new_empty(basis.shape[0], torch.library.get_ctx().new_dynamic_size())


# ------------------------------------------------------------------------------------------------ lora_linear, lora_qkv


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    basis: Tensor | None = None,
    scale: float = 1.0,
    rectify: str = "exact",
    damping: float = DAMPING,
    share: float = SHARE,
    balance: bool = False,
    defer: bool = False,
) -> Tensor:
    """y = x W^T + b + s (x A_s^T) B^T, whose backward returns rectified gradients of A and B (Gradient Rectification).

    A_s = A P with P = I - V V^T for "exact" (so W + s B A_s acts on span(V) as W does, whatever A and B become), and A
    itself otherwise. Differentiable once, in x, A and B; weight and bias are frozen.

    Args:
        x: [..., n], float64, float32, bfloat16 or float16.
        weight, bias: [m, n] and [m] or None, x's dtype, frozen.
        A, B: [r, n] and [m, r], float32 or float64.
        basis: V, [n, k] orthonormal, A's dtype, or None; k = 0 and None protect nothing.
        scale: s, not zero.
        rectify: "none" (plain gradients), "project" (g_A P; LoRA-GPM), "tangent" (the paper's closest reachable
            update), "exact" (this project's: the same with A V = 0 built into the forward pass).
        damping: of B^T B and A A^T, relative to their mean eigenvalue; below 4 r eps it counts as 4 r eps.
        share: in [0, 1]; Z = -(share / s) B^+ G_safe A^+: 0 leaves the common part to A, 1 to B, 0.5 splits it evenly.
        balance: multiply dA by s^2 tr(B^T B) / r and dB by s^2 tr(A A^T) / r, the scale of the plain gradients.
        defer: return plain gradients of A_s and B, for one `rectify_` of all layers before the optimizer's step.

    Returns:
        [..., m], x's dtype.
    """
    check_differentiation("lora_linear", x, weight, bias, A, B)
    options = (scale, rectify, damping, share, balance, defer)
    return torch.ops.janus_ext.lora_linear(x, weight, bias, A, B, basis, *options)[0]


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    basis: Tensor | None = None,
    scale: float = 1.0,
    rectify: str = "exact",
    damping: float = DAMPING,
    share: float = SHARE,
    balance: bool = False,
    defer: bool = False,
    targets: Sequence[str] = ("k", "v"),
) -> Tensor:
    """`lora_linear` on slices of a fused qkv projection: one product x A^T for all targets, added into the slices of y.

    Args:
        x: [..., n].
        weight, bias: [3 m, n] and [3 m] or None: q, k and v on top of each other, as timm's ViT stores them.
        A, B: [g, r, n] and [g, m, r], one for each of the g targets.
        targets: distinct names of "q", "k", "v".
        basis, scale, rectify, damping, share, balance, defer: as in `lora_linear`; one V, since the targets share x.

    Returns:
        [..., 3 m], x's dtype.
    """
    check_differentiation("lora_qkv", x, weight, bias, A, B)
    unknown = [t for t in targets if t not in TARGETS]
    if unknown:
        raise ValueError(f"lora_qkv: targets must be of q, k, v, got {', '.join(map(repr, unknown))}")
    options = (scale, rectify, damping, share, balance, defer, [TARGETS.index(t) for t in targets])
    return torch.ops.janus_ext.lora_qkv(x, weight, bias, A, B, basis, *options)[0]


def check_differentiation(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> None:
    """Raises what `lora_linear` and `lora_qkv` cannot differentiate: for callers of the raw ops."""
    _require_reverse_mode(op, x, A, B)
    _require_frozen(op, weight, bias)


def _require_reverse_mode(op: str, *inputs: Tensor) -> None:
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


def _require_frozen(op: str, weight: Tensor, bias: Tensor | None) -> None:
    trainable = [n for n, t in (("weight", weight), ("bias", bias)) if t is not None and t.requires_grad]
    if trainable and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {' and '.join(trainable)} must be frozen (requires_grad=False), got requires_grad=True"
        )


def _fake_forward(x: Tensor, weight: Tensor, A: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    r, n = A.shape[-2:]
    return (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        x.new_empty(*x.shape[:-1], groups * r),
        A.new_empty(groups, r, n),
    )


@torch.library.register_fake("janus_ext::lora_linear", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(x, weight, A, 1)


@torch.library.register_fake("janus_ext::lora_qkv", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(x, weight, A, A.shape[0])


@torch.library.register_fake("janus_ext::lora_backward", lib=_library)
def _(
    grad_y: Tensor, x: Tensor, xA: Tensor, effective: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_x = rest[-1]
    return x.new_empty(x.shape if need_x else (0,)), A.new_empty(A.shape), B.new_empty(B.shape)


def _setup_lora(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, A, B, basis, *options = inputs
    _, xA, effective = output
    ctx.mark_non_differentiable(xA, effective)
    ctx.save_for_backward(x, xA, effective, weight, A, B, basis)
    ctx.options = options


@once_differentiable
def _backward_lora(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
    x, xA, effective, weight, A, B, basis = ctx.saved_tensors
    scale, rectify, damping, share, balance, defer, *targets = ctx.options
    options = (scale, "none" if defer else rectify, damping, share, balance)
    offsets = [t * B.shape[-2] for t in targets[0]] if targets else [0]
    need_x = ctx.needs_input_grad[0]
    grouped = [t if t.dim() == 3 else t[None] for t in (A, B)]
    saved = (x, xA, effective, weight, *grouped, basis)
    grad_x, grad_A, grad_B = torch.ops.janus_ext.lora_backward(grad_y, *saved, *options, offsets, need_x)
    none = (None,) * (1 + len(ctx.options))
    return grad_x if need_x else None, None, None, grad_A.view_as(A), grad_B.view_as(B), *none


for _name in ("lora_linear", "lora_qkv"):
    torch.library.register_autograd(f"janus_ext::{_name}", _backward_lora, setup_context=_setup_lora, lib=_library)


# ------------------------------------------------------------------------------------------------------------- rectify_


def rectify_(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    basis: Sequence[Tensor | None],
    scale: float | Sequence[float] = 1.0,
    rectify: str = "exact",
    damping: float = DAMPING,
    share: float = SHARE,
    balance: bool = False,
) -> None:
    """Rectify the factor gradients of all layers in place, in one call before the optimizer's step.

    The gradients that `lora_linear` and `lora_qkv` return in their backward, from plain ones: g_A = s B^T G and
    g_B = s G A^T. Linear in the gradients for fixed A, B, V: accumulation, averaging and loss scaling commute with it.

    Args:
        A, B: lists, one entry a layer, [r, n] and [m, r] ([g, r, n] and [g, m, r] for layers with several targets).
        grad_A, grad_B: lists of the same shapes, float32 or float64 like A; rewritten.
        basis: list of V [n, k]; None or k = 0 protects nothing.
        scale: a number, or one a layer.
        rectify: as in `lora_linear`. "exact" presumes A V = 0 (checked: |A V| <= 1e-3 |A|); "tangent" with a basis
            raises, since factor gradients do not hold G V: use it in the backward. On a GPU the check of A V = 0 costs
            no wait, and so cannot raise: where it fails, the kernel prints the layer and ends the process's use of it.
        damping, share, balance: as in `lora_linear`.
    """
    scales = [float(scale)] * len(A) if isinstance(scale, (int, float)) else [float(s) for s in scale]
    bases = [a.new_empty(a.shape[-1], 0) if v is None else v for a, v in zip(A, basis, strict=True)]
    with torch.no_grad():
        torch.ops.janus_ext.rectify_(
            list(A), list(B), list(grad_A), list(grad_B), bases, scales, rectify, damping, share, balance
        )


@torch.library.register_fake("janus_ext::rectify_", lib=_library)
def _(*_: Any, **__: Any) -> None:
    return None


# ---------------------------------------------------------------------------------------------------------- margin_loss


def margin_loss(features: Tensor, prototypes: Tensor, margin: float, temperature: float) -> Tensor:
    """Push new features away from old prototypes: mean_i (1/tau) log(1 + sum_c exp(tau (f^_i . p_c - margin))).

    The Decoupled Margin Loss of the paper, in this project's form (a smooth hinge on the cosine). The gradient is
    computed in the forward pass; differentiable once, in features. No prototypes: exactly zero, and no gradient.

    Args:
        features: [N, d], float64, float32, bfloat16 or float16; only their direction f^ = f / |f| matters.
        prototypes: [C, d], float32 or float64, unit rows: class means of old tasks.
        margin: cosine beyond which a feature is too close, in [-1, 1].
        temperature: tau > 0; the larger, the sharper the hinge.

    Returns:
        A scalar in the wider of the two dtypes.
    """
    _require_reverse_mode("margin_loss", features, prototypes)
    return torch.ops.janus_ext.margin_loss(features, prototypes, margin, temperature)[0]


@torch.library.register_fake("janus_ext::margin_loss", lib=_library)
def _(features: Tensor, prototypes: Tensor, margin: float, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(features.dtype, prototypes.dtype)
    return features.new_empty((), dtype=dtype), torch.empty_like(features, memory_format=torch.contiguous_format)


def _setup_margin(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


@once_differentiable
def _backward_margin(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
    (grad_features,) = ctx.saved_tensors
    return (grad_loss * grad_features).to(grad_features.dtype), None, None, None


torch.library.register_autograd("janus_ext::margin_loss", _backward_margin, setup_context=_setup_margin, lib=_library)
