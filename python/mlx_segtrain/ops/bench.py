"""Times ops on this device, beside MLX's own and beside what the device can do.

A row is an op, a shape, an implementation and a direction: forward, `grads` (gradients alone) or
`both`.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import _core, ops
from . import reference
from .selfcheck import on_gpu


@dataclass(frozen=True)
class Work:
    """A call to time: f(*args), first as it is, then compiled if it can be, as a step may be.

    The first call shows what an op waits for, not what MLX's own compiler takes to fuse a graph.
    """

    f: Callable[..., Any]
    args: Sequence[Any] = ()
    compiled: Callable[..., Any] | None = None

    def first(self) -> Any:
        return self.f(*self.args)

    def __call__(self) -> Any:
        return (self.compiled or self.f)(*self.args)


@dataclass(frozen=True)
class Case:
    """An op at a shape: `run(impl)` gives functions to time, by direction.

    "mlx" is MLX's own, "products" the two products of a head with a dense weight and no more.
    `flops` and `moved` (bytes that must be read or written) by direction tell the floor. Under a
    limit on memory (MB over what is there) the host waits for the device where it would exceed it;
    without one it runs ahead, and what a call needs cannot be seen on a GPU.
    """

    op: str
    shape: str
    impls: Sequence[str]
    run: Callable[[str], dict[str, Work]]
    flops: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    limit_mb: float | None = None


@dataclass(frozen=True)
class Row:
    """`ms` of a call that is waited for (median), `queued_ms` of one among ten in a row.

    `rate` in GF/s if the op is bound by arithmetic, else GB/s; `floor` the share of the queued time
    that the device's own rate would need; `peak_mb` over inputs and outputs; `first_s` of the first
    call, compilation included. `reason` says why there are no figures.
    """

    op: str
    shape: str
    impl: str
    what: str
    ms: float = 0.0
    queued_ms: float = 0.0
    rate: float = 0.0
    unit: str = ""
    floor: float = 0.0
    peak_mb: float = 0.0
    first_s: float = 0.0
    reason: str = ""


def dtype() -> mx.Dtype:
    """What a device trains in."""
    return mx.bfloat16 if on_gpu() else mx.float32


def normal(*shape: int, seed: int = 0, of: mx.Dtype | None = None) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(of or dtype())


def settle(out: Any) -> None:
    mx.eval(out)
    mx.synchronize()


# ---- cases


def with_gradients(
    f: Callable[..., Any], args: list[mx.array], *cotangents: mx.array
) -> dict[str, Work]:
    """Forward; gradients alone; both. Compiled, as a step is."""
    n = len(args)

    def grads(*x: mx.array) -> list[mx.array]:
        return mx.vjp(f, list(x[:n]), list(x[n:]))[1]

    def both(*x: mx.array) -> list[mx.array]:
        out, vjps = mx.vjp(f, list(x[:n]), list(x[n:]))
        return [*out, *vjps]

    mx.eval(args, cotangents)
    all_args = [*args, *cotangents]
    works = {"forward": (f, args), "grads": (grads, all_args), "both": (both, all_args)}
    return {what: Work(g, x, mx.compile(g)) for what, (g, x) in works.items()}


def pairs(t: int, window: int | None, segments: Sequence[int] | None) -> int:
    """(query, key) pairs that are seen."""
    query = np.arange(t)
    first = np.zeros_like(query) if window is None else np.maximum(0, query - window + 1)
    if segments is not None:
        starts = np.array(segments)
        first = np.maximum(first, starts[np.searchsorted(starts, query, side="right") - 1])
    return int((query - first + 1).sum())


def attention(
    shape: str,
    heads: int,
    groups: int,
    d: int,
    t: int,
    window: int | None = None,
    segments: list[int] | None = None,
) -> Case:
    options: dict[str, Any] = {"scale": d**-0.5}
    given = {"window": window, "segments": segments}
    given = {key: value for key, value in given.items() if value is not None}

    def run(impl: str) -> dict[str, Work]:
        q, k, v = normal(1, heads, t, d), normal(1, groups, t, d, seed=1), normal(1, groups, t, d)
        mask: Any = "causal"
        if impl == "mlx" and given:
            mask = reference.visible(t, t, None, window, segments)
            mx.eval(mask)

        def f(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            if impl == "mlx":
                return mx.fast.scaled_dot_product_attention(q, k, v, **options, mask=mask)
            return ops.attention(q, k, v, **options, **given, impl=impl)

        works = with_gradients(f, [q, k, v], normal(1, heads, t, d, seed=2))
        del works["grads"]  # they need the forward pass
        return works

    one = 4.0 * pairs(t, window, segments) * heads * d
    impls = ["auto", *_core.attention_impls(), "mlx"]
    return Case("attention", shape, impls, run, {"forward": one, "both": 3.5 * one})


def glu(op: str, rows: int, width: int) -> Case:
    def run(impl: str) -> dict[str, Work]:
        act = nn.gelu_approx if op == "geglu" else nn.silu

        def f(gate: mx.array, up: mx.array) -> mx.array:
            return act(gate) * up if impl == "mlx" else getattr(ops, op)(gate, up, impl=impl)

        gate, up, dy = (normal(rows, width, seed=i) for i in range(3))
        return with_gradients(f, [gate, up], dy)

    array = float(rows * width * dtype().size)
    moved = {"forward": 3 * array, "grads": 5 * array, "both": 6 * array}
    return Case(op, f"{rows}×{width}", ["kernel", "stock", "mlx"], run, moved=moved)


def norm(op: str, rows: int, width: int) -> Case:
    def run(impl: str) -> dict[str, Work]:
        w = normal(width)
        x, r, dy = (normal(rows, width, seed=i) for i in range(3))
        if op == "rms_norm":

            def plain(x: mx.array) -> mx.array:
                if impl == "mlx":
                    return mx.fast.rms_norm(x, w, 1e-5)
                return ops.rms_norm(x, w, 1e-5, impl=impl)

            return with_gradients(plain, [x], dy)

        def summed(x: mx.array, r: mx.array) -> tuple[mx.array, mx.array]:
            return ops.add_rms_norm(x, r, w, 1e-5, impl="stock" if impl == "mlx" else impl)

        return with_gradients(summed, [x, r], dy, r)

    array = float(rows * width * dtype().size)
    arrays = (2, 3, 4) if op == "rms_norm" else (4, 5, 7)
    moved = {what: n * array for what, n in zip(("forward", "grads", "both"), arrays, strict=True)}
    return Case(op, f"{rows}×{width}", ["mlx"] if on_gpu() else ["kernel", "mlx"], run, moved=moved)


def frozen(out: int, width: int, bits: int, group: int, seed: int = 0) -> ops.Base:
    """A quantized weight of normal numbers."""
    w = normal(out, width, seed=seed) / width**0.5
    packed = mx.quantize(w, group_size=group, bits=bits)
    mx.eval(packed)  # or a compiled call would quantize
    return ops.Base(*packed, group_size=group, bits=bits)


def linear(out: int, width: int, bits: int, group: int, rank: int, seed: int = 0) -> ops.Linear:
    a = normal(width, rank, seed=seed, of=mx.float32) / width**0.5
    b = normal(rank, out, seed=seed + 1, of=mx.float32)
    return ops.Linear(frozen(out, width, bits, group, seed), a, b, 2.0)


def with_factors(linears: list[ops.Linear], ab: Sequence[mx.array]) -> list[ops.Linear]:
    return [w.with_factors(ab[2 * i], ab[2 * i + 1]) for i, w in enumerate(linears)]


def factors_of(linears: list[ops.Linear]) -> list[mx.array]:
    return [x for w in linears for x in (w.a, w.b) if x is not None]


def mlx_product(x: mx.array, base: ops.Base) -> mx.array:
    quant: dict[str, Any] = {"group_size": base.group_size, "bits": base.bits}
    scales: Any = base.scales
    return mx.quantized_matmul(x, base.weight, scales, base.biases, **quant)


def mlx_linear(x: mx.array, w: ops.Linear) -> mx.array:
    """As mlx-lm computes it, with float32 factors."""
    low = (x @ w.a) @ w.b  # pyright: ignore[reportOperatorIssue]
    return mlx_product(x, w.base) + (w.scale * low).astype(x.dtype)


def dequantize(out: int, width: int, bits: int, group: int) -> Case:
    def run(impl: str) -> dict[str, Work]:
        base = frozen(out, width, bits, group)
        quant: dict[str, Any] = {"group_size": group, "bits": bits}
        arrays = [base.weight, base.scales, base.biases]
        mx.eval(arrays)
        if impl == "mlx":
            return {"forward": Work(lambda *x: mx.dequantize(*x, **quant), arrays)}
        return {"forward": Work(ops.dequantize, (base, dtype()))}

    size = out * width
    moved = size * dtype().size + size * bits / 8 + 2 * size / group * dtype().size
    shape = f"{out}×{width} {bits}-bit"
    return Case("dequantize", shape, ["kernel", "mlx"], run, moved={"forward": moved})


def lora(rows: int, width: int, outs: list[int], bits: int, group: int, rank: int) -> Case:
    def run(impl: str) -> dict[str, Work]:
        linears = [linear(out, width, bits, group, rank, seed=i) for i, out in enumerate(outs)]

        def f(x: mx.array, *ab: mx.array) -> mx.array:
            of = with_factors(linears, ab)
            if impl == "mlx":
                ys = [mlx_linear(x, w) for w in of]
            else:
                ys = ops.lora_linears(x, of, impl=impl)
            return ys[0] if len(ys) == 1 else mx.concatenate(ys, axis=-1)

        args = [normal(rows, width), *factors_of(linears)]
        return with_gradients(f, args, normal(rows, sum(outs), seed=1))

    one = 2.0 * rows * width * sum(outs)
    flops = {"forward": one, "grads": one, "both": 2 * one}
    shape = f"{rows}×{width}→{'+'.join(map(str, outs))} r{rank}"
    return Case("lora_linears", shape, ["kernel", "stock", "mlx"], run, flops)


def mlp(rows: int, width: int, hidden: int, bits: int, group: int, rank: int, gelu: bool) -> Case:
    def run(impl: str) -> dict[str, Work]:
        sizes = [(hidden, width), (hidden, width), (width, hidden)]
        linears = [linear(*s, bits, group, rank, seed=i) for i, s in enumerate(sizes)]
        act = nn.gelu_approx if gelu else nn.silu

        def f(x: mx.array, *ab: mx.array) -> mx.array:
            gate, up, down = with_factors(linears, ab)
            if impl == "mlx":
                return mlx_linear(act(mlx_linear(x, gate)) * mlx_linear(x, up), down)
            return ops.lora_glu_mlp(x, gate, up, down, gelu=gelu, impl=impl)

        args = [normal(rows, width), *factors_of(linears)]
        works = with_gradients(f, args, normal(rows, width, seed=1))
        del works["grads"]  # they need gate and up
        return works

    one = 6.0 * rows * width * hidden
    shape = f"{rows}×{width}/{hidden} r{rank}"
    impls = ["kernel", "stock", "mlx"]
    return Case("lora_glu_mlp", shape, impls, run, {"forward": one, "both": 2 * one})


def head(rows: int, width: int, vocabulary: int, bits: int, group: int, cap: float | None) -> Case:
    def run(impl: str) -> dict[str, Work]:
        base = frozen(vocabulary, width, bits, group)
        targets = mx.random.randint(0, vocabulary, (rows,))
        mx.eval(targets)
        if impl == "products":
            w, h = ops.dequantize(base, dtype()), normal(rows, width)
            mx.eval(w, h)

            def both(h: mx.array, w: mx.array) -> mx.array:
                return (h @ w.T) @ w

            return {"both": Work(both, (h, w), mx.compile(both))}

        def f(h: mx.array) -> mx.array:
            if impl != "mlx":
                return ops.linear_cross_entropy(h, base, targets, softcap=cap, impl=impl)
            z = mlx_product(h, base)
            z = z if cap is None else cap * mx.tanh(z / cap)
            return nn.losses.cross_entropy(z.astype(mx.float32), targets, reduction="sum")

        return {"both": with_gradients(f, [normal(rows, width)], mx.array(1.0))["both"]}

    flops = {"both": 4.0 * rows * width * vocabulary}
    shape = f"{rows}×{width}×{vocabulary}"
    impls = ["kernel", "blocked", "mlx", *(["products"] if on_gpu() else [])]
    limit = 400.0 if on_gpu() else None
    return Case("linear_cross_entropy", shape, impls, run, flops, limit_mb=limit)


def cases() -> list[Case]:
    """The shapes that the device is for: one layer of Gemma 4 E4B at 8192 tokens, or of SmolLM2."""
    if not on_gpu():
        return [
            attention("causal D64 T512", 9, 3, 64, 512),
            attention("causal D64 T8192", 9, 3, 64, 8192),
            attention("window 512 D64 T8192", 9, 3, 64, 8192, window=512),
            glu("geglu", 512, 1536),
            glu("swiglu", 512, 1536),
            glu("swiglu", 8192, 1536),
            norm("rms_norm", 512, 576),
            norm("add_rms_norm", 512, 576),
            dequantize(1536, 576, 4, 32),
            lora(512, 576, [1536], 4, 32, 16),
            lora(512, 576, [576, 192, 192], 4, 32, 16),
            mlp(512, 576, 1536, 4, 32, 16, gelu=False),
            head(512, 576, 49152, 8, 32, None),
        ]
    return [
        attention("window 512 D256", 8, 2, 256, 8192, window=512),
        attention("causal D512", 8, 2, 512, 8192),
        attention("causal D256", 8, 2, 256, 8192),
        attention("causal D128", 16, 2, 128, 8192),
        attention("causal D128 T8191", 16, 2, 128, 8191),
        attention("16 segments D128", 16, 2, 128, 8192, segments=list(range(0, 8193, 512))),
        glu("geglu", 8192, 10240),
        glu("swiglu", 8192, 4608),
        norm("rms_norm", 8192, 2560),
        norm("add_rms_norm", 8192, 2560),
        dequantize(10240, 2560, 4, 64),
        lora(8192, 2560, [10240], 4, 64, 16),
        lora(8192, 10240, [2560], 4, 64, 16),
        lora(8192, 1536, [2048, 256, 256], 4, 64, 16),
        mlp(8192, 2560, 10240, 4, 64, 16, gelu=True),
        mlp(8192, 1536, 4608, 4, 64, 16, gelu=False),
        head(2048, 2560, 262144, 4, 64, 30.0),
    ]


# ---- measuring


def timed(
    work: Callable[[], Any],
    runs: int,
    wait: Callable[[Any], None] = settle,
    first: Callable[[], Any] | None = None,
) -> tuple[float, float, float]:
    """First call s; ms of a call that is waited for, median; ms of a call among ten in a row."""

    def call(work: Callable[[], Any] = work) -> float:
        begin = time.perf_counter()
        wait(work())
        return time.perf_counter() - begin

    first_s = call(first or work)
    for _ in range(3):
        call()
    times = [call() for _ in range(runs)]
    wait([work() for _ in range(10)])  # the allocator now has what ten at once need
    begin = time.perf_counter()
    wait([work() for _ in range(10)])
    return first_s, statistics.median(times) * 1e3, (time.perf_counter() - begin) * 100


@dataclass(frozen=True)
class Device:
    """What a large product (GF/s) and a large copy reach here: the floor of everything else.

    `wait_ms` is what waiting for any call takes, measured on one of next to no work.
    """

    gf_s: float
    gb_s: float
    wait_ms: float


def measure_device() -> Device:
    n = 8192 if on_gpu() else 1024
    a, b = normal(n, n), normal(n, n, seed=1)
    mx.eval(a, b)
    # MLX's own products and copies on the CPU are not what the CPU can do.
    weight = ops.Base(b)
    product = timed(lambda: a @ b if on_gpu() else ops.lora_linear(a, weight), 5)[2]
    if on_gpu():
        x = normal(1 << 28)
        mx.eval(x)
        copy, size = timed(lambda: mx.negative(x), 5)[2], x.nbytes
    else:
        halves = np.ones((2, 1 << 24), np.float32)
        size = halves.nbytes
        with ThreadPoolExecutor(2) as pool:  # into fresh memory, as an op's outputs are
            copy = timed(lambda: list(pool.map(np.copy, halves)), 5, lambda _: None)[1]
    one = mx.ones(16)
    mx.eval(one)
    waited = timed(lambda: one + 1, 20)[1]
    return Device(2 * n**3 / product / 1e6, 2 * size / copy / 1e6, waited)


def peak_mb(work: Callable[[], Any]) -> float:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = work()
    settle(out)
    kept = mx.get_active_memory() - before
    del out
    return (mx.get_peak_memory() - before - kept) / 1e6


def measure(case: Case, impl: str, device: Device, runs: int) -> Iterator[Row]:
    """The rows of a case, or one with the reason why there are none."""
    limit = None
    try:
        works = case.run(impl)
        if case.limit_mb is not None:
            mx.clear_cache()
            limit = mx.set_memory_limit(mx.get_active_memory() + int(case.limit_mb * 1e6))
        for what, work in works.items():
            first, ms, queued = timed(work, runs, first=work.first)
            flops, moved = case.flops.get(what, 0.0), case.moved.get(what, 0.0)
            floor = max(flops / device.gf_s / 1e6, moved / device.gb_s / 1e6)
            rate, unit = (flops or moved) / queued / 1e6, "GF/s" if flops else "GB/s"
            figures = (ms, queued, rate, unit, floor / queued, peak_mb(work), first)
            yield Row(case.op, case.shape, impl, what, *figures)
    except (ValueError, RuntimeError) as error:
        yield Row(case.op, case.shape, impl, "", reason=" ".join(str(error).split())[:120])
    finally:
        if limit is not None:
            mx.set_memory_limit(limit)
