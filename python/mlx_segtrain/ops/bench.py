"""Times ops on this device, and compares them with MLX's own and with the device's speed.

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
import numpy as np

from .. import ops
from ..errors import reason
from .selfcheck import on_gpu


@dataclass(frozen=True)
class Work:
    """A call to time: f(*args). All calls except the first use mx.compile if possible.

    So the time of the first call includes the compilation of kernels, but not that of mx.compile.
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
    """An op at a shape: `run(impl)` returns the functions to time, by direction.

    "mlx" is MLX's own, "products" only the two matrix products of a head with a dense weight. The
    keys of `flops` or `moved` (bytes that must be read or written) are the directions to time, and
    their values determine the minimum time of each. With a memory limit (MB above the current use)
    the host waits for the device instead of exceeding the limit; without one it runs ahead, so the
    peak memory of a call cannot be measured on a GPU.
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
    """The figures of an op. `ms` is the median time of a call that is waited for, `queued_ms` the
    time of each of ten queued calls.

    `rate` is in GF/s if the op is bound by arithmetic, else in GB/s; `floor` is the minimum time on
    this device as a share of the queued time; `peak_mb` excludes inputs and outputs; `first_s` is
    the first call, including compilation. `reason` says why there are no figures.
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
    """Returns the dtype of activations in training on this device."""
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
    """Returns the forward pass, the gradients alone, and both, also compiled."""
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
    """Returns the number of pairs of a query and a key to which it attends."""
    query = np.arange(t)
    first = np.zeros_like(query) if window is None else np.maximum(0, query - window + 1)
    if segments is not None:
        starts = np.array(segments)
        first = np.maximum(first, starts[np.searchsorted(starts, query, side="right") - 1])
    return int((query - first + 1).sum())


def cases() -> list[Case]:
    """Returns the cases for this device, with shapes of a layer of Gemma 4 E4B at 8192 tokens, or
    of SmolLM2 on a CPU."""
    from .cases import of_every_op  # their modules import this one

    return [case for cases in of_every_op("cases") for case in cases(on_gpu())]


# ---- measuring


def timed(
    work: Callable[[], Any],
    runs: int,
    wait: Callable[[Any], None] = settle,
    first: Callable[[], Any] | None = None,
) -> tuple[float, float, float]:
    """Returns the seconds of the first call, the median ms of a call that is waited for, and the ms
    of each of ten queued calls."""

    def call(work: Callable[[], Any] = work) -> float:
        begin = time.perf_counter()
        wait(work())
        return time.perf_counter() - begin

    first_s = call(first or work)
    for _ in range(3):
        call()
    times = [call() for _ in range(runs)]
    wait([work() for _ in range(10)])  # so that the allocator has memory for ten queued calls
    begin = time.perf_counter()
    wait([work() for _ in range(10)])
    return first_s, statistics.median(times) * 1e3, (time.perf_counter() - begin) * 100


@dataclass(frozen=True)
class Device:
    """The speed of a large product (GF/s) and of a large copy (GB/s), which are upper bounds.

    `wait_ms` is the time of a call with almost no work.
    """

    gf_s: float
    gb_s: float
    wait_ms: float


def measure_device() -> Device:
    n = 8192 if on_gpu() else 1024
    a, b = normal(n, n), normal(n, n, seed=1)
    mx.eval(a, b)
    # MLX's own products and copies do not reach the CPU's full speed.
    weight = ops.Base(b)
    product = timed(lambda: a @ b if on_gpu() else ops.lora_linear(a, weight), 5)[2]
    if on_gpu():
        x = normal(1 << 28)
        mx.eval(x)
        copy, size = timed(lambda: mx.negative(x), 5)[2], x.nbytes
    else:
        halves = np.ones((2, 1 << 24), np.float32)
        size = halves.nbytes
        with ThreadPoolExecutor(2) as pool:  # into new memory, like an op's outputs
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
    """Yields the rows of a case, or one row with the reason why there are none."""
    limit = None
    try:
        works = case.run(impl)
        if case.limit_mb is not None:
            mx.clear_cache()
            limit = mx.set_memory_limit(mx.get_active_memory() + int(case.limit_mb * 1e6))
        for what in case.flops or case.moved:
            work = works[what]
            first, ms, queued = timed(work, runs, first=work.first)
            flops, moved = case.flops.get(what, 0.0), case.moved.get(what, 0.0)
            floor = max(flops / device.gf_s / 1e6, moved / device.gb_s / 1e6)
            rate, unit = (flops or moved) / queued / 1e6, "GF/s" if flops else "GB/s"
            figures = (ms, queued, rate, unit, floor / queued, peak_mb(work), first)
            yield Row(case.op, case.shape, impl, what, *figures)
    except (ValueError, RuntimeError) as error:
        yield Row(case.op, case.shape, impl, "", reason=reason(error, 120))
    finally:
        if limit is not None:
            mx.set_memory_limit(limit)
