"""Compares attention with the float64 oracle for every implementation, shape and kind of call."""

import mlx.core as mx
import numpy as np
import pytest

from lib import oracle, specs
from lib.checks import ON_GPU, check_op, f64, grads, rand, served
from lib.specs import ids
from mlx_segtrain import Stage, _core, ops, segmented_value_and_grad
from mlx_segtrain.ops import reference

IMPLS = _core.attention_impls()
#: A dtype that every implementation supports, and its error bound.
DTYPE, BOUND = ("bfloat16", 1e-2) if ON_GPU else ("float32", 1e-6)


@pytest.mark.parametrize("spec", specs.ATTENTION_TINY, ids=str)
def test_oracle_attention_vjp_is_the_complex_step(spec):
    rng = np.random.default_rng(0)
    d_v = spec.Dv or spec.D
    q, k, v, do = (
        rng.standard_normal(s)
        for s in [
            (spec.B, spec.H, spec.T, spec.D),
            (spec.B, spec.G, spec.S, spec.D),
            (spec.B, spec.G, spec.S, d_v),
            (spec.B, spec.H, spec.T, d_v),
        ]
    )
    options = {"scale": 0.3, **spec.options}
    truth = oracle.vjp(lambda *x: oracle.attention(*x, **options), [q, k, v], do)
    for grad, true in zip(oracle.attention_vjp(q, k, v, do, **options), truth, strict=True):
        oracle.assert_close("vjp", grad, true, 1e-12)


@pytest.mark.parametrize("spec", specs.ATTENTION, ids=str)
def test_reference_is_the_oracle(spec):
    """Runs on the CPU, where float32 matrix products do not round their operands to TF32."""
    d_v = spec.Dv or spec.D
    options = {"scale": spec.D**-0.5, **spec.options}
    for dtype in specs.DTYPES:
        rng = np.random.default_rng(spec.S)
        with mx.stream(mx.cpu):
            (q, q64), (do, do64) = (
                rand(rng, spec.B, spec.H, spec.T, d, dtype=dtype) for d in (spec.D, d_v)
            )
            (k, k64), (v, v64) = (
                rand(rng, spec.B, spec.G, spec.S, d, dtype=dtype) for d in (spec.D, d_v)
            )

            def f(*x):
                return reference.attention(*x, **options)

            y, got = f(q, k, v), grads(f, [q, k, v], do)
        oracle.assert_rounded("o", f64(y), oracle.attention(q64, k64, v64, **options), dtype)
        truth = oracle.attention_vjp(q64, k64, v64, do64, **options)
        for name, grad, true in zip(("dq", "dk", "dv"), got, truth, strict=True):
            oracle.assert_rounded(name, f64(grad), true, dtype)


@pytest.mark.parametrize("spec", specs.ATTENTION, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_with_what_was_saved_the_backward_pass_is_the_same(impl, spec):
    rng = np.random.default_rng(spec.T)
    d_v = spec.Dv or spec.D
    dtype = "bfloat16"
    q, _ = rand(rng, spec.B, spec.H, spec.T, spec.D, dtype=dtype)
    k, _ = rand(rng, spec.B, spec.G, spec.S, spec.D, dtype=dtype)
    v, _ = rand(rng, spec.B, spec.G, spec.S, d_v, dtype=dtype)
    do, _ = rand(rng, spec.B, spec.H, spec.T, d_v, dtype=dtype)
    options = {"scale": spec.D**-0.5, "impl": impl, **spec.options}
    with served():
        saved = ops.attention_forward(q, k, v, **options)
        if impl == "stock":
            assert saved == []
            return
        assert mx.array_equal(saved[0], ops.attention(q, k, v, **options))
        kept = grads(lambda *x: ops.attention(*x, saved=saved, **options), [q, k, v], do)
        for got, expected in zip(
            kept, grads(lambda *x: ops.attention(*x, **options), [q, k, v], do), strict=True
        ):
            assert mx.array_equal(got, expected)
        with pytest.raises(ValueError, match="saved must be the result of attention_forward"):
            ops.attention(q, k, v, saved=[saved[1], saved[0]], **options)


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("spec", specs.ATTENTION, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_attention(impl, spec, dtype):
    rng = np.random.default_rng(spec.T)
    d_v = spec.Dv or spec.D
    q, q64 = rand(rng, spec.B, spec.H, spec.T, spec.D, dtype=dtype)
    # Keys and values are slices of longer buffers that end with large garbage values.
    k, _ = rand(rng, spec.B, spec.G, spec.S + 3, spec.D, dtype=dtype)
    v, _ = rand(rng, spec.B, spec.G, spec.S + 3, d_v, dtype=dtype)
    k[:, :, spec.S :], v[:, :, spec.S :] = 1e4, 1e4
    k, v = k[:, :, : spec.S], v[:, :, : spec.S]
    do, do64 = rand(rng, spec.B, spec.H, spec.T, d_v, dtype=dtype)
    options = {"scale": spec.D**-0.5, **spec.options}
    k64, v64 = f64(k), f64(v)
    with served():
        check_op(
            "attention",
            lambda *x: ops.attention(*x, impl=impl, **options),
            lambda *x: reference.attention(*x, **options),
            [q, k, v],
            oracle.attention(q64, k64, v64, **options),
            oracle.attention_vjp(q64, k64, v64, do64, **options),
            do,
            dtype,
        )


# ---- segments


def test_offsets_and_ids_of_any_kind_are_the_same_segments():
    rng = np.random.default_rng(3)
    q, k, v, do = (rand(rng, 1, 2, 90, 16, dtype=DTYPE)[0] for _ in range(4))
    each = np.repeat([4, 0, -1], [30, 34, 26])
    forms = [[0, 30, 64], (0, 30, 64), each, each.astype(np.int32), mx.array(each)]
    for impl in ("auto", "blocked", "reference"):

        def f(q, k, v, segments, impl=impl):
            return ops.attention(q, k, v, scale=0.3, segments=segments, impl=impl)

        results = [[f(q, k, v, s), *grads(lambda *x, s=s: f(*x, s), [q, k, v], do)] for s in forms]
        for result in results[1:]:
            for x, y in zip(result, results[0], strict=True):
                assert mx.array_equal(x, y)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("window", [None, 20])
def test_padding_sees_nothing_and_is_seen_by_nothing(impl, window):
    rng = np.random.default_rng(4)
    segments = ids(-10, 150, -140, 60, -2)
    pad = mx.array(segments < 0)[:, None]
    q, k, v, do = (rand(rng, 1, 2, len(segments), 32, dtype=DTYPE)[0] for _ in range(4))
    results = []
    for padding in (mx.array(0, q.dtype), mx.array(1e4, q.dtype)):
        args = [mx.where(pad, padding, x) for x in (q, k, v)]

        def f(*x):
            return ops.attention(*x, scale=0.2, segments=segments, window=window, impl=impl)

        with served():
            results.append([f(*args), *grads(f, args, mx.where(pad, padding, do))])
    for quiet, loud in zip(*results, strict=True):
        assert mx.array_equal(quiet, loud)
        assert not mx.any(mx.where(pad, quiet, 0)) and mx.any(quiet)


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_far_below_zero_behind_which_a_tile_goes_on(impl):
    """A tile's rows after the last query must be skipped: their exp(0 − lse) would overflow."""
    rng = np.random.default_rng(7)
    q, k, v, do = (rand(rng, 1, 2, 131, 64, dtype=DTYPE)[0] for _ in range(4))
    q, k = q / 64 - 1, k / 64 + 1  # each score is near −4·64

    def f(*x):
        return ops.attention(*x, scale=4.0, impl=impl)

    with served():
        got = [f(q, k, v), *grads(f, [q, k, v], do)]
    true = oracle.attention(f64(q), f64(k), f64(v), scale=4.0)
    truth = [true, *oracle.attention_vjp(f64(q), f64(k), f64(v), f64(do), scale=4.0)]
    for name, x, y in zip(("o", "dq", "dk", "dv"), got, truth, strict=True):
        assert np.isfinite(f64(x)).all(), name
        if name != "dq":  # dq is nearly 0, because dS sums to 0 and all keys are similar
            oracle.assert_close(name, f64(x), y, 5e-2 if ON_GPU else 1e-3)


# ---- MLX's function transformations, and ours


CALLS = {
    "window": {"window": 9},
    "padding": {"segments": ids(20, -4, 20, -6)},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_under_compile_checkpoint_and_vjp_of_a_closure(options, impl):
    rng = np.random.default_rng(2)
    q, k, v, do = (rand(rng, 1, 2, 50, 16, dtype=DTYPE)[0] for _ in range(4))

    def f(q, k, v):
        return ops.attention(q, k, v, scale=0.25, impl=impl, **options)

    def of_f(q, k, v, do):
        return [f(q, k, v), *grads(f, [q, k, v], do)]

    def of_checkpoint(q, k, v, do):
        return [f(q, k, v), *grads(mx.checkpoint(f), [q, k, v], do)]

    def of_closures(q, k, v, do):
        """Differentiates functions that capture other arrays and compute more than attention."""
        (dq,) = grads(lambda x: f(2 * x, k, v), [q / 2], do)
        dk, dv = grads(lambda k, v: f(q, k, v * 2), [k, v / 2], do)
        return [f(q, k, v), dq / 2, dk, dv / 2]

    with served():
        plain = of_f(q, k, v, do)
    for other in (of_checkpoint, of_closures, *map(mx.compile, (of_f, of_checkpoint, of_closures))):
        for x, y in zip(plain, other(q, k, v, do), strict=True):
            assert mx.allclose(x, y, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_inside_the_scheduler(options, impl):
    rng = np.random.default_rng(6)
    h, do = (rand(rng, 1, 2, 50, 16, dtype=DTYPE)[0] for _ in range(2))
    names = [f"layer.{i}" for i in range(3)]
    params = {
        n: {x: rand(rng, 16, 16, dtype=DTYPE)[0] / 4 for x in ("wq", "wk", "wv")} for n in names
    }

    def layer(p, h):
        q, k, v = (h @ p[x] for x in ("wq", "wk", "wv"))
        return h + ops.attention(q, k, v, scale=0.25, impl=impl, **options)

    def head(_, h, do):
        return (h * do).sum()

    def whole(params):
        x = h
        for n in names:
            x = layer(params[n], x)
        return head({}, x, do)

    with served():
        loss, truth = mx.value_and_grad(whole)(params)
    step = segmented_value_and_grad(
        [Stage(n, layer) for n in names], head, inputs=("h", "do"), head_reads=("h", "do")
    )
    (segmented,), got = step(params, {"h": h, "do": do})
    oracle.assert_close("loss", f64(segmented), f64(loss), BOUND)
    for n in names:
        for x in ("wq", "wk", "wv"):
            oracle.assert_close(f"{n} d{x}", f64(got[n][x]), f64(truth[n][x]), BOUND)


def test_attention_memory_is_linear():
    """With T = 2048 queries, the score matrices of 4 heads would need 67 MB."""
    q = mx.random.normal((1, 4, 2048, 32)).astype(getattr(mx, DTYPE))
    mx.eval(q)

    def f(q):
        return ops.attention(q, q, q, scale=0.2).sum()

    for work in (lambda: f(q), lambda: mx.grad(f)(q)):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(work())
        assert mx.get_peak_memory() - before < 12e6


# ---- bad arguments


def by_segments(segments):
    return lambda x: ops.attention(x, x, x, scale=1.0, segments=segments)


BAD = [
    (lambda x: ops.attention(x, x[:, :1], x[:, :1, :3], scale=1.0), r"k and v in G and S"),
    (lambda x: ops.attention(x[0], x, x, scale=1.0), r"expected q \[B,H,T,D\].*\(2,5,8\)"),
    (lambda x: ops.attention(x, x, x, scale=1.0, window=0), r"window must be at least 1; got 0"),
    (lambda x: ops.attention(x, x, x, scale=1.0, q_start=1), r"q_start 1 and T 5"),
    (lambda x: ops.attention(x, x, x.astype(mx.float16), scale=1.0), r"the same floating dtype"),
    (lambda x: ops.attention(x, x, x, scale=1.0, impl="fast"), r"impl must be .*'blocked'.*'fast'"),
    (
        by_segments([0, 0, 5]),
        r"increase from 0 to at most S = 5.*an array of ids; got offsets \[0, 0, 5",
    ),
    (by_segments([1, 5]), r"got offsets \[1, 5\]"),
    (by_segments([0, 6]), r"got offsets \[0, 6\]"),
    (by_segments([0]), r"got offsets \[0\]"),
    (by_segments(np.array([0, 2, 5])), r"array of 5 integer ids; got an array \[3\] of int64"),
    (by_segments(mx.array([0.0] * 5)), r"array of 5 integer ids; got an array \[5\] of .*float32"),
    (by_segments(mx.zeros((5, 1), mx.int32)), r"got an array \[5, 1\] of .*int32"),
    (by_segments(np.array([1, 2, 2, -1, 1])), r"equal ids to be adjacent; got id 1 in two places"),
]


@pytest.mark.parametrize("call,message", BAD, ids=[m for _, m in BAD])
def test_bad_arguments_are_named_when_the_graph_is_built(call, message):
    with pytest.raises(ValueError, match=message):
        call(mx.ones((1, 2, 5, 8)))


def test_the_core_checks_its_ranges():
    x = mx.ones((1, 2, 5, 8))
    for ranges in ([(0, 2), (1, 5)], [(0, 0)], [(-1, 2)], [(0, 6)]):
        with pytest.raises(ValueError, match="ascending ranges of the 5 keys; got"):
            _core.attention(x, x, x, _core.AttentionOptions(scale=1.0, segments=ranges))


@pytest.mark.parametrize("head", [64, 128, 256])
def test_the_same_bits_again(head):
    """Results must be bit-identical even for sequences so long that GPU libraries sum in an
    unspecified order by default."""
    length = 8192 if ON_GPU else 256
    rng = np.random.default_rng(0)
    (q, _), (k, _), (do, _) = (
        rand(rng, 1, n, length, head, dtype=DTYPE)
        for n in (16 if ON_GPU else 4, 2, 16 if ON_GPU else 4)
    )

    def f(*x):
        return ops.attention(*x, scale=head**-0.5)

    with ops.repeatable(True):
        first = grads(f, [q, k, k], do)
        for _ in range(3):
            assert all(map(mx.array_equal, grads(f, [q, k, k], do), first))
    assert _core.set_repeatable(False) is False
