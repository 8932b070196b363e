"""What the GPU itself takes for the ops, as replayed CUDA graphs: no launch and no host in it.

    python benchmarks/gpu/alone.py FILE    # a line of JSON for each figure

Beside `gram_update_` stand other ways to the same product, from which csrc/cuda/kernels/gram.cu took its form.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from janus_ext import ops

ROWS = 25216  # of a batch of 128 images at 224 pixels


def milliseconds(function: Callable[[], Any], repeats: int = 30, graph: bool = True) -> float:
    """Median by events."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            function()
        function = captured.replay
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


class Report:
    """Prints and writes every figure as it comes."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")
        self.write({"device": torch.cuda.get_device_name(), "torch": torch.__version__})

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def line(self, name: str, function: Callable[[], Any], **options: Any) -> None:
        """The figure, or why there is none."""
        try:
            took = milliseconds(function, **options)
        except (RuntimeError, ValueError) as error:
            self.write({"name": name, "error": str(error)[:300]})
            print(f"{name:<64} {type(error).__name__}: {str(error).splitlines()[0][:100]}", flush=True)
        else:
            self.write({"name": name, "ms": took})
            print(f"{name:<64} {took:9.4f} ms", flush=True)


def gram(report: Report) -> None:
    """decay C + X^T X of bfloat16 rows."""
    for n in (192, 384, 768, 1024, 1536, 3072):
        x, C = torch.randn(ROWS, n, device="cuda").bfloat16(), torch.zeros(n, n, device="cuda")

        def library(x: torch.Tensor = x, C: torch.Tensor = C) -> None:
            C.mul_(0.5).add_(torch.mm(x.mT, x, out_dtype=torch.float32))

        report.line(f"gram_update_ bfloat16 {ROWS} x {n}", lambda x=x, C=C: ops.gram_update_(C, x, 0.5))
        report.line("  mul_, library product, add_", library)
        for parts in (2, 4, 8, 16):
            rows = x[: ROWS // parts * parts].view(parts, -1, n)
            left, right = rows[..., : n // 2], rows[..., n // 2 :]
            wide = {"out_dtype": torch.float32}
            report.line(f"  {parts} chunks, no sum", lambda c=rows, w=wide: torch.bmm(c.mT, c, **w))
            report.line(
                f"  {parts} chunks, two block columns, no sum",
                lambda c=rows, a=left, b=right, w=wide: (torch.bmm(a.mT, c, **w), torch.bmm(b.mT, b, **w)),
            )
    x, C = torch.randn(ROWS, 768, device="cuda"), torch.zeros(768, 768, device="cuda")
    report.line(f"gram_update_ float32 {ROWS} x 768", lambda: ops.gram_update_(C, x, 0.5))
    report.line("  mul_, library product, add_", lambda: C.mul_(0.5).addmm_(x.mT, x))


def rectify(report: Report) -> None:
    """`rectify_` of a ViT-B/16's K and V, k = 384."""
    n, r, k = 768, 10, 384
    for name, groups, layers in (("24 layers", (), 24), ("12 layers of 2 targets", (2,), 12)):
        V = [torch.linalg.qr(torch.randn(n, k, device="cuda")).Q.contiguous() for _ in range(layers)]
        A = [ops.project(torch.randn(*groups, r, n, device="cuda"), v) for v in V]
        B = [torch.randn(*groups, n, r, device="cuda") for _ in V]
        gA, gB = [torch.randn_like(a) for a in A], [torch.randn_like(b) for b in B]
        report.line(
            f"rectify_ exact, {name}",
            lambda A=A, B=B, gA=gA, gB=gB, V=V: ops.rectify_(A, B, gA, gB, V, balance=True),
        )


def lora(report: Report) -> None:
    """`lora_qkv` on K and V, forward and backward, beside two plain LoRA layers under autograd."""
    for dtype in (torch.bfloat16, torch.float32):
        linear = torch.nn.Linear(768, 2304, device="cuda").requires_grad_(False).to(dtype)
        V = torch.linalg.qr(torch.randn(768, 384, device="cuda")).Q
        for r in (8, 10, 16):
            x = torch.randn(ROWS, 768, device="cuda").to(dtype).requires_grad_()
            A, B = (torch.randn(2, *s, device="cuda", requires_grad=True) for s in ((r, 768), (768, r)))
            grad = torch.randn(ROWS, 2304, device="cuda").to(dtype)

            def ours(x=x, A=A, B=B, grad=grad, linear=linear, V=V, mode="project"):
                y = ops.lora_qkv(x, linear.weight, linear.bias, A, B, V, 1.0, mode)
                return torch.autograd.grad(y, (x, A, B), grad)

            def exact(ours=ours):
                return ours(mode="exact")

            def plain(x=x, A=A, B=B, grad=grad, linear=linear, dtype=dtype):
                q, k, v = linear(x).chunk(3, dim=1)
                k, v = (
                    s + F.linear(F.linear(x, a.to(dtype)), b.to(dtype)) for s, a, b in zip((k, v), A, B, strict=True)
                )
                return torch.autograd.grad(torch.cat([q, k, v], 1), (x, A, B), grad)

            report.line(f"lora_qkv {dtype} r = {r}, project", ours)
            report.line(f"lora_qkv {dtype} r = {r}, exact", exact)
            report.line("  two plain LoRA layers", plain)


def sketch(report: Report) -> None:
    """`isvd_update`, l = 256."""
    for n, rows in ((768, ROWS), (3072, ROWS), (8192, 2048)):
        x = torch.randn(rows, n, device="cuda").bfloat16()
        state = ops.isvd_update(torch.zeros(n, 256, device="cuda"), torch.zeros(256, device="cuda"), x)
        report.line(f"isvd_update {rows} x {n}", lambda s=state, x=x: ops.isvd_update(*s, x), repeats=3, graph=False)


if __name__ == "__main__":
    everything = Report(Path(sys.argv[1]))
    for part in (gram, rectify, lora, sketch):
        part(everything)
