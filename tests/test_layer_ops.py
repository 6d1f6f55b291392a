"""Compares composite ops with the oracle: projections of one input, MLPs, norms combined with
residual sums, and heads."""

import functools

import mlx.core as mx
import numpy as np
import pytest

from lib import oracle, specs
from lib.checks import ON_GPU, f64, rand, served
from lib.linears import BASES, base_of, factors_of, linears_of, with_factors
from mlx_segtrain import ops
from mlx_segtrain.ops import reference

IMPLS = ["kernel", "stock", "auto"]
DTYPES = specs.DTYPES
#: For each case: the input width, the output widths, and the ranks (0 means no low-rank update). On
#: CUDA, the update's columns are appended to the narrower of x and y.
PROJECTIONS = {
    "one wide": (128, [264], [16]),
    "one narrow": (264, [64], [6]),
    "one frozen": (128, [264], [0]),
    "qkv": (96, [128, 32, 32], [16, 4, 16]),
    "narrow pair": (320, [64, 72], [8, 0]),
    "ranks beyond the kernel's": (96, [128, 136], [64, 64]),
}


def exact_linear(x, w, bias, a, b, scale):
    y = x @ w.T + bias
    return y if a is None else y + scale * (x @ a) @ b


def exact_linear_vjp(x, w, _, a, b, scale, dy):
    if a is None:
        return dy @ w, []
    dx, da, db = oracle.lora_linear_vjp(x, w, a, b, scale, dy)
    return dx, [da, db]


def compare(f, plain, args, cotangents, truth, dtype, compiled):
    """Checks that a function with several outputs has correct values and gradients and is
    deterministic.

    With `compiled`, also checks the function under mx.compile. This is slow on a CPU, where
    mx.compile runs a C++ compiler for every new group of elementwise ops. Therefore, only our ops
    are checked under mx.compile, and cases that differ only in their values are checked once.
    """

    def run(g):
        out, vjps = mx.vjp(lambda *x: g(*x), args, cotangents)
        return [*out, *vjps]

    with served():
        got = run(f)
    again, plains = run(f), run(plain)
    assert len(got) == len(truth)
    for i, (y, same, ref, true) in enumerate(zip(got, again, plains, truth, strict=True)):
        oracle.assert_no_worse(f"{i}", f64(y), f64(ref), true, dtype)
        assert mx.array_equal(y, same)
    for y, same in zip(got, mx.compile(lambda: run(f))() if compiled else got, strict=True):
        oracle.assert_close("compiled", f64(y), f64(same), 1e-6 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("case", PROJECTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_lora_linears(impl, case, base, dtype):
    n_in, widths, ranks = PROJECTIONS[case]
    if base is not None:
        n_in = n_in // 32 * 32
    rng = np.random.default_rng(20)
    linears, exact = linears_of(rng, n_in, widths, ranks, base, dtype)
    x, x64 = rand(rng, 65, n_in, dtype=dtype)
    dys, dys64 = zip(*(rand(rng, 65, width, dtype=dtype) for width in widths), strict=True)
    truth = [exact_linear(x64, *e) for e in exact]
    parts = [exact_linear_vjp(x64, *e, dy) for e, dy in zip(exact, dys64, strict=True)]
    truth += [sum(dx for dx, _ in parts), *(g for _, more in parts for g in more)]
    compare(
        lambda x, *p: ops.lora_linears(x, with_factors(linears, p), impl=impl),
        lambda x, *p: ops.lora_linears(x, with_factors(linears, p), impl="reference"),
        [x, *factors_of(linears)],
        list(dys),
        truth,
        dtype,
        impl == "kernel",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", [None, [0, 7, 30, 65]])
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims,by_base", [(16, True), (8, False)])
@pytest.mark.parametrize("impl", IMPLS)
def test_lora_qkv(impl, dims, by_base, traditional, segments, dtype):
    if segments and impl == "stock":
        pytest.skip("MLX's rope does not support segments")
    heads, groups, d, rows = 4, 2, 16, 65
    freqs = 1e3 ** (np.arange(0, dims, 2) / dims)
    how = {"traditional": traditional, "base": 1e4, "freqs": None}
    if not by_base:
        how |= {"base": None, "freqs": mx.array(freqs.astype(np.float32))}
    rotation = {**how, "freqs": None if by_base else freqs}
    rng = np.random.default_rng(26)
    widths = [heads * d, groups * d, groups * d]
    linears, exact = linears_of(rng, 96, widths, [16, 4, 16], ("affine", 4, 32), dtype)
    x, x64 = rand(rng, 2, rows, 96, dtype=dtype)
    shapes = [(2, n, rows, d) for n in (heads, groups, groups)]
    dys, dys64 = zip(*(rand(rng, *shape, dtype=dtype) for shape in shapes), strict=True)

    def rotated(y, sign=1):
        at = {"scale": sign, "segments": segments[:-1] if segments else (0,)}
        return oracle.rope(y, dims, **rotation, **at)

    def turned(y):
        return y.reshape(2, rows, -1, d).swapaxes(1, 2)

    q, k, v = (turned(exact_linear(x64.reshape(-1, 96), *e)) for e in exact)
    back = [rotated(dys64[0], -1), rotated(dys64[1], -1), dys64[2]]
    flat = [dy.swapaxes(1, 2).reshape(2 * rows, -1) for dy in back]
    parts = [
        exact_linear_vjp(x64.reshape(-1, 96), *e, dy) for e, dy in zip(exact, flat, strict=True)
    ]
    truth = [rotated(q), rotated(k), v, sum(dx for dx, _ in parts).reshape(x64.shape)]
    truth += [g for _, more in parts for g in more]

    def run(x, *p, impl):
        own = with_factors(linears, p)
        return ops.lora_qkv(x, own, heads, groups, dims, segments=segments, impl=impl, **how)

    compare(
        functools.partial(run, impl=impl),
        functools.partial(run, impl="reference"),
        [x, *factors_of(linears)],
        list(dys),
        truth,
        dtype,
        impl == "kernel",
    )


#: For each case: the number of linear layers, the head size, the number of rotated dimensions,
#: which of q, k and v are normalized, and the first position.
HEADS = {
    "q, k, v": (3, 64, 64, "qk", 0),
    "all have norms": (3, 128, 32, "qkv", 0),
    "k alone has one, an odd number of slots": (3, 80, 24, "k", 5),
    "values are keys": (2, 256, 256, "qkv", 0),
    "values are keys, without norms": (2, 64, 32, "", 0),
    "q alone": (1, 512, 128, "q", 7),
    "q alone, without a norm": (1, 64, 64, "", 3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed,traditional", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("impl", IMPLS)
def test_lora_qkv_with_norms(impl, case, packed, traditional, dtype):
    if packed and impl == "stock":
        pytest.skip("MLX's rope does not support segments")
    n, d, dims, normed, offset = HEADS[case]
    heads, groups, rows, eps = 3, 2, 37, 1e-4
    rng = np.random.default_rng(28)
    widths = [count * d for count in (heads, groups, groups)[:n]]
    linears, exact = linears_of(rng, 96, widths, [16, 4, 16][:n], ("affine", 4, 32), dtype)
    weights = [rand(rng, d, dtype=dtype) if name in normed else None for name in "qkv"]
    norms = [w and ops.HeadNorm(w[0], eps) for w in weights]
    x, x64 = rand(rng, 2, rows, 96, dtype=dtype)
    shapes = [(2, count, rows, d) for count in ((heads, groups, groups) if n > 1 else (heads,))]
    dys, dys64 = zip(*(rand(rng, *shape, dtype=dtype) for shape in shapes), strict=True)
    segments = [0, 9, 30, offset + rows] if packed else None

    def rotated(y, sign=1):
        at = {"offset": offset, "scale": sign, "segments": segments[:-1] if segments else (0,)}
        return oracle.rope(y, dims, base=1e4, traditional=traditional, **at)

    flat64 = x64.reshape(-1, 96)
    ys = [exact_linear(flat64, *e).reshape(2, rows, -1, d).swapaxes(1, 2) for e in exact]
    sources = [0, 1, n - 1][: len(shapes)]
    truth, dheads = [], [0.0] * n
    for i, source in enumerate(sources):
        y, dy = ys[source], dys64[i] if i == 2 else rotated(dys64[i], -1)
        if weights[i]:
            y, dy = (
                oracle.rms_norm(y, weights[i][1], eps),
                oracle.rms_norm_vjp(y, weights[i][1], dy, eps),
            )
        truth.append(y if i == 2 else rotated(y))
        dheads[source] = dheads[source] + dy
    parts = [
        exact_linear_vjp(flat64, *e, dy.swapaxes(1, 2).reshape(2 * rows, -1))
        for e, dy in zip(exact, dheads, strict=True)
    ]
    truth += [sum(dx for dx, _ in parts).reshape(x64.shape)]
    truth += [g for _, more in parts for g in more]

    def run(x, *p, impl):
        how = {"base": 1e4, "traditional": traditional, "offset": offset, "segments": segments}
        own = with_factors(linears, p)
        return ops.lora_qkv(x, own, heads, groups, dims, norms=norms, impl=impl, **how)

    compare(
        functools.partial(run, impl=impl),
        functools.partial(run, impl="reference"),
        [x, *factors_of(linears)],
        list(dys),
        truth,
        dtype,
        impl == "kernel",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 328), (70, 4104)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_norms_with_sums(impl, shape, stretched, dtype):
    """Tests a branch of a layer, from its first norm to the sum that follows its second norm."""
    rng = np.random.default_rng(29)
    (h, h64), (dy, dy64) = rand(rng, *shape, dtype=dtype), rand(rng, *shape, dtype=dtype)
    (w, w64), (v, v64) = (rand(rng, shape[-1], dtype=dtype) for _ in range(2))
    factor, factor64 = rand(rng, 1, dtype=dtype) if stretched else (None, 1.0)

    def run(h, impl):
        h, x = ops.rms_norm_beside(h, w, 1e-4, impl=impl)
        return [ops.add_rms_norm(h, x * x, v, 1e-4, factor, impl=impl)]

    x = oracle.rms_norm(h64, w64, 1e-4)
    truth = (h64 + oracle.rms_norm(x * x, v64, 1e-4)) * factor64
    dh = dy64 * factor64
    dx = 2 * x * oracle.rms_norm_vjp(x * x, v64, dh, 1e-4)
    compare(
        functools.partial(run, impl=impl),
        functools.partial(run, impl="reference"),
        [h],
        [dy],
        [truth, dh + oracle.rms_norm_vjp(h64, w64, dx, 1e-4)],
        dtype,
        impl == "kernel" and shape == (3, 5, 328) and stretched,
    )


def test_merge_heads():
    rng = np.random.default_rng(27)
    (o, o64), (dy, dy64) = rand(rng, 2, 3, 5, 4), rand(rng, 2, 5, 12)
    (y,), (do,) = mx.vjp(lambda o: ops.merge_heads(o), [o], [dy])
    np.testing.assert_array_equal(f64(y), o64.swapaxes(1, 2).reshape(2, 5, 12))
    np.testing.assert_array_equal(f64(do), dy64.reshape(2, 5, 3, 4).swapaxes(1, 2))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_join(n):
    """The arrays have different shapes and dtypes, and one is not contiguous."""
    rng = np.random.default_rng(n)
    arrays, exact = zip(*(rand(rng, 1 + i % 5, 3 * i % 4 + 1) for i in range(n)), strict=True)
    arrays, exact = [arrays[0].T.astype(mx.float16), *arrays], [exact[0].T, *exact]
    joined = ops.join(arrays)
    truth = np.concatenate([x.reshape(-1) for x in exact])
    assert joined.dtype == mx.float32
    np.testing.assert_allclose(f64(joined), truth, rtol=1e-3)
    np.testing.assert_array_equal(f64(joined)[exact[0].size :], truth[exact[0].size :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_rows", [None, 32, 40])
@pytest.mark.parametrize(
    "base,ranks", [(None, (8, 8, 8)), (("affine", 4, 32), (16, 4, 6))], ids=str
)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_lora_glu_mlp(impl, gelu, base, ranks, tile_rows, dtype):
    rng = np.random.default_rng(21)
    (gate, up), exact_in = linears_of(rng, 64, [160, 160], ranks[:2], base, dtype)
    (down,), exact_out = linears_of(rng, 160, [64], ranks[2:], base, dtype)
    linears = [gate, up, down]
    (x, x64), (dy, dy64) = (rand(rng, 80, 64, dtype=dtype) for _ in range(2))
    x, x64 = x / 8, x64 / 8
    glu, glu_vjp = (oracle.geglu, oracle.geglu_vjp) if gelu else (oracle.swiglu, oracle.swiglu_vjp)
    g64, u64 = (exact_linear(x64, *e) for e in exact_in)
    h64 = glu(g64, u64)
    dh, d_down = exact_linear_vjp(h64, *exact_out[0], dy64)
    parts = [
        exact_linear_vjp(x64, *e, d) for e, d in zip(exact_in, glu_vjp(g64, u64, dh), strict=True)
    ]
    truth = [exact_linear(h64, *exact_out[0]), parts[0][0] + parts[1][0]]
    truth += [*parts[0][1], *parts[1][1], *d_down]
    options = {"gelu": gelu, "tile_rows": tile_rows}
    compare(
        lambda x, *p: [ops.lora_glu_mlp(x, *with_factors(linears, p), **options, impl=impl)],
        lambda x, *p: [ops.lora_glu_mlp(x, *with_factors(linears, p), gelu=gelu, impl="reference")],
        [x, *factors_of(linears)],
        [dy],
        truth,
        dtype,
        impl == "kernel",
    )


@pytest.mark.skipif(ON_GPU, reason="GPU buffers are freed only after the device has finished")
def test_lora_glu_mlp_in_tiles_keeps_x_only():
    """The gate and up outputs of all rows would need 67 MB. Those of a tile need 4 MB, and at most
    two tiles are in memory."""
    x = mx.random.normal((4096, 32))
    w = [ops.Linear(ops.Base(mx.random.normal(s))) for s in ((2048, 32), (2048, 32), (32, 2048))]
    mx.eval(x, *(linear.base.weight for linear in w))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(lambda x: ops.lora_glu_mlp(x, *w, tile_rows=256).sum())(x))
    assert mx.get_peak_memory() - before < 40e6


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("vocabulary", [504, 16904])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("impl", ["kernel", "blocked"])
def test_heads_of_half_precision(impl, dtype, vocabulary, softcap, certain):
    """If the target is nearly certain, the gradient is small, but its relative error must not be
    larger than for other targets."""
    rng = np.random.default_rng(23)
    bias, bias64 = (a / 8 for a in rand(rng, vocabulary))
    head, w64 = base_of(rng, vocabulary, 64, ("affine", 4, 32), bias)
    (h, h64), (dy, dy64) = rand(rng, 40, 64, dtype=dtype), rand(rng, 40)
    targets = rng.integers(-1, vocabulary, 40)
    if certain:
        targets = oracle.logits(h64 / 4, w64, bias64).argmax(-1)
        targets[::9] = -100
    else:
        h, h64 = h / 4, h64 / 4
    t, weights = mx.array(targets.astype(np.int32)), mx.array(np.abs(dy64).astype(np.float32))
    compare(
        lambda h: [ops.linear_log_probs(h, head, t, softcap=softcap, impl=impl)],
        lambda h: [reference.linear_log_probs(h, head, t, softcap=softcap)],
        [h],
        [dy],
        [
            oracle.log_probs(h64, w64, targets, bias64, softcap),
            oracle.log_probs_vjp(h64, w64, targets, dy64, bias64, softcap),
        ],
        dtype,
        vocabulary == 504 and softcap is not None and not certain,
    )
    rest = (w64, targets, f64(weights), softcap, bias64)
    compare(
        lambda h: [ops.linear_cross_entropy(h, head, t, weights, softcap=softcap, impl=impl)],
        lambda h: [reference.linear_cross_entropy(h, head, t, weights, softcap=softcap)],
        [h],
        [mx.array(0.7)],
        [oracle.cross_entropy(h64, *rest), 0.7 * oracle.cross_entropy_vjp(h64, *rest)],
        dtype,
        vocabulary == 504 and softcap is not None and not certain,
    )
    no_grad = ops.linear_cross_entropy(
        h, head, t, weights, softcap=softcap, needs_grad=False, impl=impl
    )
    again = ops.linear_cross_entropy(h, head, t, weights, softcap=softcap, impl=impl)
    assert mx.array_equal(no_grad, again)
