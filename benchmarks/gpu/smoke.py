"""Every op at awkward sizes against float64: short enough for compute-sanitizer.

python benchmarks/gpu/smoke.py DEVICE [gram rectify margin lora bases]
"""

import sys

import torch

from janus_ext import ops, reference

device, wanted = sys.argv[1], sys.argv[2:]
torch.manual_seed(0)
failures = 0


def say(name, got, want, limit):
    global failures
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error = float((got - want).norm() / want.norm().clamp_min(1e-300))
    failures += not error <= limit
    print(f"{'ok ' if error <= limit else 'BAD'} {name:<58} {error:.1e}", flush=True)


def orthonormal(n, k):
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q


def gram():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for n, rows, offset in ((97, 33, 0), (260, 65, 1), (768, 197, 0), (640, 2051, 0)):
            x = torch.randn(rows, n + 3).to(dtype)[:, offset : offset + n]  # odd pointers, a leading dimension not n
            start = torch.randn(n, n, dtype=torch.float64)
            start = start + start.mT
            C = start.clone().to(device, torch.float64 if dtype == torch.float64 else torch.float32)
            on_device = torch.empty(rows, n + 3, dtype=dtype, device=device)[:, offset : offset + n].copy_(x)
            if device == "cuda":  # the kernels never read what lies below the diagonal blocks, and overwrite it
                C.masked_fill_(torch.ones_like(C, dtype=torch.bool).tril(-1), float("nan"))
            ops.gram_update_(C, on_device, 0.5)
            say(f"gram {dtype} {rows} x {n} offset {offset}", C, 0.5 * start + x.double().mT @ x.double(), 2e-5)
            say("  entries that are not symmetric", (C != C.mT).sum(), torch.zeros(()), 0)


def rectify():
    rows = []
    for r in (1, 10, 17, 64):
        for k in (0, 1, 37, 100):
            for strided in (False, True):
                n, m, V = 165, 45, orthonormal(165, k)
                A = torch.randn(r, n, dtype=torch.float64)
                row = [A - (A @ V) @ V.mT, torch.randn(m, r), torch.randn(r, n), torch.randn(m, r), V]
                row = [t.to(device, torch.float32) for t in row]
                rows.append(
                    [t.mT.contiguous().mT for t in row] if strided else row
                )  # 32 targets: two batches of launches
    for mode in ("project", "exact"):
        mine = [[t.clone() if i in (2, 3) else t for i, t in enumerate(row)] for row in rows]
        options = dict(rectify=mode, damping=0.05, share=0.3, balance=True)
        ops.rectify_(*(list(column) for column in zip(*mine, strict=True)), **options)
        for row, (_, _, gA, gB, V) in zip(rows, mine, strict=True):
            dA, dB = reference.rectified(*(t.double().cpu() for t in row), scale=1.0, **options)
            say(
                f"rectify {mode} r={gA.shape[0]} k={V.shape[1]} strides {gA.stride()}",
                torch.cat([gA.flatten(), gB.flatten()]),
                torch.cat([dA.flatten(), dB.flatten()]),
                2e-4,
            )


def margin():
    for n, d, c, dtype in ((7, 16, 5, torch.float32), (33, 192, 345, torch.bfloat16), (3, 5, 1, torch.float64)):
        f = torch.randn(n, d).to(dtype)
        p = torch.nn.functional.normalize(torch.randn(c, d, dtype=torch.float64))
        want, grad = reference.margin_loss(f.double(), p, 0.2, 16.0)
        x = f.to(device).requires_grad_()
        loss = ops.margin_loss(x, p.to(device, torch.float64 if dtype == torch.float64 else torch.float32), 0.2, 16.0)
        loss.backward()
        say(f"margin loss {dtype} {n} x {d}, {c}", loss, want, 2e-5)
        say(f"margin gradient {dtype} {n} x {d}, {c}", x.grad, grad, 2e-2 if dtype == torch.bfloat16 else 2e-5)


def lora():
    n, m, r, g = 40, 24, 5, 2
    for mode in ("none", "project", "tangent", "exact"):
        V, x = orthonormal(n, 11), torch.randn(3, 7, n, dtype=torch.float64)
        A, B, W = (
            torch.randn(g, r, n, dtype=torch.float64),
            torch.randn(g, m, r, dtype=torch.float64),
            torch.randn(3 * m, n).double(),
        )
        results = []
        for where, dtype in ((device, torch.float32), ("cpu", torch.float64)):
            leaves = [t.detach().to(where, dtype).requires_grad_() for t in (x, A, B)]
            y = ops.lora_qkv(leaves[0], W.to(where, dtype), None, leaves[1], leaves[2], V.to(where, dtype), 0.7, mode)
            y.square().sum().backward()
            results.append([y, *(leaf.grad for leaf in leaves)])
        for what, got, want in zip(("y", "dx", "dA", "dB"), *results, strict=True):
            say(f"lora_qkv {mode} {what}", got, want, 2e-4)


def bases():
    n, V = 96, orthonormal(96, 5)
    x = torch.randn(300, n, dtype=torch.float64) * torch.logspace(0, -3, n, dtype=torch.float64)
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        grown = [
            ops.extend_basis(V.to(w, t), (x.mT @ x).to(w, t), 0.9, 60)
            for w, t in ((device, dtype), ("cpu", torch.float64))
        ]
        say(f"extend_basis {dtype}", *(V.double() @ V.double().mT for V in (g.cpu() for g in grown)), limit)
        start = torch.zeros(n, 20), torch.zeros(20)
        found = [
            ops.isvd_update(*(s.to(w, t) for s in start), x[:, :].to(w, t))
            for w, t in ((device, dtype), ("cpu", torch.float64))
        ]
        say(f"isvd_update {dtype} singular values", found[0][1], found[1][1], limit)


every = {f.__name__: f for f in (gram, rectify, margin, lora, bases)}
for name in wanted or every:
    every[name]()
if device == "cuda":
    torch.cuda.synchronize()
print(f"smoke: {failures} bad")
sys.exit(failures > 0)
