"""Compares kernels with the plain code (reference.py) on the device that runs them.

On a GPU this happens once per device, before the first use. A kernel that does not compile, or
whose results are wrong, is switched off with a warning, and the next implementation is used
instead. The results are stored in the cache folder, separately for each device and each build of
the core. `mlx-segtrain doctor` repeats the check on any device, including a CPU, and measures
times.
"""

import functools
import hashlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import MLX_VERSION, __version__, _core
from ..files import cache_dir, make_folder, write_json
from . import reference

#: The maximum relative L2 error of a kernel in half precision and in float32, compared with the
#: plain code in float32.
HALF_BOUND, FLOAT_BOUND = 0.02, 1e-5
#: The number of rows in a check, and in a timed call on a GPU. Timed calls have more rows, so that
#: the launch overhead does not dominate the time.
CHECKED, TIMED_ON_GPU = 500, 2000


@dataclass(frozen=True)
class Call:
    """A kernel and the corresponding plain code, which are called with the same arrays.

    Calls with `thorough` set are made only by `examine`. `bound` is the maximum relative error of
    the kernel; if it is None, the maximum depends on the dtype.
    """

    op: str
    case: str
    kernel: Callable[..., mx.array]
    plain: Callable[..., mx.array]
    args: list[mx.array]
    thorough: bool = False
    bound: float | None = None

    @classmethod
    def of(cls, op: str, case: str, args: list[mx.array], **options: Any) -> "Call":
        """Returns a call that compares the op named `op` in the core with the op of the same name
        in reference.py, both called with these options."""
        kernel = functools.partial(getattr(_core, op), impl="kernel", **options)
        return cls(op, case, kernel, functools.partial(getattr(reference, op), **options), args)


@dataclass(frozen=True)
class Check:
    """The result of a call. `reason` says why the check failed; it is empty if the check passed.

    `error` is the largest relative L2 error of the value and the gradients; `ms` and `plain_ms` are
    the times for computing both.
    """

    op: str
    case: str
    error: float | None = None
    ms: float | None = None
    plain_ms: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Report:
    device: str
    gpu: bool
    mlx: str
    version: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return not failed(self.checks)


def on_gpu() -> bool:
    return mx.default_device() != mx.Device(mx.cpu)


def normal(*shapes: tuple[int, ...], dtype: mx.Dtype = mx.float32, seed: int = 0) -> list[mx.array]:
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    return [
        mx.random.normal(shape, key=key).astype(dtype)
        for shape, key in zip(shapes, keys, strict=True)
    ]


def calls(rows: int) -> Iterator[Call]:
    """Yields calls of every kernel of the default device. On a GPU, each call has `rows` rows."""
    from .cases import of_every_op  # imported here to avoid a circular import

    device = "cpu" if not on_gpu() else "cuda" if mx.cuda.is_available() else "metal"
    for checks in of_every_op("checks"):
        yield from checks(device, CHECKED if device == "cpu" else rows)


def cotangent(call: Call) -> mx.array:
    return normal(call.plain(*call.args).shape, dtype=call.args[0].dtype, seed=1)[0]


def value_and_gradients(f: Callable[..., mx.array], *arrays: mx.array) -> list[mx.array]:
    """Returns the value and the gradients as float32. The last of the arrays is the cotangent."""
    out, grads = mx.vjp(f, [*arrays[:-1]], [arrays[-1]])
    return [x.astype(mx.float32) for x in (*out, *grads)]


def relative_error(call: Call) -> float:
    """Returns the largest relative L2 error of the value and the gradients."""
    arrays = [*call.args, cotangent(call)]
    got = value_and_gradients(call.kernel, *arrays)
    # On a Mac, the plain code runs on the CPU, because matrix multiplications on a GPU may round
    # float32. No copies are needed, since the CPU shares the GPU's memory.
    with mx.stream(mx.cpu) if on_gpu() and mx.metal.is_available() else nullcontext():
        truth = value_and_gradients(call.plain, *(x.astype(mx.float32) for x in arrays))
    errors = [mx.linalg.norm(x - y) / mx.linalg.norm(y) for x, y in zip(got, truth, strict=True)]
    return float(mx.stack(errors).max())


def milliseconds(f: Callable[..., mx.array], args: list[mx.array], dy: mx.array) -> float:
    """Returns the median time, in ms, of three calls that compute the value and the gradients,
    after a warm-up call."""
    times = []
    mx.eval(args, dy)
    for _ in range(4):
        begin = time.perf_counter()
        mx.eval(mx.vjp(f, args, [dy]))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]) * 1e3


def compile_together(write_down: Callable[[], None]) -> None:
    """On CUDA, compiles all kernels that the graph built by `write_down` needs, in parallel on all
    CPU cores. `write_down` must not evaluate any part of this graph."""
    if not (on_gpu() and mx.cuda.is_available()):
        return
    _core.collect_kernels()
    try:
        write_down()
    finally:
        _core.compile_kernels()


def check_call(call: Call) -> Check:
    try:
        error = relative_error(call)
    except (RuntimeError, ValueError) as failure:
        return Check(call.op, call.case, reason=" ".join(str(failure).split())[:300])
    if not math.isfinite(error):
        return Check(call.op, call.case, reason="not finite")
    bound = call.bound
    if bound is None:
        bound = FLOAT_BOUND if call.args[0].dtype == mx.float32 else HALF_BOUND
    reason = "" if error <= bound else f"relative error {error:.1e} against the plain code"
    return Check(call.op, call.case, error, reason=reason)


def check(thorough: bool = False) -> list[Check]:
    """Compares every kernel of the default device with the plain code. Makes the thorough calls
    only if `thorough` is set."""
    found = [call for call in calls(CHECKED) if thorough or not call.thorough]

    def write_down() -> None:
        for call in found:
            with suppress(RuntimeError, ValueError):  # check_call will return the reason
                value_and_gradients(call.kernel, *call.args, cotangent(call))

    compile_together(write_down)
    return [check_call(call) for call in found]


def timed(checks: list[Check]) -> list[Check]:
    """Returns the checks, with times added for the kernels that passed."""
    result = []
    for x, call in zip(checks, calls(TIMED_ON_GPU), strict=True):
        if not x.reason:
            ms, plain_ms = (
                milliseconds(f, call.args, cotangent(call)) for f in (call.kernel, call.plain)
            )
            x = replace(x, ms=ms, plain_ms=plain_ms)
        result.append(x)
    return result


def failed(checks: list[Check]) -> dict[str, str]:
    """Returns the reason for the first failed kernel of each op, keyed by op. Ops without failures
    are omitted."""
    reasons: dict[str, str] = {}
    for x in checks:
        if x.reason:
            reasons.setdefault(x.op, f"{x.case}: {x.reason}" if x.case else x.reason)
    return reasons


# ---- devices and stored results


def device_name() -> str:
    return str(mx.device_info().get("device_name", "unknown"))


def device_key() -> str:
    core = hashlib.sha256(Path(_core.__file__).read_bytes()).hexdigest()[:16]
    return f"{device_name()}, mlx {MLX_VERSION}, core {core}"


def known(name: str = "self-check") -> dict[str, dict[str, Any]]:
    """Returns the results that are stored in the file `name` of the cache folder, keyed by device
    (see device_key)."""
    with suppress(OSError, ValueError):
        found = json.loads((cache_dir() / f"{name}.json").read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(isinstance(own, dict) for own in found.values()):
            return found
    return {}


def keep(found: dict[str, Any], name: str = "self-check", key: str | None = None) -> None:
    """Stores results in the file `name` of the cache folder under `key`, which by default is this
    device's key."""
    with suppress(OSError):  # without a cache, each process repeats the check
        make_folder(cache_dir())
        write_json(cache_dir() / f"{name}.json", known(name) | {key or device_key(): found})


@functools.cache
def self_check() -> dict[str, str]:
    """Switches off the ops whose kernels failed `check`, now or earlier on this device. Returns the
    reasons, keyed by op."""
    found = known().get(device_key())
    if found is None:
        found = failed(check())
        keep(found)
    for op, reason in found.items():
        _core.switch_off(op, reason)
        text = f"mlx_segtrain: the {op} kernel is off on this device ({reason})"
        warnings.warn(text, stacklevel=2)
    return found


def examine() -> Report:
    """Checks and times every kernel of the default device now, even if there is a stored result,
    and stores the new result."""
    checks = check(thorough=True)
    keep(failed(checks))
    return Report(device_name(), on_gpu(), MLX_VERSION, __version__, timed(checks))
