"""Plain MLX implementations of the ops, written to resemble their formulas. The fast
implementations are checked against them.

The plain ops use as much memory as naive code, since they store the scores [T, S] and the logits
[M, V]. Their gradients come from MLX's automatic differentiation. Tests compare the native ops with
tests/lib/oracle.py, which computes derivatives in float64.
"""

import math
import operator
import reprlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from .._core import Base

Segments = Sequence[int] | np.ndarray | mx.array


def packing(weight: Any) -> dict[str, Any]:
    """Returns the quantization parameters of a Base or a quantized module: group_size, bits and
    mode."""
    return {key: getattr(weight, key) for key in ("group_size", "bits", "mode")}


def weight_of(base: Base, dtype: mx.Dtype) -> mx.array:
    """Returns the weight W [out, in], dequantized, in `dtype`."""
    if base.scales is None:
        return base.weight.astype(dtype)
    return mx.dequantize(base.weight, base.scales, base.biases, **packing(base)).astype(dtype)


# ---- attention


def segment_ranges(segments: Segments, s: int) -> list[tuple[int, int]]:
    """Returns the range of keys [begin, end) of each segment, in order. Keys outside all ranges are
    padding.

    If `segments` is a sequence, it contains offsets: 0, the start of each further segment, and the
    end of the last one, which is at most S. If it is an array, it contains an integer id for each
    key; keys of a segment have the same id, and ids below 0 mark padding. Raises ValueError if the
    segments do not have one of these forms.
    """
    expected = (
        f"[attention] expected segments to be offsets that increase from 0 to at most S = {s}, or"
    )
    if not isinstance(segments, (np.ndarray, mx.array)):
        offsets = [operator.index(x) for x in segments]
        rising = all(begin < end for begin, end in pairwise(offsets))
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] > s or not rising:
            raise ValueError(f"{expected} an array of ids; got offsets {reprlib.repr(offsets)}.")
        return list(pairwise(offsets))
    if isinstance(segments, mx.array):
        integer = mx.issubdtype(segments.dtype, mx.integer)
    else:
        integer = np.issubdtype(segments.dtype, np.integer)
    if tuple(segments.shape) != (s,) or not integer:
        got = f"an array {list(segments.shape)} of {segments.dtype}"
        raise ValueError(f"{expected} an array of {s} integer ids; got {got}.")
    ids = np.asarray(segments)
    begins = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    ends = np.append(begins[1:], s)
    begins, ends, runs = (x[ids[begins] >= 0] for x in (begins, ends, ids[begins]))
    known, times = np.unique(runs, return_counts=True)
    if (times > 1).any():
        twice = known[times > 1][0]
        raise ValueError(
            f"[attention] expected equal ids to be adjacent; got id {twice} in two places."
        )
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def visible(
    t: int, s: int, q_start: int | None, window: int | None, segments: Segments | None
) -> mx.array:
    """Returns a boolean array [T, S] that says whether query t attends to key s."""
    offset = s - t if q_start is None else q_start
    query = mx.arange(t)[:, None] + offset
    key = mx.arange(s)[None]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    if segments is not None:
        ids = mx.full(s, -1)
        for i, (begin, end) in enumerate(segment_ranges(segments, s)):
            ids[begin:end] = i
        own = ids[offset : offset + t, None]
        seen = seen & (ids[None] == own) & (own >= 0)
    return seen


def attention(q, k, v, *, scale, window=None, segments=None, softcap=None, q_start=None):
    """o = softmax(scale·q·kᵀ)·v over the keys to which each query attends"""
    share = q.shape[1] // k.shape[1]
    k, v = mx.repeat(k, share, axis=1), mx.repeat(v, share, axis=1)
    seen = visible(q.shape[2], k.shape[2], q_start, window, segments)
    s = scale * (q.astype(mx.float32) @ k.astype(mx.float32).swapaxes(-1, -2))
    if softcap is not None:
        s = softcap * mx.tanh(s / softcap)
    # p is 0 for a query that attends to nothing. Masked scores are finite so that the gradient for
    # such a query is not NaN.
    lowest = mx.finfo(mx.float32).min
    p = mx.where(seen, mx.softmax(mx.where(seen, s, lowest), axis=-1), 0)
    return (p @ v.astype(mx.float32)).astype(q.dtype)


# ---- elementwise and rows


def swiglu(gate, up):
    """y = gate·σ(gate)·up"""
    return gate * mx.sigmoid(gate) * up


def geglu(gate, up):
    """y = gelu(gate)·up, gelu(x) = x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))"""
    x = gate.astype(mx.float32)
    t = mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return (x / 2 * (1 + t) * up.astype(mx.float32)).astype(gate.dtype)


def rms_norm(x, weight, eps):
    """y = x·r·weight, r = 1 / sqrt(mean(x²) + eps)"""
    x32 = x.astype(mx.float32)
    r = mx.rsqrt((x32 * x32).mean(axis=-1, keepdims=True) + eps)
    return (x32 * r * weight).astype(x.dtype)


def rms_norm_beside(h, weight, eps):
    """h and rms_norm(h)"""
    return [h, rms_norm(h, weight, eps)]


def add_rms_norm(h, x, weight, eps, factor=None):
    """(h + rms_norm(x))·factor"""
    y = h + rms_norm(x, weight, eps)
    return y if factor is None else y * factor


def positions_of(offset: int, n: int, segments: Segments | None) -> mx.array:
    """Returns an int32 array [n] with the positions of the tokens from `offset` on, each counted
    from the start of its segment."""
    places = np.arange(offset, offset + n)
    if segments is not None:
        for begin, end in segment_ranges(segments, offset + n):
            places[max(begin - offset, 0) : max(end - offset, 0)] -= begin
    return mx.array(places.astype(np.int32))


def rope(x, dims, *, traditional=False, base=None, scale=1.0, offset=0, freqs=None, segments=None):
    """(a, b) → (a·cos − b·sin, a·sin + b·cos), angle = position·scale / freqs"""
    if freqs is None:
        assert base is not None
        freqs = mx.power(base, mx.arange(0, dims, 2) / dims)
    angle = positions_of(offset, x.shape[2], segments)[:, None] * scale / freqs
    c, s = mx.cos(angle), mx.sin(angle)
    x32 = x[..., :dims].astype(mx.float32)
    a, b = (x32[..., ::2], x32[..., 1::2]) if traditional else mx.split(x32, 2, axis=-1)
    pair = (a * c - b * s, a * s + b * c)
    y = mx.stack([*pair], axis=-1).flatten(-2) if traditional else mx.concatenate([*pair], axis=-1)
    return mx.concatenate([y.astype(x.dtype), x[..., dims:]], axis=-1)


# ---- products with a frozen weight


def dropped(x, dropout, key):
    """mask∘x / (1 − dropout), or x if there is no key"""
    if key is None:
        return x
    keep = 1 - dropout
    return mx.where(mx.random.bernoulli(keep, x.shape, key), x, 0) / keep


def lora_linear(x, base, a=None, b=None, scale=1.0, *, dropout=0.0, key=None):
    """y = x·Wᵀ + bias + scale·(x'·a)·b, x' = mask∘x / (1 − dropout)"""
    y = x @ weight_of(base, x.dtype).T
    if base.bias is not None:
        y = y + base.bias.astype(x.dtype)
    if a is None or b is None:
        return y
    low = dropped(x.reshape(-1, x.shape[-1]), dropout, key).reshape(x.shape) @ a.astype(x.dtype)
    return y + (scale * low @ b.astype(x.dtype)).astype(x.dtype)


def lora_linears(x, linears, *, dropout=0.0, keys=()):
    """the lora_linear of each layer, each with its own key"""
    return [
        lora_linear(x, w.base, w.a, w.b, w.scale, dropout=dropout, key=key)
        for w, key in zip(linears, keys or [None] * len(linears), strict=True)
    ]


def decode_linears(x, bases, a, b, gains, picks):
    """y_j = (x·W_jᵀ + z_j·b_jᵀ)·gain_j + bias_j, z = x·aᵀ, where row i of x [m, in] uses adapter
    picks[i] of a, b and gains"""
    ys, begin, x = [], 0, x.astype(mx.float32)
    for base, own, gain in zip(bases, b, gains, strict=True):
        y = x @ weight_of(base, mx.float32).T
        if own is not None:
            end = begin + own.shape[-1]
            z = (a[picks, begin:end].astype(mx.float32) @ x[..., None])[..., 0]
            y += (own[picks].astype(mx.float32) @ z[..., None])[..., 0]
            begin = end
        if gain is not None:
            y *= gain[picks]
        ys.append(y if base.bias is None else y + base.bias)
    return ys


def lora_qkv(x, linears, heads, groups, dims, *, norms=(), **how):
    """the outputs of lora_linears, split into heads and normalized; q and k are then rotated by
    rope"""
    ys = lora_linears(x, linears)
    ys += ys[1:] if len(ys) == 2 else []
    for i, y in enumerate(ys):
        y = y.reshape(*y.shape[:2], groups if i else heads, -1)
        if i < len(norms) and norms[i] is not None:
            y = rms_norm(y, norms[i].weight, norms[i].eps)
        y = y.transpose(0, 2, 1, 3)
        ys[i] = rope(y, dims, **how) if i < 2 else y
    return ys


def lora_glu_mlp(x, gate, up, down, *, gelu=False):
    """y = down(act(gate(x))·up(x))"""
    g, u = (lora_linear(x, w.base, w.a, w.b, w.scale) for w in (gate, up))
    h = geglu(g, u) if gelu else swiglu(g, u)
    return lora_linear(h, down.base, down.a, down.b, down.scale)


def _logits(h, head, softcap):
    z = (h @ weight_of(head, h.dtype).T).astype(mx.float32)
    if head.bias is not None:
        z = z + head.bias
    return z if softcap is None else softcap * mx.tanh(z / softcap)


def _onehot(index, n):
    """Returns a boolean array [M, n] that is true in column index[i] of row i."""
    return mx.arange(n)[None] == index[:, None]


def _picked(z, targets):
    """z[target] of each row, without take_along_axis, which would take 13 s to compile on CUDA
    together with its gradient"""
    return mx.where(_onehot(targets, z.shape[1]), z, 0).sum(axis=-1)


def take_rows(x, index):
    """x[index], as a product with a one-hot matrix, so that the gradient is a matrix product,
    too"""
    rows = _onehot(index.reshape(-1), x.shape[0]).astype(x.dtype) @ x.reshape(x.shape[0], -1)
    return rows.reshape(*index.shape, *x.shape[1:])


def embedded_rows(table, index, *, begin=0, end=None, factor=1.0):
    """table[index, begin:end]·factor"""
    dtype = table.weight.dtype if table.scales is None else table.scales.dtype
    dtype = mx.bfloat16 if dtype == mx.uint8 else dtype
    return take_rows(weight_of(table, dtype)[:, begin:end], index) * factor


def own_input(x, weight, eps, table, index, begin, factors):
    """(norm(x·f0) + rows·f1)·f2"""
    rows = embedded_rows(table, index, begin=begin, end=begin + x.shape[-1], factor=factors[1])
    return (rms_norm(x * factors[0], weight, eps) + rows) * factors[2]


def linear_cross_entropy(h, head, targets, weights=None, *, softcap=None, label_smoothing=0.0):
    """Σ weights·(lse(z) − (1 − ε)·z[target] − ε·mean(z)), z = h·Wᵀ + bias, ε = label_smoothing"""
    z = _logits(h, head, softcap)
    weights = mx.ones(h.shape[0]) if weights is None else weights
    weights = mx.where(targets < 0, 0.0, weights)
    likely = _picked(z, targets)
    likely = (1 - label_smoothing) * likely + label_smoothing * z.mean(axis=-1)
    return (weights * (mx.logsumexp(z, axis=-1) - likely)).sum()


def linear_log_probs(h, head, targets, *, softcap=None):
    """log_p = z[target] − lse(z), z = h·Wᵀ + bias; 0 where target < 0"""
    z = _logits(h, head, softcap)
    return mx.where(targets < 0, 0.0, _picked(z, targets) - mx.logsumexp(z, axis=-1))
