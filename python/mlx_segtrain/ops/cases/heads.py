"""Checks `lora_qkv`, which splits the output of a matrix multiplication into the heads q, k and v,
and rotates q and k. On CUDA, a single kernel does this."""

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import mlx.core as mx

from ... import _core
from .. import reference, selfcheck
from .linear import with_factors


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    """Yields checks with two rows, packed or not, in three variants: with q, k and v from three
    layers, with keys and values from the same layer, and with q only."""
    if device != "cuda":
        return
    heads, groups, d, width = 4, 2, 64, 256
    out = (heads + 2 * groups) * d
    w, x = selfcheck.normal((out, width), (2, rows, width), dtype=mx.bfloat16)
    a, b = selfcheck.normal((width, 8), (8, heads * d), seed=1)
    ends = [0, heads * d, (heads + groups) * d, out]
    linears = []
    for begin, end in pairwise(ends):
        base = _core.Base(*mx.quantize(w[begin:end] / 16, bits=4), group_size=64, bits=4)
        linears.append(_core.Linear(base, a / 16, b[:, : end - begin], 0.5))
    factors = [x for linear in linears for x in (linear.a, linear.b) if x is not None]
    yield from _with_norms(x, linears)
    for traditional in (False, True):
        segments = [(0, 7), (7, rows // 3), (rows // 3, rows)] if traditional else None

        def run(x: mx.array, *ab: mx.array, of=_core, segments: Any = segments, **how) -> mx.array:
            own, more = with_factors(linears, ab), {"base": 1e4, "segments": segments, **how}
            return mx.concatenate(of.lora_qkv(x, own, heads, groups, 48, **more), 1)

        offsets = segments and [0, *(end for _, end in segments)]
        kernel = functools.partial(run, traditional=traditional)
        plain = functools.partial(kernel, of=reference, segments=offsets)
        case = "neighbours, packed" if traditional else "halves"
        yield selfcheck.Call("heads", case, kernel, plain, [x, *factors])


def _with_norms(x: mx.array, linears: list[_core.Linear]) -> Iterator[selfcheck.Call]:
    weights = selfcheck.normal((3, 64), dtype=mx.bfloat16, seed=2)[0]
    norms = [_core.HeadNorm(weight, 1e-6) for weight in weights]
    for n, case in ((3, "norms"), (2, "norms, values are keys"), (1, "norm of q")):
        own = linears[:n]
        factors = [x for linear in own for x in (linear.a, linear.b) if x is not None]

        def run(x: mx.array, *ab: mx.array, of=_core, own=own) -> mx.array:
            more = {"base": 1e4, "offset": 3, "norms": norms}
            return mx.concatenate(of.lora_qkv(x, with_factors(own, ab), 4, 2, 48, **more), 1)

        plain = functools.partial(run, of=reference)
        yield selfcheck.Call("heads", case, run, plain, [x, *factors])
