"""Times ops on this device, and compares them with MLX's implementations and with the speed of the
device.

Each row of the results describes one op, shape, implementation and direction. The direction is
`forward`, `grads` (gradients alone) or `both`.
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
    """A call f(*args) to be timed. All calls except the first use the version compiled by
    mx.compile, if there is one.

    As a result, the time of the first call includes the compilation of kernels, but not the time of
    mx.compile.
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
    """A benchmark of an op with arguments of one shape. `run(impl)` returns the calls to time,
    keyed by direction.

    With `impl="mlx"`, the calls run MLX's implementation; with "products", they compute only the
    two matrix multiplications that a head with a dense weight requires. The keys of `flops` or
    `moved` (bytes that must be read or written) are the directions to time; the values determine
    the minimum time of each direction. With a memory limit (in MB above the current use), the host
    waits for the device instead of exceeding the limit. Without one, the host queues calls ahead of
    the device, so the peak memory of a call cannot be measured on a GPU.
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
    """One row of the benchmark results. `ms` is the median time of a call that the host waits for,
    and `queued_ms` is the time per call if ten calls are queued.

    `rate` is in GFLOP/s if the op is compute-bound, and in GB/s otherwise. `floor` is the minimum
    time on this device as a fraction of the queued time. `peak_mb` excludes inputs and outputs.
    `first_s` is the time of the first call, including compilation. `reason` says why the op could
    not be measured; it is empty if the measurement succeeded.
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
    """Returns the dtype of activations that the benchmark uses on this device."""
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
    """Returns three calls, keyed by direction: the forward pass, the gradients alone, and both.
    Each has a version that is compiled with mx.compile."""
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
    """Returns the number of (query, key) pairs in which the query attends to the key."""
    query = np.arange(t)
    first = np.zeros_like(query) if window is None else np.maximum(0, query - window + 1)
    if segments is not None:
        starts = np.array(segments)
        first = np.maximum(first, starts[np.searchsorted(starts, query, side="right") - 1])
    return int((query - first + 1).sum())


def cases() -> list[Case]:
    """Returns the cases for this device. On a GPU, most have the shapes of a layer of Gemma 4 E4B
    at 8192 tokens; on a CPU, they have the shapes of SmolLM2."""
    from .cases import of_every_op  # imported here to avoid a circular import

    return [case for cases in of_every_op("cases") for case in cases(on_gpu())]


# ---- measuring


def timed(
    work: Callable[[], Any],
    runs: int,
    wait: Callable[[Any], None] = settle,
    first: Callable[[], Any] | None = None,
) -> tuple[float, float, float]:
    """Returns three times: the time of the first call (in seconds), the median time of a call that
    the host waits for (in ms), and the time per call if ten calls are queued (in ms)."""

    def call(work: Callable[[], Any] = work) -> float:
        begin = time.perf_counter()
        wait(work())
        return time.perf_counter() - begin

    first_s = call(first or work)
    for _ in range(3):
        call()
    times = [call() for _ in range(runs)]
    wait([work() for _ in range(10)])  # lets the allocator cache memory for ten queued calls
    begin = time.perf_counter()
    wait([work() for _ in range(10)])
    return first_s, statistics.median(times) * 1e3, (time.perf_counter() - begin) * 100


@dataclass(frozen=True)
class Device:
    """The speeds of a large matrix multiplication (in GFLOP/s) and of a large copy (in GB/s), which
    are upper bounds for ops.

    `wait_ms` is the time of a call that does almost no work.
    """

    gf_s: float
    gb_s: float
    wait_ms: float


def measure_device() -> Device:
    n = 8192 if on_gpu() else 1024
    a, b = normal(n, n), normal(n, n, seed=1)
    mx.eval(a, b)
    # On a CPU, `lora_linear` and NumPy's copy are timed instead, because MLX's matrix
    # multiplications and copies do not reach full speed there.
    weight = ops.Base(b)
    product = timed(lambda: a @ b if on_gpu() else ops.lora_linear(a, weight), 5)[2]
    if on_gpu():
        x = normal(1 << 28)
        mx.eval(x)
        copy, size = timed(lambda: mx.negative(x), 5)[2], x.nbytes
    else:
        halves = np.ones((2, 1 << 24), np.float32)
        size = halves.nbytes
        with ThreadPoolExecutor(2) as pool:  # into new memory, like the outputs of an op
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
    """Yields the rows of a case, or a single row with the reason why the case cannot be
    measured."""
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
