"""Times attention on this device: implementation × shape, forward and with the backward pass.

    python bench/ops.py [--only NAME …] [--peers]

Prints ms, TF/s of the necessary operations (causal half, windows as bands), and peak MB over inputs
and outputs. Median of `--runs` after warm-up, one shape at a time; `first s` is the first call,
compilation included. `--peers` adds torch's attention in the same process where torch is there.
"""

import argparse
import statistics
import time

import mlx.core as mx
import numpy as np

from mlx_segtrain import ops

GPU = {
    "window 512 D256": {"H": 8, "G": 2, "D": 256, "T": 8192, "window": 512},
    "causal D512": {"H": 8, "G": 2, "D": 512, "T": 8192},
    "causal D256": {"H": 8, "G": 2, "D": 256, "T": 8192},
    "causal D128": {"H": 16, "G": 2, "D": 128, "T": 8192},
    "causal D128 T8191": {"H": 16, "G": 2, "D": 128, "T": 8191},
    "16 segments D128": {
        "H": 16,
        "G": 2,
        "D": 128,
        "T": 8192,
        "segments": list(range(0, 8193, 512)),
    },
}
CPU = {
    "causal D64 T512": {"H": 9, "G": 3, "D": 64, "T": 512},
    "causal D64 T8192": {"H": 9, "G": 3, "D": 64, "T": 8192},
    "window 512 D64 T8192": {"H": 9, "G": 3, "D": 64, "T": 8192, "window": 512},
}


def pairs(shape):
    """(query, key) pairs that are seen."""
    t = np.arange(shape["T"])
    first = np.zeros_like(t)
    if "window" in shape:
        first = np.maximum(first, t - shape["window"] + 1)
    if "segments" in shape:
        starts = np.array(shape["segments"])
        first = np.maximum(first, starts[np.searchsorted(starts, t, side="right") - 1])
    return int((t - first + 1).sum())


def timed(work, runs):
    begin = time.perf_counter()
    mx.eval(work())
    mx.synchronize()
    first = time.perf_counter() - begin
    for _ in range(2):
        mx.eval(work())
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        out = work()
        mx.eval(out)
        mx.synchronize()
        times.append(time.perf_counter() - begin)
        kept = sum(x.nbytes for x in out)
        del out
    return first, statistics.median(times) * 1e3, (mx.get_peak_memory() - before - kept) / 1e6


def row(name, impl, what, ms, flops, mb, first):
    print(
        f"{name:22s} {impl:10s} {what:8s} {ms:9.3f} {flops / ms / 1e9:8.1f} {mb:9.1f} {first:8.2f}"
    )


def ours(name, shape, impls, runs, dtype):
    keys = mx.random.split(mx.random.key(0), 4)
    h, g, d, t = (shape[x] for x in "HGDT")
    q, do = (mx.random.normal((1, h, t, d), key=k).astype(dtype) for k in keys[:2])
    k, v = (mx.random.normal((1, g, t, d), key=k).astype(dtype) for k in keys[2:])
    mx.eval(q, k, v, do)
    options = {x: shape[x] for x in ("window", "segments") if x in shape}
    flops = 4 * pairs(shape) * h * d
    for impl in impls:

        def f(q, k, v, impl=impl):
            return ops.attention(q, k, v, scale=d**-0.5, impl=impl, **options)

        def both(f=f):
            out, grads = mx.vjp(lambda *x: f(*x), [q, k, v], [do])
            return [*out, *grads]

        try:
            first, ms, mb = timed(lambda f=f: [f(q, k, v)], runs)
            row(name, impl, "forward", ms, flops, mb, first)
            first, ms, mb = timed(both, runs)
            row(name, impl, "both", ms, 3.5 * flops, mb, first)
        except (ValueError, RuntimeError) as error:
            print(f"{name:22s} {impl:10s} {' '.join(str(error).split())[:150]}")


def torch_peer(name, shape, runs):
    import torch  # pyright: ignore[reportMissingImports]

    if "window" in shape or "segments" in shape:
        return
    h, g, d, t = (shape[x] for x in "HGDT")
    q, k, v = (
        torch.randn(1, n, t, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (h, g, g)
    )
    do = torch.randn_like(q)

    def both():
        o = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return torch.autograd.grad(o, [q, k, v], do)

    times = []
    for i in range(runs + 3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        both()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        if i == 2:
            torch.cuda.reset_peak_memory_stats()
    mb = torch.cuda.max_memory_allocated() / 1e6
    flops = 14 * pairs(shape) * h * d
    row(name, "torch sdpa", "both", statistics.median(times[3:]) * 1e3, flops, mb, times[0])


def main():
    parser = argparse.ArgumentParser(description="Times attention beside its peers.")
    parser.add_argument("--only", nargs="+", help="shapes whose name holds one of these")
    parser.add_argument("--impls", nargs="+", default=["auto", "kernel", "blocked", "stock"])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    gpu = mx.default_device() != mx.Device(mx.cpu)
    dtype = mx.bfloat16 if gpu else mx.float32
    print("shape                  impl       what            ms     TF/s   peak MB  first s")
    for name, shape in (GPU if gpu else CPU).items():
        if args.only and not any(x in name for x in args.only):
            continue
        ours(name, shape, args.impls, args.runs, dtype)
        if args.peers and gpu:
            torch_peer(name, shape, args.runs)


if __name__ == "__main__":
    main()
