"""Every public callable with a call of it that is right: the one list from which wrong calls are made.

A name is "ops.gram_update_", "OnlineEstimator" (its constructor) or "OnlineEstimator.observe". `public_names` has those
that the package exports and that take an argument; each is in RIGHT, or in ELSEWHERE with the reason.
"""

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from conftest import orthonormal
from public_learners import LEARNERS, Right, tiny_model
from test_ops import sample_inputs
from torch import Tensor, nn

import janus_ext
from janus_ext import (
    ClassPrototypes,
    DecoupledMarginLoss,
    FeatureStatistics,
    GradientRectifier,
    LoRALinear,
    LoRAPair,
    LoRAQKV,
    OnlineEstimator,
    Rectification,
    backbone,
    ops,
    processes,
    reference,
)
from janus_ext.backbone.families import declare_mlp, declare_separate, declare_stacked
from janus_ext.data.benchmark import Benchmark, MemorySplit
from janus_ext.runs import metrics

N, R = 12, 3  # width of the inputs, rank
DOCUMENTED = {  # what docs/ names beside, of modules that are for the program itself otherwise
    *("families.declare_mlp", "families.declare_separate", "families.declare_stacked"),
    *("benchmark.Benchmark", "benchmark.MemorySplit", "processes.add_up"),
}


def public_names() -> set[str]:
    """Every exported callable with an argument, every public method with one, errors left out, and `DOCUMENTED`."""
    found = set()
    for prefix, module, names in (
        ("", janus_ext, janus_ext.__all__),
        ("ops.", ops, ops.__all__),
        ("backbone.", backbone, backbone.__all__),
        ("metrics.", metrics, metrics.__all__),
    ):
        for name in names:
            thing = getattr(module, name)
            if callable(thing) and getattr(thing, "__module__", "").startswith("janus_ext"):
                found |= set(_names(prefix + name, thing))
    return found | {f"raw.{op}" for op in ops.OPS} | DOCUMENTED


def _names(name: str, thing: Any) -> Iterator[str]:
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return
    if _takes(thing):
        yield name
    if not inspect.isclass(thing):
        return
    for attribute in dir(thing):
        owner = next((c for c in thing.__mro__ if attribute in vars(c)), object)
        method = getattr(thing, attribute)
        ours = owner.__module__.startswith("janus_ext") and not attribute.startswith("_")
        if ours and isinstance(method, types.FunctionType | types.MethodType) and _takes(method):
            yield f"{name}.{attribute}"


def _takes(thing: Any) -> bool:
    return any(name != "self" for name in inspect.signature(thing).parameters)


# of bases and sketches: orthonormality and what they hold; singular values that are equal leave vectors open
def _held(V: Tensor, M: Tensor) -> list[Tensor]:
    V, M = V.double(), M.double()
    return [V.mT @ V, (V.mT @ M).square().sum() / M.square().sum()]


def _sketch(U: Tensor, S: Tensor) -> list[Tensor]:
    M = U.double() * S.double()
    return [M @ M.mT, S.double().square()]  # the eigenvalues of a Gram matrix: rounded by parts of the largest square


def _pull(given: dict[str, Any], loss: Tensor, gradient: Tensor) -> list[Tensor]:
    """The loss, and the gradient beside what it is a difference of: of a feature along its prototypes it is zero."""
    features, prototypes = given["features"].double(), given["prototypes"].double()
    lengths = features.norm(dim=1, keepdim=True)
    return [loss, torch.cat([gradient.double() * lengths, prototypes.norm(dim=1).sum().expand_as(lengths)], 1)]


VALUES: dict[str, Callable[[dict[str, Any], Any], list[Tensor]]] = {
    "extend_basis": lambda given, V: _held(V, given["gram"]),
    "extend_basis_factor": lambda given, V: _held(V, given["U"] * given["S"]),
    "isvd_update": lambda given, sketch: _sketch(*sketch),
    "margin_loss": lambda given, found: [found] if isinstance(found, Tensor) else _pull(given, *found),
}


# the list -------------------------------------------------------------------------------------------------------------
SAMPLES = {"rectify_": 2, "lora_linear": 3, "lora_qkv": 3, "lora_backward": 3}  # of each the exact rectification


def _op(op: str, raw: bool, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Right:
    sample = dict(sample_inputs(op, device, dtype)[SAMPLES.get(op, 0)])
    written = {"gram_update_": ("gram",), "rectify_": ("grad_A", "grad_B")}.get(op, ())
    call, plain = (getattr(torch.ops.janus_ext, op), getattr(reference, op)) if raw else (getattr(ops, op), None)
    if op == "rectify_" and device == "cuda":
        call, plain = _settled(call), plain and _zero_where_unsafe(plain)
    if op == "lora_qkv" and not raw:
        sample["targets"] = ["k", "v"]
    return Right(call, sample, None, written, (op,), VALUES.get(op), plain)


def _settled(call: Callable[..., None]) -> Callable[..., None]:
    """rectify_ on a GPU says at its next call which factors it found unsafe: here there is one at once."""

    def rectify_(**arguments: Any) -> None:
        call(**arguments)
        torch.cuda.synchronize()
        with suppress_of(ValueError, "found in an earlier call"):
            ops.rectify_(**sample_inputs("rectify_", "cuda", torch.float32)[2])

    return rectify_


def _zero_where_unsafe(call: Callable[..., None]) -> Callable[..., None]:
    """What rectify_ on a GPU does to gradients of a layer whose A V is not zero."""

    def rectify_(**arguments: Any) -> None:
        with suppress_of(ValueError, "presumes A V = 0") as refused:
            call(**arguments)
        for gradient in arguments["grad_A"] + arguments["grad_B"] if refused else ():
            gradient.zero_()

    return rectify_


@contextmanager
def suppress_of(kind: type[Exception], text: str) -> Iterator[list[Exception]]:
    """Passes over an error of this kind that says this; it is in the list then."""
    passed_over: list[Exception] = []
    try:
        yield passed_over
    except kind as error:
        if text not in str(error):
            raise
        passed_over.append(error)


def _features() -> dict[str, Any]:
    return {"features": torch.randn(6, N), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}


def _prototypes() -> ClassPrototypes:
    known = ClassPrototypes(N)
    known.add(torch.randn(4, N), torch.tensor([5, 6, 5, 6]))
    return known


def _statistics() -> FeatureStatistics:
    known = FeatureStatistics(N)
    known.observe(**_features())
    return known


def _estimator(kind: str = "gram") -> OnlineEstimator:
    made = OnlineEstimator(N, kind, 5 if kind == "isvd" else None)
    made.observe(torch.randn(9, N))
    return made


def _layer(kind: type = LoRALinear, **options: Any) -> Any:
    m = 8 if kind is LoRALinear else 24
    return kind(nn.Linear(N, m), R, **options)


def _pairs() -> dict[str, Any]:
    return {
        "one": LoRAPair(nn.Parameter(torch.randn(R, N)), nn.Parameter(torch.zeros(8, R)), 0.5, nn.Linear(N, 8)),
        "two": _layer(rectify_in="step"),
    }


def _rectifier() -> GradientRectifier:
    made = GradientRectifier(_pairs(), 0.5)
    for estimator in made.estimators.values():
        estimator.observe(torch.randn(9, N))
    return made


def _optimizer() -> Right:
    made = _rectifier()
    factors = [factor for entry in made._entries for factor in (entry.A, entry.B)]
    return Right(made.attach, {"optimizer": torch.optim.SGD(factors, 0.1)}, made, who=("attach",))


def _injected() -> nn.Module:
    model = tiny_model()
    janus_ext.inject(model, 2)
    return model


def _observing() -> Right:
    def call(**arguments: Any) -> None:
        with janus_ext.observing(**arguments):
            pass

    return Right(call, {"modules": {"a": _layer()}, "estimators": {"a": _estimator()}}, who=("observing",))


def _of_lora(kind: type) -> dict[str, Callable[[], Right]]:
    name, op = kind.__name__, "lora_linear" if kind is LoRALinear else "lora_qkv"
    m = 8 if kind is LoRALinear else 24

    def made() -> Right:
        sample = {"linear": nn.Linear(N, m), "rank": R, "scale": 0.5, "rectify": "exact", "rectify_in": "backward"}
        sample |= {"damping": 0.1, "share": 0.5, "balance": True}
        return Right(kind, sample | ({} if kind is LoRALinear else {"targets": ["k", "v"]}), None, ("linear",), (name,))

    return {
        name: made,
        f"{name}.forward": lambda: _method(
            _layer(kind), "forward", name, op, names=("weight",), x=torch.randn(2, 5, N)
        ),
        f"{name}.protect": lambda: _method(_layer(kind), "protect", basis=orthonormal(N, 4, torch.float32)),
        f"{name}.merge": lambda: _method(_layer(kind), "merge", master=False),
    }


def _method(
    owner: Any, name: str, *who: str, names: tuple[str, ...] = (), written: tuple[str, ...] = (), **arguments: Any
) -> Right:
    return Right(getattr(owner, name), arguments, owner, written, who or (type(owner).__name__,), names=names)


def _metric(name: str, **arguments: Any) -> Callable[[], Right]:
    return lambda: Right(getattr(metrics, name), dict(arguments), who=(f"{name}: ",))


def _split_of_four() -> dict[str, Any]:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    return {"images": images, "labels": torch.tensor([0, 1, 0, 1]), "samples": list("abcd"), "augmentation": None}


class Own(nn.Module):
    """A layer that nobody knows yet."""


OF_PAIRS = ("layers", "A", "B", "rank", "scale", "module")
LOWER = [[90.0], [80.0, 70.0], [70.0, 65.0, 60.0]]
RIGHT: dict[str, Callable[[], Right]] = {
    **LEARNERS,
    **{f"raw.{op}": partial(_op, op, True) for op in ops.OPS},
    **{f"ops.{op}": partial(_op, op, False) for op in ops.OPS if op in ops.__all__},
    "ClassPrototypes": lambda: Right(ClassPrototypes, {"dim": N, "device": "cpu"}, who=("ClassPrototypes",)),
    "ClassPrototypes.add": lambda: _method(_prototypes(), "add", **_features()),
    "ClassPrototypes.cosines": lambda: _method(_prototypes(), "cosines", features=torch.randn(6, N)),
    "ClassPrototypes.nearest": lambda: _method(_prototypes(), "nearest", features=torch.randn(6, N)),
    "ClassPrototypes.transform": lambda: _method(_prototypes(), "transform", matrix=torch.randn(N, N)),
    "ClassPrototypes.load_state_dict": lambda: _method(
        ClassPrototypes(N), "load_state_dict", state=_prototypes().state_dict()
    ),
    "DecoupledMarginLoss": lambda: Right(
        DecoupledMarginLoss, {"margin": 0.2, "temperature": 16.0, "weight": 0.5}, who=("DecoupledMarginLoss",)
    ),
    "DecoupledMarginLoss.forward": lambda: _method(
        DecoupledMarginLoss(0.2, 16), "forward", "DecoupledMarginLoss", "margin_loss",
        features=torch.randn(6, N), prototypes=torch.randn(4, N),
    ),
    "FeatureStatistics": lambda: Right(FeatureStatistics, {"dim": N, "device": "cpu"}, who=("FeatureStatistics",)),
    "FeatureStatistics.observe": lambda: _method(_statistics(), "observe", **_features()),
    "FeatureStatistics.reserve": lambda: _method(_statistics(), "reserve", classes=5),
    "FeatureStatistics.all_reduce": lambda: _method(_statistics(), "all_reduce", group=None),
    "FeatureStatistics.merge": lambda: _method(_statistics(), "merge", other=_statistics()),
    "FeatureStatistics.transform": lambda: _method(_statistics(), "transform", matrix=torch.randn(N, N).double()),
    "FeatureStatistics.load_state_dict": lambda: _method(
        FeatureStatistics(N), "load_state_dict", state=_statistics().state_dict()
    ),
    "OnlineEstimator": lambda: Right(
        OnlineEstimator,
        {"dim": N, "estimator": "isvd", "rank": 5, "decay": 0.9, "name": "layer", "energy_power": 1,
         "dtype": torch.float32, "device": "cpu", "distributed": True},
        who=("OnlineEstimator",),
    ),
    "OnlineEstimator.observe": lambda: _method(_estimator(), "observe", "layer", x=torch.randn(2, 3, N)),
    "OnlineEstimator.extended": lambda: _method(_estimator(), "extended", "layer", energy=0.5, max_rank=6),
    "OnlineEstimator.commit": lambda: _method(_estimator("isvd"), "commit", "layer", energy=0.5, max_rank=6),
    "OnlineEstimator.adopt": lambda: _method(_estimator(), "adopt", "layer", basis=orthonormal(N, 4, torch.float32)),
    "OnlineEstimator.all_reduce": lambda: _method(_estimator(), "all_reduce", "layer", group=None),
    "OnlineEstimator.merge": lambda: _method(_estimator(), "merge", "layer", other=_estimator()),
    "OnlineEstimator.check_state": lambda: _method(
        _estimator(), "check_state", "layer", state=_estimator().state_dict()
    ),
    "OnlineEstimator.load_state_dict": lambda: _method(
        _estimator("isvd"), "load_state_dict", "layer", state=_estimator("isvd").state_dict()
    ),
    "observing": _observing,
    "Rectification": lambda: Right(
        Rectification, {"rectify": "exact", "damping": 0.1, "share": 0.5, "balance": True}, who=("Rectification",)
    ),
    "LoRAPair": lambda: Right(
        lambda **pair: GradientRectifier({"one": LoRAPair(**pair)}), _pairs()["one"]._asdict(), who=("one", "LoRAPair")
    ),
    **_of_lora(LoRALinear),
    **_of_lora(LoRAQKV),
    "GradientRectifier": lambda: Right(
        GradientRectifier,
        {"layers": _pairs(), "energy": 0.5, "adapter": None, "rectify": "exact", "estimator": "isvd",
         "estimator_rank": 5, "energy_power": 1, "share_inputs": True, "distributed": True, "damping": 0.1},
        who=("GradientRectifier", "one", "two", "layer", "other", "OnlineEstimator"),
        names=OF_PAIRS,
    ),
    "GradientRectifier.attach": _optimizer,
    "GradientRectifier.commit": lambda: _method(
        _rectifier(), "commit", "commit", "GradientRectifier", "one", "two", "layer", "other",
        names=OF_PAIRS, written=("layers",), energy=0.5, layers=_pairs(), adapter=None,
    ),
    "GradientRectifier.load_state_dict": lambda: _method(
        _rectifier(), "load_state_dict", "GradientRectifier", "one", "two",
        names=("basis",), state=_rectifier().state_dict(),
    ),
    "inject": lambda: Right(
        janus_ext.inject,
        {"model": tiny_model(), "rank": 2, "targets": ["k", "fc1"], "scale": 0.5, "rectify": "exact",
         "rectify_in": "step", "damping": 0.1},
        None, ("model",), ("inject", "LoRALinear", "LoRAQKV"),
    ),
    "uninject": lambda: Right(janus_ext.uninject, {"model": _injected()}, None, ("model",), ("uninject",)),
    "backbone.load_backbone": lambda: Right(
        backbone.load_backbone, {"name": "emoji", "weights": "none", "image_size": 64},
        who=("load_backbone: ",), names=("backbone", "image-size"),
    ),
    "backbone.adopt": lambda: Right(backbone.adopt, {"model": tiny_model()}, who=("adopt: ",)),
    **{
        f"families.{declare.__name__}": partial(Right, declare, {given: Own}, who=(f"{declare.__name__}: ",))
        for declare, given in ((declare_stacked, "attention"), (declare_separate, "attention"), (declare_mlp, "mlp"))
    },
    "benchmark.MemorySplit": lambda: Right(MemorySplit, _split_of_four(), who=("MemorySplit: ",)),
    "benchmark.Benchmark": lambda: Right(
        Benchmark,
        {"name": "mine", "class_names": ("ant", "bee"), "train": MemorySplit(**_split_of_four()),
         "test": MemorySplit(**_split_of_four()), "tasks": ((1,), (0,)), "validation": False, "family": str},
        who=("Benchmark: ",),
    ),
    "processes.add_up": lambda: Right(
        processes.add_up, {"tensor": torch.randn(3), "group": None}, None, ("tensor",), ("add_up: ",)
    ),
    **{
        f"metrics.{name}": _metric(name, matrix=LOWER)
        for name in ("accuracy", "mean_average_accuracy", "backward_transfer", "forgetting", "plasticity", "trajectory",
                     "summarize_head")
    },
    **{
        f"metrics.{name}": _metric(name, matrix=LOWER, test_sizes=[3, 4, 5])
        for name in ("accuracy_sample_weighted", "mean_average_accuracy_sample_weighted", "trajectory_sample_weighted")
    },
    "metrics.accuracy_task_known": _metric("accuracy_task_known", known=LOWER),
    "metrics.task_recognition": _metric("task_recognition", recognised=LOWER),
    "metrics.summarize": _metric("summarize", matrix=LOWER, known=LOWER, recognised=LOWER, test_sizes=[3, 4, 5]),
    "metrics.mean_and_std": _metric("mean_and_std", values=[1.0, 2.0]),
    "metrics.Confusion": lambda: Right(metrics.Confusion, {"classes": 4, "task_sizes": [2, 2]}, who=("Confusion",)),
    "metrics.Confusion.add": lambda: _method(
        metrics.Confusion(4, [2, 2]), "add", scores=torch.randn(6, 4), labels=torch.tensor([0, 1, 2, 3, 0, 1])
    ),
}  # fmt: skip

# What stands before the kernels of a GPU, which take float32.
ON_GPU: dict[str, Callable[[], Right]] = {
    f"{prefix}.{op}": partial(_op, op, prefix == "raw", "cuda", torch.float32)
    for prefix, names in (("raw", ops.OPS), ("ops", [op for op in ops.OPS if op in ops.__all__]))
    for op in names
}

ELSEWHERE = {"Injection": "inject makes it, others read it"}
