"""The text of metal/ run on the CPU, against the float64 oracle: docs/metal_on_linux.md."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from lib import oracle
from lib.specs import Attention, ids
from metal_emulator import MetalError, kernels
from mlx_segtrain.ops import reference

pytestmark = pytest.mark.acceptance

SPECS = [
    # Under 8 queries `first`, and here lse and delta too, lie in constant memory.
    (Attention(1, 2, 1, 3, 5, 64), "float32"),
    (Attention(1, 2, 1, 64, 64, 64), "float16"),
    (Attention(1, 3, 1, 33, 33, 64), "bfloat16"),
    (Attention(2, 4, 2, 31, 65, 64, options={"segments": [0, 1, 30, 50, 65]}), "bfloat16"),
    (Attention(1, 2, 2, 70, 70, 64, options={"softcap": 2.0}), "float32"),
    (Attention(1, 2, 1, 40, 100, 80, options={"window": 17}), "float16"),
    (Attention(1, 2, 1, 45, 90, 96, options={"q_start": 30}), "bfloat16"),
    (Attention(1, 2, 1, 66, 66, 128, options={"window": 8}), "bfloat16"),
    (Attention(1, 2, 1, 50, 64, 128, options={"segments": [0, 40, 64], "window": 20}), "float32"),
    (Attention(1, 1, 1, 33, 40, 192), "float16"),
    (Attention(1, 2, 1, 49, 49, 256, options={"softcap": 5.0, "window": 30}), "bfloat16"),
    (Attention(1, 1, 1, 17, 20, 256), "float32"),
    # Padding: of a tile and more in the middle, under a window, behind the last offset, of all.
    (Attention(1, 2, 1, 120, 130, 64, options={"segments": ids(30, -3, 20, -70, 7)}), "float16"),
    (
        Attention(1, 2, 1, 70, 70, 96, options={"segments": ids(-9, 40, -2, 19), "window": 12}),
        "bfloat16",
    ),
    (Attention(1, 1, 1, 75, 75, 128, options={"segments": [0, 9, 20], "softcap": 2.0}), "float32"),
    (Attention(1, 2, 2, 2, 5, 64, options={"segments": ids(3, -2)}), "float32"),
]


def rand(rng, *shape, dtype="float32"):
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(getattr(mx, dtype))


def f64(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


def first_keys(spec):
    """(first [T], q_start)"""
    rest = {key: x for key, x in spec.options.items() if key != "softcap"}
    start = spec.options.get("q_start", spec.S - spec.T)
    seen = oracle.visible(spec.T, spec.S, **rest)
    behind = start + np.arange(spec.T) + 1  # where a query sees nothing
    return np.where(seen.any(axis=1), seen.argmax(axis=1), behind).tolist(), start


def setup(spec, dtype, seed=0):
    rng = np.random.default_rng(seed)
    q, do = (rand(rng, spec.B, spec.H, spec.T, spec.D, dtype=dtype) for _ in range(2))
    k, v = (rand(rng, spec.B, spec.G, spec.S, spec.D, dtype=dtype) for _ in range(2))
    return q, k, v, do, {"scale": spec.D**-0.5, **spec.options}


def launch(spec, q, k, v, do, of=kernels.KERNELS):
    """o, lse, dq, dk, dv"""
    rest = *first_keys(spec), spec.D**-0.5, spec.options.get("softcap"), of
    o, lse = kernels.attention(q, k, v, *rest)
    return [o, lse, *kernels.attention_vjp(q, k, v, o, lse, do, *rest)]


def true_lse(q, k, scale, softcap=None, **options):
    s = scale * q @ k.repeat(q.shape[1] // k.shape[1], 1).swapaxes(-1, -2)
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    seen = oracle.visible(q.shape[2], k.shape[2], **options)
    with np.errstate(divide="ignore"):
        return np.log(np.where(seen, np.exp(s), 0).sum(-1))


def check(spec, dtype, of=kernels.KERNELS):
    q, k, v, do, options = setup(spec, dtype)
    got = launch(spec, q, k, v, do, of)
    arrays = [f64(x) for x in (q, k, v, do)]
    truth = [
        oracle.attention(*arrays[:3], **options),
        *oracle.attention_vjp(*arrays, **options),
    ]
    plain = [
        reference.attention(q, k, v, **options),
        *reference.attention_vjp(q, k, v, do, **options),
    ]
    lse, truth_lse = f64(got.pop(1)), true_lse(*arrays[:2], **options)
    blind = np.isneginf(truth_lse)
    assert (np.isneginf(lse) == blind).all()
    oracle.assert_close("lse", lse[~blind], truth_lse[~blind], 1e-6)
    for name, x, ref, true in zip(["o", "dq", "dk", "dv"], got, plain, truth, strict=True):
        oracle.assert_no_worse(name, f64(x), f64(ref), true, dtype)


@pytest.mark.parametrize(("spec", "dtype"), SPECS, ids=lambda x: str(x))
def test_attention(spec, dtype):
    check(spec, dtype)


def test_same_call_is_bitwise_equal():
    spec, dtype = SPECS[2]
    q, k, v, do, _ = setup(spec, dtype)
    for x, y in zip(launch(spec, q, k, v, do), launch(spec, q, k, v, do), strict=True):
        assert mx.array_equal(x, y)


# ---- the tests themselves: broken text does not pass

RAGGED = Attention(1, 2, 1, 45, 77, 64), "float32"


def broken(name, old, new, at=0):
    """The kernels, one of them with occurrence `at` of `old` replaced."""
    kernel = kernels.KERNELS[name]
    parts = kernel.header.split(old)
    assert len(parts) > at + 1
    header = old.join(parts[: at + 1]) + new + old.join(parts[at + 1 :])
    return kernels.KERNELS | {name: replace(kernel, header=header)}


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FORWARD, DQ, DKV = "attention", "attention_vjp_q", "attention_vjp_kv"


def test_number_of_barriers():
    assert kernels.KERNELS[FORWARD].header.count(BARRIER) == 7


@pytest.mark.parametrize(("at", "name"), list(enumerate([FORWARD] * 2 + [DQ] * 2 + [DKV] * 3)))
def test_every_barrier_is_needed(name, at):
    with pytest.raises(MetalError, match=r"race|read before it is written"):
        check(*RAGGED, broken(name, BARRIER, "", at))


@pytest.mark.parametrize(
    ("name", "old", "new", "error"),
    [
        (FORWARD, "min(begin + row, end - 1)", "(begin + row)", r"read out of bounds: [kv]\["),
        (FORWARD, "if (row >= q1) return;", "", "after another thread wrote it"),
        (DKV, "if (row < k1) store", "if (row < k1 && simd % 4) store", "is never written"),
        (
            DKV,
            "+ lane;\n  Matrix sum",
            "+ lane + 64;\n  Matrix sum",
            "write out of bounds: weights",
        ),
    ],
)
def test_broken_memory_access(name, old, new, error):
    with pytest.raises(MetalError, match=error):
        check(*RAGGED, broken(name, old, new))


ACROSS = "(8 * n + at.col) * Tile<T, D>::stride + d + at.row"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (FORWARD, ACROSS, "(8 * n + at.row) * Tile<T, D>::stride + d + at.col"),
        (FORWARD, "l * shrink + ", "l + "),
        (DQ, "dp[n].thread_elements()[e] - delta_row", "dp[n].thread_elements()[e]"),
        (DKV, "key > q_start + t ||", "key > q_start + t + 1 ||"),
        (DKV, "makes_dk ? scale : 1", "scale"),
        (DKV, "* BQ; q0 < shape.queries", "* BQ; q0 + BQ <= shape.queries"),
    ],
)
def test_broken_mathematics(name, old, new):
    with pytest.raises(AssertionError):
        check(*RAGGED, broken(name, old, new))


PADDED = Attention(1, 1, 1, 40, 45, 64, options={"segments": ids(7, -2, 20, -16)}), "float32"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (FORWARD, "l > 0 ? 1 / l : 0", "1 / l"),
        (FORWARD, "top == -INFINITY ? 0 : top", "top"),
        (FORWARD, "l > 0 ? m + log(l) : -INFINITY", "m"),
        (DQ, "(key < begin || key >= end)", "(key >= end)"),
        (DKV, "key < first[t] || ", ""),
    ],
)
def test_padding_that_is_seen(name, old, new):
    at = 1 if name == DQ else 0  # the forward kernel has the same line
    with pytest.raises(AssertionError):
        check(*PADDED, broken(name, old, new, at))


# ---- rows of a block of scores


@pytest.mark.parametrize("scores", ["float32", "T"])
@pytest.mark.parametrize(
    ("dtype", "softcap", "sizes", "period"),
    [
        ("float32", 2.0, (2, 5, 40), 5),
        ("float16", None, (2, 12, 9), 4),  # three bands
        ("bfloat16", None, (3, 4, 601), 4),
        ("float16", None, (1, 1, 4), 1),  # every array in constant memory
    ],
)
def test_rows(dtype, softcap, sizes, period, scores):
    heads, nq, nk = sizes
    rng = np.random.default_rng(nk)
    q0, k0, scale = 3, 2, 0.3
    q_start = k0 + nk - period - q0  # the last query of a band sees up to its last key
    # Query q0 starts within the block, and the last of several sees nothing.
    first = [0] * q0 + [k0 + 1 + i for i in range(nq)]
    if nq > 1:
        first[-1] = k0 + nk + nq
    held = dtype if scores == "T" else "float32"
    s, dp = (rand(rng, heads * nq, nk, dtype=held) * 3 for _ in range(2))
    delta = rand(rng, heads * nq)
    place = first, q_start, q0, k0, nq, period
    p, lse = kernels.softmax_rows(s, *place, getattr(mx, dtype), softcap)
    again, ds = kernels.softmax_vjp_rows(
        s, dp, lse, delta, *place, scale, getattr(mx, dtype), softcap
    )

    def plain(s, dp, delta, where, exp, tanh, sum_, log):
        s = s if softcap is None else softcap * tanh(s / softcap)
        e = where(seen, exp(s), 0)
        total = sum_(e, -1)
        p = e / where(total > 0, total, 1)[:, None]
        slope = 1 if softcap is None else 1 - (s / softcap) ** 2
        return p, p * (dp - delta[:, None]) * scale * slope, log(total)

    row = np.arange(heads * nq)[:, None] % nq
    key, t = k0 + row // period * period + np.arange(nk)[None], q0 + row
    seen = (key >= np.array(first)[t]) & (key <= q_start + t)
    with np.errstate(divide="ignore"):
        truth = plain(f64(s), f64(dp), f64(delta), np.where, np.exp, np.tanh, np.sum, np.log)
    seen = mx.array(seen)
    s, dp = s.astype(mx.float32), dp.astype(mx.float32)
    rough = plain(s, dp, delta, mx.where, mx.exp, mx.tanh, mx.sum, mx.log)
    for name, x, ref, true in zip(("p", "ds"), (p, ds), rough, truth, strict=False):
        ref = ref.astype(getattr(mx, dtype))
        oracle.assert_no_worse(name, f64(x), f64(ref), true, dtype)
    oracle.assert_no_worse("p again", f64(again), f64(rough[0].astype(p.dtype)), truth[0], dtype)
    blind = np.isinf(truth[2])
    assert blind.sum() == (heads if nq > 1 else 0)
    assert (np.isneginf(np.array(lse)) == blind).all() and not f64(p)[blind].any()
    oracle.assert_close("lse", f64(lse)[~blind], truth[2][~blind], 1e-6)
