"""Runs the Metal attention kernels on the CPU, and compares them with the float64 oracle.

See docs/metal_on_linux.md.
"""

import functools

import mlx.core as mx
import numpy as np
import pytest

from lib import oracle
from lib.specs import Attention, ids
from metal_emulator import MetalError
from metal_emulator.kernels import KERNELS, Change, emulated, launched
from mlx_segtrain import _core, ops
from mlx_segtrain.ops import reference

pytestmark = pytest.mark.acceptance

SPECS = [
    # Fewer than 8 queries, so `first`, lse and delta are in constant memory.
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
    # In this order: padding in the middle that is longer than a tile, padding with a window,
    # padding after the last offset, and queries that are all padding.
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


def setup(spec, dtype, seed=0):
    rng = np.random.default_rng(seed)
    q, do = (rand(rng, spec.B, spec.H, spec.T, spec.D, dtype=dtype) for _ in range(2))
    k, v = (rand(rng, spec.B, spec.G, spec.S, spec.D, dtype=dtype) for _ in range(2))
    return q, k, v, do, {"scale": spec.D**-0.5, **spec.options}


def launch(q, k, v, do, options, *changes, impl="kernel"):
    """Returns o, lse, dq, dk and dv."""
    with emulated(*changes):
        o, lse = ops.attention_forward(q, k, v, impl=impl, **options)

        def attention(q, k, v):
            return ops.attention(q, k, v, saved=[o, lse], impl=impl, **options)

        return [o, lse, *mx.vjp(attention, [q, k, v], [do])[1]]


def true_lse(q, k, scale, softcap=None, **options):
    s = scale * q @ k.repeat(q.shape[1] // k.shape[1], 1).swapaxes(-1, -2)
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    seen = oracle.visible(q.shape[2], k.shape[2], **options)
    with np.errstate(divide="ignore"):
        return np.log(np.where(seen, np.exp(s), 0).sum(-1))


def check(spec, dtype, *changes, impl="kernel"):
    q, k, v, do, options = setup(spec, dtype)
    got = launch(q, k, v, do, options, *changes, impl=impl)
    arrays = [f64(x) for x in (q, k, v, do)]
    truth = [
        oracle.attention(*arrays[:3], **options),
        *oracle.attention_vjp(*arrays, **options),
    ]
    (o,), grads = mx.vjp(functools.partial(reference.attention, **options), [q, k, v], [do])
    plain = [o, *grads]
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
    arrays = setup(spec, dtype)
    for x, y in zip(launch(*arrays), launch(*arrays), strict=True):
        assert mx.array_equal(x, y)


def check_small_shares(*changes):
    """Checks a gradient to which many keys contribute values that would underflow in half
    precision."""
    q, k, v, do, options = setup(Attention(1, 1, 1, 32, 2048, 64), "float16")
    q, do = q * 0.1, do * 2.0**-10
    dq = launch(q, k, v, do, options, *changes)[2]
    truth = oracle.attention_vjp(*map(f64, (q, k, v, do)), **options)[0]
    oracle.assert_close("dq", f64(dq), truth, oracle.EPS["float16"])


def test_small_shares_of_a_gradient():
    check_small_shares()
    with pytest.raises(AssertionError, match="dq: relative L2"):
        check_small_shares(Change("attention_vjp_kv_ds", "W(x_e)", "W(T(x_e))"))


# ---- planted faults must be detected

RAGGED = Attention(1, 2, 1, 45, 77, 64), "float32"


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FORWARD, DKV, DQ = "attention", "attention_vjp_kv_ds", "attention_vjp_q_ds"


def test_number_of_barriers():
    assert KERNELS[FORWARD].header.count(BARRIER) == 7


@pytest.mark.parametrize(("at", "name"), list(enumerate([FORWARD] * 2 + [DKV] * 3 + [DQ] * 2)))
def test_every_barrier_is_needed(name, at):
    with pytest.raises(MetalError, match=r"race|read before it is written"):
        check(*RAGGED, Change(name, BARRIER, "", at))


@pytest.mark.parametrize(
    ("name", "old", "new", "error"),
    [
        (FORWARD, "min(begin + row, end - 1)", "(begin + row)", r"read out of bounds: [kv]\["),
        (FORWARD, "if (row[r] >= q1) continue;", "", "after another thread wrote it"),
        (DKV, "if (row < k1) store", "if (row < k1 && simd % 4) store", "is never written"),
        (
            DKV,
            "(shape.queries + BLOCK - 1) / BLOCK * BLOCK; q0 +=",
            "shape.queries / BQ * BQ; q0 +=",
            r"ds\[\d+\] is never written",
        ),
        (
            DKV,
            "+ lane * E;\n  constexpr",
            "+ lane * E + 64;\n  constexpr",
            "write out of bounds: weights",
        ),
    ],
)
def test_broken_memory_access(name, old, new, error):
    with pytest.raises(MetalError, match=error):
        check(*RAGGED, Change(name, old, new))


ACROSS = "at.col * stride + W * at.row"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (FORWARD, ACROSS, "at.row * stride + W * at.col"),
        (FORWARD, "l[r] * shrink + ", "l[r] + "),
        (DKV, " - delta[bht + t])", ")"),
        (DKV, "row > q_start + t ||", "row > q_start + t + 1 ||"),
        (DKV, "rounded[e] = W(x_e)", "rounded[e] = W(shares[e])"),
        (DQ, "index[k0 / BLOCK] + own_block", "index[k0 / BLOCK]"),
        (DQ, "(own_block + 1) * BLOCK", "own_block * BLOCK"),
        (DKV, "makes_dk ? scale : 1", "scale"),
    ],
)
def test_broken_mathematics(name, old, new):
    with pytest.raises(AssertionError):
        check(*RAGGED, Change(name, old, new))


PADDED = Attention(1, 1, 1, 40, 45, 64, options={"segments": ids(7, -2, 20, -16)}), "float32"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (FORWARD, "l[r] > 0 ? 1 / l[r] : 0", "1 / l[r]"),
        (FORWARD, "top == -INFINITY ? 0 : top", "top"),
        (FORWARD, "l[r] > 0 ? m[r] + log(l[r]) : -INFINITY", "m[r]"),
        (FORWARD, "(key < begin[r] || key > q_start + t[r])", "(key > q_start + t[r])"),
        (DKV, "row < first[t] || ", ""),
    ],
)
def test_padding_that_is_seen(name, old, new):
    with pytest.raises(AssertionError):
        check(*PADDED, Change(name, old, new))


# ---- the host code


def test_launches():
    """Checks the launches for 45 queries and 77 keys in tiles of 32."""
    spec, dtype = RAGGED
    q, k, v, do, options = setup(spec, dtype)
    with emulated() as launches:
        mx.eval(mx.vjp(lambda *x: ops.attention(*x, impl="kernel", **options), [q, k, v], [do])[1])
    assert [(x.name, x.grid, x.threadgroup) for x in launches] == [
        (FORWARD, (128, 2, 1), (128, 1, 1)),
        (DKV, (768, 1, 1), (256, 1, 1)),
        (DQ, (128, 2, 1), (128, 1, 1)),
    ]
    assert dict(launches[0].arguments) == {
        **{"T": mx.float32, "D": 64, "CAP": False},
        **{"ROWS": 64, "THREADS": 128},
    }


@pytest.fixture
def one_group_a_launch():
    before = _core.set_longest_launch(0)
    yield
    _core.set_longest_launch(before)


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (Attention(1, 2, 1, 70, 101, 64), "float32"),
        (Attention(2, 4, 2, 70, 70, 64, options={"window": 17}), "bfloat16"),
        (Attention(1, 2, 1, 66, 130, 64, options={"segments": ids(40, -37, 53)}), "float16"),
        (Attention(1, 1, 1, 40, 130, 64, options={"q_start": 20}), "float32"),
        (Attention(1, 4, 4, 150, 170, 96), "bfloat16"),
        (Attention(2, 2, 2, 129, 140, 64, options={"window": 9}), "float16"),
    ],
    ids=str,
)
def test_parts_add_up(spec, dtype, one_group_a_launch):
    """Several launches, each for a few rows and heads, compute the same o, lse and dq as a single
    launch.

    dk and dv are summed over the launches, so their rounding may differ.
    """
    arrays = setup(spec, dtype)
    check(spec, dtype)
    parts = launch(*arrays)
    _core.set_longest_launch(1)
    for name, x, y in zip(["o", "lse", "dq", "dk", "dv"], launch(*arrays), parts, strict=True):
        if name in ("o", "lse", "dq"):
            assert mx.array_equal(x, y), name
        else:
            oracle.assert_close(name, f64(y), f64(x), 2 * oracle.EPS[dtype])


#: The number of matrix products per block of scores in each kernel.
PRODUCTS = {FORWARD: 2, DKV: 4, DQ: 1}


@pytest.mark.parametrize(
    "options", [{}, {"window": 4096}, {"segments": [0, 1000, 90000, 131072]}], ids=str
)
def test_no_launch_takes_long_on_an_m1(options):
    """For 131,072 tokens and 32 heads, each launch takes less than 0.3 s at the speed that
    docs/performance.md predicts for an M1."""
    heads, groups, t, d = 32, 8, 131072, 128
    q = mx.zeros((1, heads, t, d), mx.bfloat16)
    k = mx.zeros((1, groups, t, d), mx.bfloat16)
    options = {"scale": 1.0, **options}
    with launched() as launches:
        mx.vjp(lambda *x: ops.attention(*x, impl="kernel", **options), [q, k, k], [q])
    covered = dict.fromkeys(PRODUCTS, 0)
    for x in launches:
        shapes = {name: y.shape for name, y in x.inputs}
        rows, keys = shapes["lse" if "lse" in shapes else "q"][2], shapes["k"][2]
        own_heads = shapes["lse" if "lse" in shapes else "q"][1]
        first = np.array(dict(x.inputs)["first"])[:rows].astype(np.int64)
        start = dict(x.inputs)["q_start"].item()
        covered[x.name] += rows * own_heads
        last = np.minimum(start + np.arange(len(first)), keys - 1)
        pairs = np.maximum(0, last - np.maximum(first, 0) + 1).sum()
        assert pairs * PRODUCTS[x.name] * d * own_heads / 5e11 < 0.3
        for name, shape, dtype in x.outputs:
            if name == "ds":
                # At most 128 MB, plus partial blocks at the edges.
                assert np.prod(shape) * dtype.size <= 160 << 20
    assert covered == dict.fromkeys(PRODUCTS, t * heads)
    assert len(launches) > 2 * len(PRODUCTS)


@pytest.mark.parametrize("name", [FORWARD, DQ, DKV])
@pytest.mark.parametrize("constant", ["ROWS", "THREADS"])
def test_groups_that_the_text_does_not_have(name, constant):
    with pytest.raises(MetalError, match="the host launches groups of another size"):
        check(*RAGGED, Change(name, f"{constant} ==", f"{constant} == 8 +"))


# ---- rows of a block of scores

ROWS = [
    (Attention(1, 2, 1, 9, 40, 8, options={"softcap": 2.0}), "float32"),
    (Attention(1, 2, 2, 40, 40, 24, options={"segments": ids(23, -17)}), "float16"),
    (Attention(1, 2, 1, 4, 601, 8), "bfloat16"),
    # A window is computed in bands of 128 queries; the last band is shorter.
    (Attention(1, 1, 1, 270, 300, 8, options={"window": 6}), "float32"),
    (Attention(1, 1, 1, 1, 4, 8), "float32"),  # all arrays are in constant memory
]


@pytest.mark.parametrize(("spec", "dtype"), ROWS, ids=lambda x: str(x))
def test_rows(spec, dtype):
    check(spec, dtype, impl="blocked")


@pytest.mark.parametrize(
    ("at", "change"),
    [
        (3, Change("softmax_rows", "k0 += i / period * period;", "")),
        (2, Change("softmax_rows", "l *= fast::exp(m - x);", "")),
        (2, Change("softmax_rows", "i < THREADS / 32", "i < 1", 1)),
        (2, Change("softmax_rows", "c = thread_index; c < nk", "c = thread_index; c < nk - 1")),
        (2, Change("softmax_vjp_rows", "- row_delta", "")),
        (
            2,
            Change(
                "softmax_vjp_rows", "c = thread_index; c < nk", "c = thread_index; c < nk - 1", 1
            ),
        ),
    ],
)
def test_broken_rows(at, change):
    with pytest.raises((AssertionError, MetalError)):
        check(*ROWS[at], change, impl="blocked")
