"""Frozen linear layers with and without LoRA factors, and their float64 values."""

import mlx.core as mx
import numpy as np

from lib.checks import f64, rand
from mlx_segtrain import ops


def base_of(rng, n, k, base, bias=None):
    """Returns a base weight and its float64 values."""
    w = mx.array(rng.standard_normal((n, k)).astype(np.float32))
    if base is None:
        return ops.Base(w, bias=bias), f64(w)
    mode, bits, group = base
    quant = {"group_size": group, "bits": bits, "mode": mode}
    packed, scales, *biases = mx.quantize(w, **quant)
    values = mx.dequantize(packed, scales, *biases, **quant, dtype=mx.float32)
    return ops.Base(packed, scales, *biases or [None], bias, **quant), f64(values)


BASES = [None, ("affine", 4, 32), ("affine", 6, 32), ("mxfp8", 8, 32)]


def linears_of(rng, n_in, widths, ranks, base, dtype, bias=True):
    """Returns layers, and the float64 values (weight, bias, a, b, scale) of each layer. a and b are
    rounded to `dtype`."""
    linears, exact = [], []
    for i, (width, rank) in enumerate(zip(widths, ranks, strict=True)):
        own_bias, bias64 = rand(rng, width) if bias else (None, 0.0)
        frozen, w64 = base_of(rng, width, n_in, base, own_bias)
        scale = 0.5 + i
        if not rank:
            linears.append(ops.Linear(frozen))
            exact.append((w64, bias64, None, None, scale))
            continue
        a, b = rand(rng, n_in, rank)[0] / 8, rand(rng, rank, width)[0] / 8
        linears.append(ops.Linear(frozen, a, b, scale))
        a64, b64 = (f64(x.astype(getattr(mx, dtype))) for x in (a, b))
        exact.append((w64, bias64, a64, b64, scale))
    return linears, exact


def with_factors(linears, factors):
    """Returns copies of the layers with new values for a and b."""
    left = list(factors)
    return [w if w.a is None else w.with_factors(left.pop(0), left.pop(0)) for w in linears]


def factors_of(linears):
    return [x for w in linears if w.a is not None for x in (w.a, w.b)]
