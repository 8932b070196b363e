"""LoRA layers whose update leaves a protected input subspace alone.

A layer lives through tasks: `protect(basis)`, train A and B with any optimizer, `merge()`, and again. Between merge and
protect the optimizer's state for A and B is worthless: start it anew. A compiled graph (torch.compile) is not: the one
of the first task serves all of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from janus_ext import ops
from janus_ext.adapter import Adapter
from janus_ext.arguments import are_floats, check_flag, check_tensor, naming, shown
from janus_ext.errors import ArgumentError, TaskBoundaryError, warn
from janus_ext.lora_arguments import ROUNDED_WEIGHTS, check_linear, check_rank, check_scale
from janus_ext.ops import WORKING_DTYPES
from janus_ext.protection import orthonormal, project_rows_, violation
from janus_ext.rectification import Rectification, rectification_of

RECTIFY_IN = ("backward", "step")


class _Task(Tensor):
    """A buffer that nobody reads, k + 2 numbers: averages of buffers fail at it, before V, in words of ours.

    Of V itself torch would say that sizes do not match, and nothing where one column can be broadcast.
    """

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_function__(function, types, args, kwargs or {})
        except RuntimeError as error:
            raise TaskBoundaryError(
                "this average (EMA) was made before protect(), and belongs to that task: make a new copy of the model"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Task":
        return memo.setdefault(id(self), self.as_subclass(Tensor).clone().as_subclass(_Task))


class LoRALayer(Adapter):
    """What `LoRALinear` and `LoRAQKV` share: a frozen linear map, factors A [..., r, n] and B [..., m, r], a basis V.

    Factors, V and master weights stay float32 (float64 in a float64 model), whatever dtype the model is moved to.

    Attributes:
        A, B: the factors.
        basis: V [n, k], k = 0 where nothing is protected.
        rectification: how the gradients of A and B are rectified.
        linear: the frozen map; its weight is what `merge` changes.
        has_master: whether `linear` is float32 in a model of half precision, see `merge`.
    """

    _enters_autocast = True  # casts its input before anything else, so that `observing` may do it

    def __init__(
        self,
        linear: nn.Linear,
        shape_A: Sequence[int],
        shape_B: Sequence[int],
        scale: float,
        rectify: str | Rectification,
        rectify_in: str,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        who = type(self).__name__
        check_scale(who, scale)
        self.rectification = rectification_of(who, rectify, options)
        if not isinstance(rectify_in, str) or rectify_in not in RECTIFY_IN:
            raise ArgumentError(f"{who}: rectify_in must be one of {', '.join(RECTIFY_IN)}, got {shown(rectify_in)}")
        self.linear = linear.requires_grad_(False)
        self.has_master = False
        self.scale, self.rectify_in = float(scale), rectify_in  # torch multiplies by no larger integer than int64
        device = linear.weight.device
        dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        self.A = nn.Parameter(torch.empty(*shape_A, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(*shape_B, dtype=dtype, device=device))
        self.register_buffer("_task", None, persistent=False)
        self.register_buffer("basis", None)
        self._hold(torch.zeros(linear.in_features, 0, dtype=dtype, device=device))
        self.reset()

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @torch.no_grad()
    def reset(self) -> None:
        """Fresh factors in place: A Kaiming uniform (A V = 0 for "exact"), B = 0.

        A is drawn by the CPU's generator wherever the layer is: a seed means the same factors on every device.
        """
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform_ with a = sqrt(5), for every target alike
        self.A.copy_(torch.empty(self.A.shape, dtype=self.A.dtype, device="cpu").uniform_(-bound, bound))
        self.B.zero_()
        self._project_A()
        self._effective = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> [..., m], of a fused qkv [..., 3 m]; x's dtype, under autocast that of autocast."""
        check_tensor(f"{type(self).__name__}: x", x, "[..., n]")
        x = ops.autocast(x)
        widened = self.has_master and not torch.is_autocast_enabled(x.device.type)
        entering = x.to(self.linear.weight.dtype) if widened else x
        y, effective = self._multiply(entering, self.linear.weight, self.linear.bias, *self._settings())
        if self.rectify_in == "step" and torch.is_grad_enabled():
            self._effective = effective
        return y.to(x.dtype) if widened else y

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
        """W x + b + s B (A_s x) and A_s [..., r, n]; `settings` are the op's arguments from the basis on."""
        raise NotImplementedError

    @torch.no_grad()
    def protect(self, basis: Tensor) -> None:
        """Protect the span of basis [n, k], orthonormal, from now on; the layer's function does not change.

        A basis that was rounded (half precision) is made orthonormal again. A copy of the model that is averaged over
        the steps of a task (EMA) belongs to that task: updating it with the next one's raises, make a new one.

        Raises:
            TaskBoundaryError: B is not zero: a new basis would change what the layer computes. Merge first.
            ArgumentError: basis is not [n, k] with k <= n - r.
        """
        n, room = self.in_features, self.in_features - self.rank
        check_tensor(
            f"{type(self).__name__}: basis",
            basis,
            f"floating [n, k] with n = {n} and k <= n - r = {room}",
            lambda V: V.dim() == 2 and len(V) == n and V.shape[1] <= room and are_floats(V),
        )
        if bool(self.B.any()):
            raise TaskBoundaryError("protect() while B is not zero would change the function: merge() first")
        with naming(type(self).__name__):
            nearest = orthonormal(basis, self.A.dtype)
        self._hold(nearest.to(self.A))
        self._project_A()

    @torch.no_grad()
    def merge(self, master: bool = False) -> Tensor:
        """W <- W + s B A_s, computed in float64 and rounded once; fresh factors in place.

        A W in half precision is rounded to 3 or 4 digits, and the update with it: of one a third as large as W 4e-3
        then reach protected inputs in bfloat16, of one of a hundredth 0.12 (float32: 6e-8 and 2e-6;
        benchmarks/half_precision.py). This is said once, as a warning.

        Args:
            master: make float32 master weights of a W (and b) in half precision first: from now on the layer keeps and
                multiplies them in float32, twice the memory, and rounds its output to the dtype of its input. Its state
                in a layer of half precision makes master weights there.

        Returns:
            W_after - W_before as it came out in W's dtype, [..., m, n] float64.

        Raises:
            ArgumentError: the weight is computed from others by now, or hooks were added: nothing has changed.
        """
        check_linear(f"{type(self).__name__}.merge", self.linear)
        check_flag(f"{type(self).__name__}: master", master)
        if self.linear.weight.dtype not in WORKING_DTYPES:
            if master:
                self._make_master()
            else:
                cure = "merge(master=True) keeps them in float32"
                warn(f"merge(): {ROUNDED_WEIGHTS}; {cure}")
        delta = self._delta64()
        change = torch.empty_like(delta)
        updates = zip(delta.view(-1, *delta.shape[-2:]), change.view(-1, *delta.shape[-2:]), strict=True)
        for target, (update, made) in zip(self.target_weights(), updates, strict=True):
            before = target.to(torch.float64, copy=True)  # of a float64 weight, too, which `double()` would alias
            target.copy_(before + update)
            made.copy_(target.double() - before)
        self.reset()
        return change

    def delta(self) -> Tensor:
        """s B A_s, the update that `merge` would add, [..., m, n] in the factors' dtype."""
        return self._delta64().to(self.A.dtype)

    def violation(self) -> float:
        """`violation` of the present update, before its merge."""
        return violation(self._delta64(), self.basis)

    @torch.no_grad()
    def effective_A(self) -> Tensor:
        """A_s [..., r, n]: A P for "exact", A otherwise."""
        return ops.project(self.A, self.basis) if self._is_exact() else self.A.detach()

    @torch.no_grad()
    def effective_A64(self) -> Tensor:
        """A_s as `merge` takes it: projected in float64."""
        A = self.A.double()
        return ops.project(A, self.basis.double()) if self._is_exact() else A

    def forward_A(self) -> Tensor:
        """`effective_A` as the last forward pass with gradients has computed it.

        Computed now where there was none since `forget_forward`: in a process that had no image of this step.
        """
        kept = self._effective
        if kept is None or torch._C._functorch.is_functorch_wrapped_tensor(kept):
            return self.effective_A()
        return kept.view_as(self.A)

    def forget_forward(self) -> None:
        """Called once gradients are rectified: the next ones are taken with an A that the step has moved."""
        self._effective = None

    def extra_repr(self) -> str:
        how = f"rectify={self.rectification.rectify}, rectify_in={self.rectify_in}"
        return f"rank={self.rank}, scale={self.scale:g}, {how}"

    @torch.no_grad()
    def _delta64(self) -> Tensor:
        return self.scale * self.B.double() @ self.effective_A64()

    def _project_A(self) -> None:
        """A <- A P with the rows' norms kept, so that "exact" starts with A V = 0."""
        if self._is_exact() and self.basis.shape[1] > 0:
            project_rows_(self.A, self.basis)

    def target_weights(self) -> list[Tensor]:
        """The slices of W that the factors adapt, as views [m, n]: what `merge` changes."""
        raise NotImplementedError

    def _settings(self) -> tuple[Any, ...]:
        """Basis, scale, rectification and defer, as the raw ops take them."""
        if self._needs_no_basis() and self.basis.shape[1] > 0:
            raise ArgumentError("rectify='tangent' with a basis needs G V: make the layer with rectify_in='backward'")
        return self._open[0], self.scale, *self.rectification.values, self.rectify_in == "step"

    def _is_exact(self) -> bool:
        return self.rectification.rectify == "exact"

    def _needs_no_basis(self) -> bool:
        """Whether the layer works only while k = 0: deferred factor gradients do not hold the G V that it needs."""
        return self.rectify_in == "step" and self.rectification.rectify == "tangent"

    def _hold(self, basis: Tensor) -> None:
        """Keep a copy of V that one compiled graph serves whatever k is: k is left open, no stride depends on it."""
        from torch._dynamo.decorators import mark_unbacked  # a second of import, which every optimizer pays anyway

        n, k = basis.shape
        self.basis = basis.new_empty_strided((n, k), (1, n)).copy_(basis)
        if not self._needs_no_basis():
            mark_unbacked(self.basis, 1)  # no recompilation for k = 0 or 1 either
        self._task = basis.new_zeros(k + 2).as_subclass(_Task)
        self._open = (self.basis,)  # the same tensor, on a way where torch.compile honours the mark: not so for buffers
        self._effective: Tensor | None = None  # A_s of the last forward pass, for the rectification before the step

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALayer":
        """Moves the layer; factors and basis go to another device, but to no half precision."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype in WORKING_DTYPES else tensor.to(moved.device)

        if recurse:
            self.linear._apply(move if self.has_master else fn)
        super()._apply(move, recurse=False)
        if self.basis is not self._open[0]:  # a tensor of another device or dtype is a new one
            self._hold(self.basis)
        self._effective = None
        return self

    def _make_master(self) -> None:
        self.linear.float()
        self.has_master = True

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        basis, weight = state_dict.get(prefix + "basis"), state_dict.get(prefix + "linear.weight")
        if basis is not None and basis.dim() == 2 and basis.shape[0] == self.in_features:  # k is data
            self.basis = self.basis.new_zeros(basis.shape)
        if weight is not None and weight.dtype in WORKING_DTYPES and self.linear.weight.dtype not in WORKING_DTYPES:
            self._make_master()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._hold(self.basis)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"{type(self).__name__} has no {name} of its own: who reads it instead of calling the layer, as "
                f"nn.MultiheadAttention does, would miss the update; the frozen one is `.linear.{name}`"
            )
        return super().__getattr__(name)


class LoRALinear(LoRALayer):
    """An nn.Linear with LoRA factors A [r, n] and B [m, r], rectified: any training loop, any optimizer.

    Args:
        linear: the layer to wrap; it is frozen, and `merge` changes its weight.
        rank: r.
        scale: s in W + s B A.
        rectify: a `Rectification`, or the name of one: "none", "project", "tangent" or "exact".
        rectify_in: "backward": `.grad` holds rectified gradients; "step": plain ones, for `GradientRectifier`.
        options: damping, share and balance of a `Rectification` that is given by name.

    Raises:
        ArgumentError: a value outside these.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        scale: float = 1.0,
        rectify: str | Rectification = "exact",
        rectify_in: str = "backward",
        **options: Any,
    ) -> None:
        check_linear("LoRALinear", linear)
        check_rank("LoRALinear", linear, rank)
        shapes = (rank, linear.in_features), (linear.out_features, rank)
        super().__init__(linear, *shapes, scale, rectify, rectify_in, options)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
        ops.check_differentiation("lora_linear", x, weight, bias, self.A, self.B)
        y, _, effective = torch.ops.janus_ext.lora_linear(x, weight, bias, self.A, self.B, *settings)
        return y, effective

    def target_weights(self) -> list[Tensor]:
        return [self.linear.weight.data]


class LoRAQKV(LoRALayer):
    """A fused qkv projection [3 m, n] with factors A [g, r, n] and B [g, m, r] on g of its three slices.

    Args:
        linear: timm's `attn.qkv`, q, k and v on top of each other; it is frozen, and `merge` changes its weight.
        targets: distinct names of "q", "k", "v".
        rank, scale, rectify, rectify_in, options: as in `LoRALinear`.

    Raises:
        ArgumentError: a value outside these.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        targets: Sequence[str] = ("k", "v"),
        scale: float = 1.0,
        rectify: str | Rectification = "exact",
        rectify_in: str = "backward",
        **options: Any,
    ) -> None:
        check_linear("LoRAQKV", linear)
        if not isinstance(targets, Sequence) or not targets or not all(t in ops.TARGETS for t in map(str, targets)):
            raise ArgumentError(f"LoRAQKV: targets must be names of {', '.join(ops.TARGETS)}, got {shown(targets)}")
        if len(set(targets)) != len(targets):
            raise ArgumentError(f"LoRAQKV: targets must be distinct, got {shown(targets)}")
        if linear.out_features % 3:
            raise ArgumentError(f"LoRAQKV: linear must be a fused qkv with 3 m outputs, got {linear.out_features}")
        check_rank("LoRAQKV", linear, rank)
        self.width = linear.out_features // 3
        shapes = (len(targets), rank, linear.in_features), (len(targets), self.width, rank)
        super().__init__(linear, *shapes, scale, rectify, rectify_in, options)
        self.targets = tuple(targets)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
        ops.check_differentiation("lora_qkv", x, weight, bias, self.A, self.B)
        targets = [ops.TARGETS.index(target) for target in self.targets]
        y, _, effective = torch.ops.janus_ext.lora_qkv(x, weight, bias, self.A, self.B, *settings, targets)
        return y, effective

    def target_weights(self) -> list[Tensor]:
        starts = [ops.TARGETS.index(t) * self.width for t in self.targets]
        return [self.linear.weight.data[start : start + self.width] for start in starts]
