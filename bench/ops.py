"""Times attention on this device: implementation × shape, forward and with the backward pass.

    python bench/ops.py [--only NAME …] [--peers]

Prints ms of a call that is waited for (median of `--runs` after warm-up), ms of one among ten in a
row (`queued`: what it costs within a step), TF/s of the necessary operations (causal half, windows
as bands) from the latter, peak MB over inputs and outputs, and the first call's s, compilation
included. Calls are compiled. `--peers` adds MLX's own attention, with an array as mask where it
needs one, and torch's on a GPU.
"""

import argparse
import statistics
import time
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_segtrain import _core, ops, reference

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


def timed(work, runs, wait):
    """First call s; ms of a call that is waited for, median; ms of a call among ten in a row."""

    def call():
        begin = time.perf_counter()
        wait(work())
        return time.perf_counter() - begin

    first = call()
    for _ in range(3):
        call()
    times = [call() for _ in range(runs)]
    begin = time.perf_counter()
    wait([work() for _ in range(10)])
    return first, statistics.median(times) * 1e3, (time.perf_counter() - begin) * 100


def row(name, impl, what, flops, mb, first, ms, queued):
    print(
        f"{name:20s} {impl:10s} {what:8s} {ms:9.3f} {queued:9.3f} {flops / queued / 1e9:8.1f} "
        f"{mb:9.1f} {first:8.2f}",
        flush=True,
    )


def ours(name, shape, impl, runs, dtype):
    keys = mx.random.split(mx.random.key(0), 4)
    h, g, d, t = (shape[x] for x in "HGDT")
    q, do = (mx.random.normal((1, h, t, d), key=k).astype(dtype) for k in keys[:2])
    k, v = (mx.random.normal((1, g, t, d), key=k).astype(dtype) for k in keys[2:])
    mx.eval(q, k, v, do)
    flops = 4 * pairs(shape) * h * d
    options = {x: shape[x] for x in ("window", "segments") if x in shape}
    if impl == "mlx":
        mask = "causal"
        if options:
            mask = reference.visible(t, t, None, options.get("window"), options.get("segments"))
            mx.eval(mask)

    def f(q, k, v):
        if impl == "mlx":
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=d**-0.5, mask=mask)
        return ops.attention(q, k, v, scale=d**-0.5, impl=impl, **options)

    def both(q, k, v, do):
        out, grads = mx.vjp(f, [q, k, v], [do])
        return [*out, *grads]

    def wait(out):
        mx.eval(out)
        mx.synchronize()

    for what, work, share in (
        ("forward", partial(mx.compile(f), q, k, v), 1),
        ("both", partial(mx.compile(both), q, k, v, do), 3.5),
    ):
        try:
            times = timed(work, runs, wait)
        except (ValueError, RuntimeError) as error:
            print(f"{name:20s} {impl:10s} {what:8s} {' '.join(str(error).split())[:120]}")
            return
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        out = work()
        wait(out)
        kept = sum(x.nbytes for x in (out if isinstance(out, list) else [out]))
        mb = (mx.get_peak_memory() - before - kept) / 1e6
        del out
        row(name, impl, what, share * flops, mb, *times)


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

    times = timed(both, runs, lambda _: torch.cuda.synchronize())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = both()
    torch.cuda.synchronize()
    kept = sum(x.nbytes for x in out)
    mb = (torch.cuda.max_memory_allocated() - before - kept) / 1e6
    row(name, "torch", "both", 14 * pairs(shape) * h * d, mb, *times)


def main():
    parser = argparse.ArgumentParser(description="Times attention beside its peers.")
    parser.add_argument("--only", nargs="+", help="shapes whose name holds one of these")
    parser.add_argument("--impls", nargs="+", default=["auto", *_core.attention_impls()])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    gpu = mx.default_device() != mx.Device(mx.cpu)
    dtype = mx.bfloat16 if gpu else mx.float32
    print(
        "shape                impl       what            ms    queued     TF/s   peak MB  first s"
    )
    for name, shape in (GPU if gpu else CPU).items():
        if args.only and not any(x in name for x in args.only):
            continue
        for impl in [*args.impls, *(["mlx"] if args.peers else [])]:
            ours(name, shape, impl, args.runs, dtype)
        if args.peers and gpu:
            torch_peer(name, shape, args.runs)


if __name__ == "__main__":
    main()
