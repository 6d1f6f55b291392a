"""Chooses the attention implementation on a Mac by timing all implementations that support the
call, once per device.

The fastest implementation depends on the Mac and on the version of macOS. The first run with a new
kind of heads times the implementations for these heads, which takes at most two seconds, and stores
the results in the cache folder.
"""

import functools
import platform
import statistics
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import _core
from ..errors import is_out_of_memory
from . import selfcheck
from .selfcheck import device_key, normal, self_check, value_and_gradients

#: The maximum time, in seconds, for measuring all heads of a run.
SECONDS = 2.0
#: The number of tokens in a timed call, so large that launch overhead does not dominate the time.
TOKENS = 2048
#: The implementations in their built-in order (see csrc/ops/attention/attention.cpp). In a tie, the
#: first one is used.
WAYS = ("stock", "kernel", "blocked")
HALVES = (mx.bfloat16, mx.float16)


@dataclass(frozen=True)
class Heads:
    """A kind of attention call. If `causal` is true, the calls have no window, segments or
    softcap."""

    heads: int
    groups: int
    size: int
    dtype: mx.Dtype
    causal: bool = True

    def __str__(self) -> str:
        kind = "causal" if self.causal else "window"
        name = str(self.dtype).split(".")[-1]
        return f"{self.heads}/{self.groups} heads of {self.size}, {name}, {kind}"


Times = dict[str, float]  #: time (ms) for value and gradients, by implementation


def key() -> str:
    """Returns the key of the stored times: the device and the versions of MLX, the core and
    macOS."""
    return f"{device_key()}, macOS {platform.mac_ver()[0]}"


def known() -> dict[str, dict[str, Times]]:
    """Returns all stored times, keyed by `key()` and by heads."""
    return selfcheck.known("attention")


def milliseconds(heads: Heads, way: str, until: float) -> float | None:
    """Returns the median time, in ms, of up to three calls after a first call, which compiles the
    kernels. Returns None if the implementation does not support the heads.

    No further call begins after `until`, a value of time.perf_counter. Raises RuntimeError if the
    device runs out of memory.
    """
    shapes = ((1, n, TOKENS, heads.size) for n in (heads.heads, heads.groups, heads.groups))
    args = normal(*shapes, dtype=heads.dtype)
    options: dict[str, Any] = {} if heads.causal else {"window": TOKENS // 4}
    for_core = _core.AttentionOptions(scale=heads.size**-0.5, **options)
    run = functools.partial(_core.attention, options=for_core, impl=way)
    times = []
    try:
        mx.eval(args)
        for _ in range(4):
            begin = time.perf_counter()
            if times and begin > until:
                break
            mx.eval(value_and_gradients(run, *args, args[0]))
            times.append(time.perf_counter() - begin)
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return None  # the implementation does not support these heads or this device
    return statistics.median(times[1:] or times) * 1e3


def measure(heads: Heads, seconds: float) -> Times:
    """Times each implementation that supports the heads. The `seconds` are divided evenly among the
    implementations."""
    found: Times = {}
    end = time.perf_counter() + seconds
    for i, way in enumerate(WAYS):
        now = time.perf_counter()
        ms = milliseconds(heads, way, now + max(0.0, end - now) / (len(WAYS) - i))
        if ms is not None:
            found[way] = ms
    return found


def fastest(times: Times) -> str:
    """Returns the implementation with the shortest time, or "" if there are no times."""
    return min((way for way in WAYS if way in times), key=lambda way: times[way], default="")


def settle(wanted: Iterable[Heads], *, measures: bool) -> dict[Heads, Times]:
    """Makes 'auto' use the fastest implementation for these heads from now on. Returns the times of
    each implementation, whether measured by this call or earlier.

    Implementations that failed the self-check are neither used nor timed. `measures` should be
    false if another process may be computing; in that case, nothing is checked or timed, and only
    stored times are used.
    """
    heads = list(dict.fromkeys(wanted))
    failed = self_check() if measures else {}
    everything = known().get(key(), {})
    missing = [x for x in heads if str(x) not in everything] if measures else []
    made: dict[str, Times] = {}
    with suppress(RuntimeError):  # out of memory: the next run measures the missing times
        for x in missing:
            if times := measure(x, SECONDS / len(missing)):
                made[str(x)] = times
    everything = everything | made
    if made:
        selfcheck.keep(everything, "attention", key())
    found = {x: everything[str(x)] for x in heads if str(x) in everything}
    for x, times in found.items():
        serving = {way: ms for way, ms in times.items() if not _off(way, failed)}
        # The choice applies to both half-precision dtypes, because plans do not distinguish them.
        for dtype in HALVES if x.dtype in HALVES else (x.dtype,):
            _core.prefer_attention(x.size, dtype, x.causal, fastest(serving))
    return found


def _off(way: str, failed: dict[str, str]) -> bool:
    """Returns whether this implementation is switched off. It may have been switched off after its
    times were stored."""
    return {"kernel": "attention", "stock": "attention_stock"}.get(way) in failed
