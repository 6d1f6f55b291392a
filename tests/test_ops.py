"""Compares every op with the float64 oracle. Ops must be at least as accurate as the reference
implementation."""

import functools

import mlx.core as mx
import numpy as np
import pytest

from lib import oracle, specs
from lib.checks import ON_GPU, check_op, f64, grads, rand, served
from lib.linears import base_of
from mlx_segtrain import ops
from mlx_segtrain.ops import reference

IMPLS = {
    "rms_norm": ["kernel", "stock"],
    "rope": ["kernel", "stock"],
    "lora_linear": ["kernel", "stock"],
    "linear_cross_entropy": ["kernel", "blocked"],
    "linear_log_probs": ["kernel", "blocked"],
}


# ---- the oracle itself


def test_oracle_vjps_are_complex_steps():
    rng = np.random.default_rng(1)
    x, y, dy, w = rng.standard_normal((4, 3, 6))
    pairs = [
        (oracle.swiglu, [x, y], oracle.swiglu_vjp(x, y, dy)),
        (oracle.geglu, [x, y], oracle.geglu_vjp(x, y, dy)),
        (
            lambda x: oracle.rms_norm(x, w[0], 1e-5),
            [x],
            [oracle.rms_norm_vjp(x, w[0], dy, 1e-5)],
        ),
    ]
    for f, args, closed in pairs:
        for grad, true in zip(closed, oracle.vjp(f, args, dy), strict=True):
            oracle.assert_close("vjp", grad, true, 1e-12)
    weight, a, b = (
        rng.standard_normal((6, 6)),
        rng.standard_normal((6, 2)),
        rng.standard_normal((2, 6)),
    )
    for mask in (1.0, rng.integers(0, 2, (3, 6)) / 0.5):
        truth = oracle.vjp(
            lambda x, a, b, m=mask: oracle.lora_linear(x, weight, 0, a, b, 1.5, m), [x, a, b], dy
        )
        closed = oracle.lora_linear_vjp(x, weight, a, b, 1.5, dy, mask)
        for grad, true in zip(closed, truth, strict=True):
            oracle.assert_close("vjp", grad, true, 1e-12)
    targets, weights = np.array([1, -1, 4]), np.array([0.5, 1, 2.0])
    for cap in (None, 2.0):
        for smoothing in (0.0, 0.3):
            rest = (weight, targets, weights, cap, w[0], smoothing)
            (truth,) = oracle.vjp(lambda h, r=rest: oracle.cross_entropy(h, *r), [x], np.array(1.0))
            oracle.assert_close("vjp", oracle.cross_entropy_vjp(x, *rest), truth, 1e-12)
        d = dy[:, 0]
        (truth,) = oracle.vjp(
            lambda h, c=cap: oracle.log_probs(h, weight, targets, w[0], c), [x], d
        )
        closed = oracle.log_probs_vjp(x, weight, targets, d, w[0], cap)
        oracle.assert_close("vjp", closed, truth, 1e-12)


# ---- the reference


def test_gradients_of_the_reference_are_the_oracles():
    rng = np.random.default_rng(5)
    (x, x64), (y, y64), (dy, dy64) = (rand(rng, 9, 33) for _ in range(3))
    for op in ("swiglu", "geglu"):
        truth = getattr(oracle, f"{op}_vjp")(x64, y64, dy64)
        for grad, true in zip(grads(getattr(reference, op), [x, y], dy), truth, strict=True):
            oracle.assert_close(op, f64(grad), true, 1e-6)
    w, w64 = rand(rng, 33)
    (got,) = grads(lambda x: reference.rms_norm(x, w, 1e-5), [x], dy)
    oracle.assert_close("reference", f64(got), oracle.rms_norm_vjp(x64, w64, dy64, 1e-5), 1e-6)
    (weight, weight64), (a, a64), (b, b64) = rand(rng, 33, 33), rand(rng, 33, 4), rand(rng, 4, 33)
    key = ops.dropout_key(0, 1, "q")
    mask = f64(mx.random.bernoulli(0.7, x.shape, key)) / 0.7
    for drops, its in (({}, 1.0), ({"dropout": 0.3, "key": key}, mask)):

        def lora(x, a, b, drops=drops):
            return reference.lora_linear(x, ops.Base(weight), a, b, 0.5, **drops)

        truth = oracle.lora_linear_vjp(x64, weight64, a64, b64, 0.5, dy64, its)
        for grad, true in zip(grads(lora, [x, a, b], dy), truth, strict=True):
            oracle.assert_close("reference", f64(grad), true, 2e-6)
    targets = rng.integers(-1, 33, 9)
    head, t = ops.Base(weight, bias=w), mx.array(targets.astype(np.int32))
    for cap in (None, 3.0):
        how = {"softcap": cap, "label_smoothing": 0.1}
        entropy = functools.partial(reference.linear_cross_entropy, **how)
        (got,) = grads(lambda x, f=entropy: f(x, head, t, dy[:, 0]), [x], mx.array(0.5))
        truth = 0.5 * oracle.cross_entropy_vjp(x64, weight64, targets, dy64[:, 0], cap, w64, 0.1)
        oracle.assert_close("reference", f64(got), truth, 2e-6)
        (got,) = grads(
            lambda x, c=cap: reference.linear_log_probs(x, head, t, softcap=c), [x], dy[:, 0]
        )
        truth = oracle.log_probs_vjp(x64, weight64, targets, dy64[:, 0], w64, cap)
        oracle.assert_close("reference", f64(got), truth, 2e-6)


# ---- elementwise and rows


def table_of(rng, base, dtype):
    """Returns an embedding table [9, 384] and its values in float64. The table's values, or its
    scales if it is quantized, have the given dtype."""
    table, _ = base_of(rng, 9, 384, base)
    dtype = getattr(mx, dtype)
    scales, biases = (
        x if x is None or x.dtype == mx.uint8 else x.astype(dtype)
        for x in (table.scales, table.biases)
    )
    weight = table.weight if scales is not None else table.weight.astype(dtype)
    table = ops.Base(weight, scales, biases, **reference.packing(table))
    return table, f64(reference.weight_of(table, mx.float32))


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("base", specs.BASES, ids=str)
@pytest.mark.parametrize("begin,end", [(0, None), (128, 256), (24, 344)])
@pytest.mark.parametrize("impl", ["kernel", "stock"])
def test_embedded_rows(impl, begin, end, base, dtype):
    if not ON_GPU and impl == "kernel":
        pytest.skip("only CUDA has this kernel")
    rng = np.random.default_rng(32)
    table, w64 = table_of(rng, base, dtype)
    index = rng.integers(0, 9, (2, 7))
    with served():
        y = ops.embedded_rows(table, mx.array(index), begin=begin, end=end, factor=2.5, impl=impl)
    plain = ops.embedded_rows(
        table, mx.array(index), begin=begin, end=end, factor=2.5, impl="reference"
    )
    assert y.dtype == plain.dtype
    truth = 2.5 * w64[index][..., begin:end]
    oracle.assert_no_worse("rows", f64(y), f64(plain), truth, str(y.dtype).split(".")[-1])


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("base", [None, ("affine", 4, 64), ("affine", 3, 128)], ids=str)
@pytest.mark.parametrize("begin,width", [(128, 128), (8, 328), (0, 384)])
@pytest.mark.parametrize("impl", ["kernel", "stock"])
def test_own_input(impl, begin, width, base, dtype):
    if not ON_GPU and impl == "kernel":
        pytest.skip("only CUDA has this kernel")
    rng = np.random.default_rng(33)
    table, w64 = table_of(rng, base, dtype)
    index = rng.integers(0, 9, (2, 7))
    (x, x64), (w, norm64) = rand(rng, 2, 7, width, dtype=dtype), rand(rng, width, dtype=dtype)
    factors = [0.25, 16.0, 0.75]
    rest = (w, 1e-4, table, mx.array(index), begin, factors)
    with served():
        y = ops.own_input(x, *rest, impl=impl)
    second = 16 * w64[index][..., begin : begin + width]
    truth = (oracle.rms_norm(x64 / 4, norm64, 1e-4) + second) * 0.75
    plain = ops.own_input(x, *rest, impl="reference")
    assert y.dtype == x.dtype
    oracle.assert_no_worse("input", f64(y), f64(plain), truth, dtype)


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (2, 5, 65), (70, 576)], ids=str)
@pytest.mark.parametrize("impl", IMPLS["rms_norm"])
def test_rms_norm(impl, shape, dtype):
    rng = np.random.default_rng(4)
    (x, x64), (dy, dy64) = (rand(rng, *shape, dtype=dtype) for _ in range(2))
    w, w64 = rand(rng, shape[-1], dtype=dtype)
    with served():
        check_op(
            "rms_norm",
            lambda x: ops.rms_norm(x, w, 1e-5, impl=impl),
            lambda x: reference.rms_norm(x, w, 1e-5),
            [x],
            oracle.rms_norm(x64, w64, 1e-5),
            [oracle.rms_norm_vjp(x64, w64, dy64, 1e-5)],
            dy,
            dtype,
        )


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("impl", IMPLS["rope"])
def test_rope(impl, traditional, dtype):
    rng = np.random.default_rng(6)
    (x, x64), (dy, dy64) = (rand(rng, 2, 3, 33, 24, dtype=dtype) for _ in range(2))
    freqs = mx.array(rng.uniform(1, 50, 8).astype(np.float32))
    for dims, options in [
        (24, {"base": 1e4}),
        (16, {"base": 5e6, "scale": 0.5, "offset": 3}),
        (16, {"freqs": freqs}),
        (16, {"base": 1e4, "offset": 2, "segments": [0, 1, 17, 18, 35]}),
    ]:
        if impl == "stock" and "segments" in options:
            continue
        options["traditional"] = traditional
        exact = {k: f64(v) if k == "freqs" else v for k, v in options.items()}
        back = {
            **exact,
            "freqs": -exact.get("freqs", exact.get("base", 1) ** (np.arange(0, dims, 2) / dims)),
            "base": None,
        }
        with served():
            check_op(
                "rope",
                lambda x, d=dims, o=options: ops.rope(x, d, impl=impl, **o),
                lambda x, d=dims, o=options: reference.rope(x, d, **o),
                [x],
                oracle.rope(x64, dims, **exact),
                [oracle.rope(dy64, dims, **back)],
                dy,
                dtype,
            )


# ---- products with a frozen weight


def bits_of(x):
    return np.array(x.view(mx.uint32))


@pytest.mark.parametrize("base", specs.QUANTIZATIONS, ids=str)
def test_dequantize_is_bitwise_mlx(base):
    packed, _ = base_of(np.random.default_rng(7), 37, 384, base)
    mode, bits, group = base
    quant = {"group_size": group, "bits": bits, "mode": mode}
    arrays = [x for x in (packed.weight, packed.scales, packed.biases) if x is not None]
    plain = mx.dequantize(*arrays, **quant, dtype=mx.float32)
    assert (bits_of(ops.dequantize(packed)) == bits_of(plain)).all()
    half = ops.dequantize(packed, mx.bfloat16)
    assert mx.array_equal(half, plain.astype(mx.bfloat16))


@pytest.mark.parametrize("mode,bits,group", specs.QUANTIZATIONS[-3:])
def test_dequantize_of_every_code_and_scale_is_bitwise_mlx(mode, bits, group):
    """The values include zeros of both signs, subnormal numbers, overflow and NaN. The bits of NaN
    may differ."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    per_row = 256 * 8 // bits // group
    scales = mx.array(np.repeat(np.arange(256, dtype=np.uint8)[:, None], per_row, axis=1))
    quant = {"group_size": group, "bits": bits, "mode": mode}
    weight = mx.array(codes.view(np.uint32))
    plain = mx.dequantize(weight, scales, **quant, dtype=mx.float32)
    got = ops.dequantize(ops.Base(weight, scales, **quant))
    nan = np.isnan(np.array(plain))
    assert nan.any() and (np.isnan(np.array(got)) == nan).all()
    assert (bits_of(got)[~nan] == bits_of(plain)[~nan]).all()


def test_dequantize_without_scales():
    with pytest.raises(ValueError, match="not quantized"):
        ops.dequantize(ops.Base(mx.ones((4, 4))))


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("base", specs.BASES, ids=str)
@pytest.mark.parametrize("impl", IMPLS["lora_linear"])
def test_lora_linear(impl, base, dtype):
    rng = np.random.default_rng(9)
    bias, bias64 = rand(rng, 536)
    packed, w64 = base_of(rng, 536, 256, base, bias)
    (x, x64), (dy, dy64) = rand(rng, 65, 256, dtype=dtype), rand(rng, 65, 536, dtype=dtype)
    (a, _), (b, _) = rand(rng, 256, 4), rand(rng, 4, 536)
    # Matrix products round a and b to x's dtype. This rounding is not an error of the op.
    a64, b64 = f64(a.astype(getattr(mx, dtype))), f64(b.astype(getattr(mx, dtype)))
    with served():
        check_op(
            "lora_linear",
            lambda *p: ops.lora_linear(p[0], packed, p[1], p[2], 2.0, impl=impl),
            lambda *p: reference.lora_linear(p[0], packed, p[1], p[2], 2.0),
            [x, a, b],
            oracle.lora_linear(x64, w64, bias64, a64, b64, 2.0),
            oracle.lora_linear_vjp(x64, w64, a64, b64, 2.0, dy64),
            dy,
            dtype,
        )
    with served():
        check_op(
            "linear",
            lambda x: ops.lora_linear(x, packed, impl=impl),
            lambda x: reference.lora_linear(x, packed),
            [x],
            x64 @ w64.T + bias64,
            [dy64 @ w64],
            dy,
            dtype,
        )


def test_lora_linear_keeps_master_dtype_and_leading_axes():
    x = mx.random.normal((2, 3, 32)).astype(mx.bfloat16)
    a, b = mx.random.normal((32, 4)), mx.random.normal((4, 48))
    base = ops.Base(mx.random.normal((48, 32)))
    y = ops.lora_linear(x, base, a, b)
    assert y.shape == (2, 3, 48) and y.dtype == mx.bfloat16
    dx, da, db = grads(lambda *p: ops.lora_linear(p[0], base, p[1], p[2]), [x, a, b], y)
    assert (dx.dtype, da.dtype, db.dtype) == (mx.bfloat16, mx.float32, mx.float32)


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("base", [None, ("affine", 4, 64), ("nvfp4", 4, 16)], ids=str)
@pytest.mark.parametrize("impl", IMPLS["lora_linear"])
def test_lora_linear_dropout(impl, base, dtype):
    rng = np.random.default_rng(12)
    packed, w64 = base_of(rng, 530, 256, base)
    (x, x64), (dy, dy64) = rand(rng, 65, 256, dtype=dtype), rand(rng, 65, 530, dtype=dtype)
    (a, _), (b, _) = rand(rng, 256, 4), rand(rng, 4, 530)
    a64, b64 = f64(a.astype(getattr(mx, dtype))), f64(b.astype(getattr(mx, dtype)))
    key = ops.dropout_key(3, 17, "layers.2.q_proj")
    mask = f64(mx.random.bernoulli(0.6, x.shape, key)) / 0.6
    assert 0.35 < (mask == 0).mean() < 0.45
    options = {"dropout": 0.4, "key": key}

    def f(*p):
        return ops.lora_linear(p[0], packed, p[1], p[2], 2.0, **options, impl=impl)

    with served():
        check_op(
            "lora_linear",
            f,
            lambda *p: reference.lora_linear(p[0], packed, p[1], p[2], 2.0, **options),
            [x, a, b],
            oracle.lora_linear(x64, w64, 0, a64, b64, 2.0, mask),
            oracle.lora_linear_vjp(x64, w64, a64, b64, 2.0, dy64, mask),
            dy,
            dtype,
        )

    def compiled(x, a, b, key):
        return ops.lora_linear(x, packed, a, b, 2.0, dropout=0.4, key=key, impl=impl)

    with served():
        assert mx.array_equal(mx.compile(compiled)(x, a, b, key), f(x, a, b))


def test_dropout_keys_differ_by_seed_step_and_module():
    def key(*of):
        return tuple(ops.dropout_key(*of).tolist())

    assert key(1, 2, "q") == key(1, 2, "q")
    assert len({key(1, 2, "q"), key(2, 1, "q"), key(1, 3, "q"), key(1, 2, "k")}) == 4


#: A dense head, and quantized heads with each mode and number of bits.
HEADS = [
    None,
    *[
        ("affine", bits, group)
        for bits, group in zip((2, 3, 4, 5, 6, 8), (32, 64, 128) * 2, strict=True)
    ],
    *specs.QUANTIZATIONS[-3:],
]


def over_heads(*options):
    """Combines each base with the last option, and two bases with all options. This suffices
    because logits are processed in the same way for all bases."""
    return [
        (base, *own)
        for base in HEADS
        for own in (options if base in (None, ("affine", 4, 128)) else options[-1:])
    ]


@pytest.mark.parametrize(
    ("base", "softcap", "smoothing"),
    over_heads((None, 0.0), (4.0, 0.0), (None, 0.1), (4.0, 0.25)),
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLS["linear_cross_entropy"])
def test_linear_cross_entropy(impl, base, softcap, smoothing):
    rng = np.random.default_rng(10)
    bias, bias64 = rand(rng, 776)
    head, w64 = base_of(rng, 776, 128, base, bias)
    h, h64 = rand(rng, 300, 128)
    targets = rng.integers(-1, 776, 300)
    weights = rng.uniform(0, 2, 300).astype(np.float32)
    weights[5] = 0
    t, w = mx.array(targets.astype(np.int32)), mx.array(weights)
    rest = (w64, targets, weights.astype(np.float64), softcap, bias64, smoothing)
    options = {"softcap": softcap, "label_smoothing": smoothing}

    def f(h, **more):
        return ops.linear_cross_entropy(h, head, t, w, **options, **more, impl=impl)

    with served():
        check_op(
            "linear_cross_entropy",
            f,
            lambda h: reference.linear_cross_entropy(h, head, t, w, **options),
            [h],
            oracle.cross_entropy(h64, *rest),
            [0.7 * oracle.cross_entropy_vjp(h64, *rest)],
            mx.array(0.7),
            "float32",
        )
    assert mx.array_equal(f(h, needs_grad=False), f(h))


@pytest.mark.parametrize(
    ("base", "softcap", "few"),
    over_heads((None, False), (None, True), (4.0, False), (4.0, True)),
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLS["linear_log_probs"])
def test_linear_log_probs(impl, base, softcap, few):
    rng = np.random.default_rng(14)
    bias, bias64 = rand(rng, 776)
    head, w64 = base_of(rng, 776, 128, base, bias)
    (h, h64), (dy, dy64) = rand(rng, 300, 128), rand(rng, 300)
    targets = rng.integers(0, 776, 300)
    if few:
        targets[rng.random(300) < 0.8] = -100
    t = mx.array(targets.astype(np.int32))
    with served():
        check_op(
            "linear_log_probs",
            lambda h: ops.linear_log_probs(h, head, t, softcap=softcap, impl=impl),
            lambda h: reference.linear_log_probs(h, head, t, softcap=softcap),
            [h],
            oracle.log_probs(h64, w64, targets, bias64, softcap),
            [oracle.log_probs_vjp(h64, w64, targets, dy64, bias64, softcap)],
            dy,
            "float32",
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("impl", IMPLS["linear_log_probs"])
def test_linear_log_probs_of_half_precision(impl, dtype):
    rng = np.random.default_rng(15)
    head, w64 = base_of(rng, 500, 64, ("affine", 4, 32))
    (h, h64), (dy, dy64) = rand(rng, 40, 64, dtype=dtype), rand(rng, 40)
    targets = rng.integers(-1, 500, 40)
    t = mx.array(targets.astype(np.int32))
    with served():
        check_op(
            "linear_log_probs",
            lambda h: ops.linear_log_probs(h, head, t, impl=impl),
            lambda h: reference.linear_log_probs(h, head, t),
            [h],
            oracle.log_probs(h64, w64, targets),
            [oracle.log_probs_vjp(h64, w64, targets, dy64)],
            dy,
            dtype,
        )


@pytest.mark.parametrize("impl", IMPLS["linear_log_probs"])
def test_linear_log_probs_touches_only_rows_with_a_target(impl):
    """Rows without a target may contain NaN. In the second case, no row has a target."""
    h = mx.random.normal((9, 16)).astype(mx.bfloat16 if ON_GPU else mx.float32)
    h[::2] = mx.nan
    head = ops.Base(mx.random.normal((56, 16)))
    for targets in (mx.array([-1, 3] * 4 + [-1]), mx.full(9, -100)):

        def f(h, t=targets):
            return ops.linear_log_probs(h, head, t, impl=impl)

        y, dh = f(h), grads(f, [h], mx.random.normal((9,)))[0]
        assert mx.isfinite(y).all() and mx.isfinite(dh).all()
        assert (y[::2] == 0).all() and (dh[::2] == 0).all()
        assert ((y < 0) == (targets >= 0)).all()


@pytest.mark.parametrize("op", [ops.linear_log_probs, ops.linear_cross_entropy])
@pytest.mark.parametrize("impl", ["kernel", "blocked"])
def test_heads_compile(impl, op):
    rng = np.random.default_rng(16)
    head, _ = base_of(rng, 304, 64, ("mxfp4", 4, 32))
    h = rand(rng, 20, 64, dtype="bfloat16" if ON_GPU else "float32")[0]
    t = mx.array(rng.integers(-1, 304, 20).astype(np.int32))

    def grad(h, t):
        return mx.grad(lambda h: op(h, head, t, impl=impl).sum())(h)

    got, plain = mx.compile(grad)(h, t), grad(h, t)
    oracle.assert_close("compiled", f64(got), f64(plain), 1e-2 if ON_GPU else 1e-6)


@pytest.mark.skipif(ON_GPU, reason="GPU buffers are freed only after the device has finished")
@pytest.mark.parametrize("op", [ops.linear_log_probs, ops.linear_cross_entropy])
def test_memory_of_heads_has_no_rows_times_vocabulary(op):
    """The logits of 4096 rows over a vocabulary of 32768 tokens would need 537 MB. A chunk needs at
    most 64 MB."""
    h = mx.random.normal((4096, 32))
    head = ops.Base(mx.random.normal((32768, 32)))
    t = mx.zeros(4096, mx.int32)
    mx.eval(h, head.weight)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(lambda h: op(h, head, t).sum())(h))
    assert mx.get_peak_memory() - before < 75e6


# ---- bad arguments


def quantized(mode, bits, group):
    """Returns a base that declares the given quantization. Its arrays have the shapes of weights
    with 4 bits in groups of 32."""
    return ops.Base(
        mx.ones((4, 8), mx.uint32), mx.ones((4, 2)), mode=mode, bits=bits, group_size=group
    )


def low_rank(x, **options):
    base = ops.Base(mx.ones((4, 8)))
    return ops.lora_linear(x, base, mx.ones((8, 2)), mx.ones((2, 4)), **options)


def heads_of(x, widths, **options):
    linears = [ops.Linear(ops.Base(mx.ones((width, 8)))) for width in widths]
    return ops.lora_qkv(x, linears, 2, 1, 4, base=1e4, **options)


BAD = [
    (lambda x: ops.swiglu(x, x[0]), r"\[swiglu\] gate and up must have the same shape"),
    (
        lambda x: ops.geglu(x, x.astype(mx.float16)),
        r"\[geglu\] gate and up must have the same floating",
    ),
    (lambda x: ops.rms_norm(x, mx.ones(7), 1e-5), r"weight \[H\]; got \(1,2,5,8\) and \(7\)"),
    (lambda x: ops.rms_norm_beside(x, mx.ones(7), 1e-5), r"weight \[H\]; got \(1,2,5,8\) and"),
    (lambda x: ops.add_rms_norm(x[0], x, mx.ones(8), 1e-5), r"x's shape \(1,2,5,8\); got \(2,5,8"),
    (lambda x: ops.add_rms_norm(x, x, mx.ones(8), 1e-5, x), r"factor must be a single number; got"),
    (lambda x: heads_of(x[0], [8, 8]), r"q of 2 heads and k and v of 1 heads; got widths 8, 8"),
    (lambda x: heads_of(x[0], [8] * 4), r"one to three linear layers; got \(2,5,8\) and 4"),
    (
        lambda x: heads_of(x[0], [8], norms=[ops.HeadNorm(mx.ones(8), 1e-5)]),
        r"norm weights \[4\]; got \(8\)",
    ),
    (
        lambda x: ops.embedded_rows(ops.Base(x[0, 0]), mx.arange(3), begin=4, end=9),
        r"columns within 0 to 8; got 4 to 9",
    ),
    (lambda x: ops.embedded_rows(ops.Base(x[0, 0]), x), r"an integer index; got float32"),
    (
        lambda x: ops.own_input(x, x[0, 0, 0], 1.0, ops.Base(x[0, 0]), mx.arange(3), 0, [1] * 3),
        r"expected x \(3,8\); got \(1,2,5,8\)",
    ),
    (lambda x: ops.rope(x, 7, base=1e4), r"dims must be even"),
    (lambda x: ops.rope(x, 8), r"either base or freqs"),
    (lambda x: ops.rope(x, 8, base=1e4, segments=[0, 9]), r"segments to be offsets .* S = 5"),
    (lambda x: ops.rope(x, 8, base=1e4, segments=[0, 5], impl="stock"), r"support segments"),
    (lambda x: ops.lora_linear(x, ops.Base(mx.ones((4, 9)))), r"x \[..., 9\]; got \(1,2,5,8\)"),
    (lambda x: ops.lora_linear(x, ops.Base(mx.ones((4, 8))), mx.ones((8, 2))), r"both a and b"),
    (
        lambda x: ops.linear_cross_entropy(x[0, 0], ops.Base(mx.ones((4, 8))), mx.zeros(5)),
        r"integer targets \[5\]",
    ),
    (
        lambda x: ops.linear_log_probs(x[0, 0], ops.Base(mx.ones((4, 8))), mx.zeros(5)),
        r"\[linear_log_probs\] expected integer targets \[5\]",
    ),
    (
        lambda x: ops.linear_cross_entropy(
            x[0, 0], ops.Base(mx.ones((4, 8))), mx.zeros(5, mx.int32), label_smoothing=1.0
        ),
        r"label_smoothing must be at least 0 and below 1; got 1",
    ),
    (lambda x: ops.lora_linear(x, quantized("affine", 7, 64)), r"got affine at 7 bits in groups"),
    (lambda x: ops.lora_linear(x, quantized("affine", 4, 16)), r"groups of 32, 64, 128; got"),
    (lambda x: ops.lora_linear(x, quantized("mxfp4", 4, 16)), r"mxfp4 at 4 bits in groups of 16"),
    (lambda x: ops.lora_linear(x, quantized("nvfp4", 8, 16)), r"nvfp4 at 8 bits in groups of 16"),
    (lambda x: ops.lora_linear(x, quantized("int4", 4, 32)), r"mode must be .*; got int4 at 4"),
    (lambda x: ops.lora_linear(x, quantized("mxfp8", 8, 32)), r"scales of mxfp8 .* must be uint8"),
    (lambda x: ops.lora_linear(x, quantized("affine", 4, 32)), r"affine at 4 .* needs floating b"),
    (lambda x: ops.dequantize(quantized("affine", 8, 64)), r"scales \(4,2\) do not fit weight"),
    (lambda x: low_rank(x, dropout=1.0), r"dropout must be at least 0 and below 1; got 1"),
    (
        lambda x: low_rank(x, dropout=0.5),
        r"dropout and its key must be given together; got dropout 0.5 and no",
    ),
    (lambda x: low_rank(x, key=ops.dropout_key(0, 0, "q")), r"got dropout 0 and a key"),
    (
        lambda x: ops.lora_linear(x, ops.Base(mx.ones((4, 8))), dropout=0.5),
        r"dropout applies to the low-rank branch: give a and b",
    ),
]


@pytest.mark.parametrize("call,message", BAD, ids=[m for _, m in BAD])
def test_bad_arguments_are_named_when_the_graph_is_built(call, message):
    with pytest.raises(ValueError, match=message):
        call(mx.ones((1, 2, 5, 8)))


X = mx.ones((1, 2, 4, 8))
EYE = ops.Base(mx.eye(8))
FACES = {
    "attention": lambda: ops.attention(X, X, X, scale=1.0),
    "attention_forward": lambda: ops.attention_forward(X, X, X, scale=1.0),
    "swiglu": lambda: ops.swiglu(X, X),
    "geglu": lambda: ops.geglu(X, X),
    "rms_norm": lambda: ops.rms_norm(X, X[0, 0, 0], 1e-5),
    "rms_norm_beside": lambda: ops.rms_norm_beside(X, X[0, 0, 0], 1e-5),
    "add_rms_norm": lambda: ops.add_rms_norm(X, X, X[0, 0, 0], 1e-5),
    "embedded_rows": lambda: ops.embedded_rows(EYE, mx.arange(4)),
    "own_input": lambda: ops.own_input(X[0, 0], X[0, 0, 0], 1e-5, EYE, mx.arange(4), 0, [1] * 3),
    "rope": lambda: ops.rope(X, 8, base=1e4),
    "lora_linear": lambda: ops.lora_linear(X, EYE),
    "lora_linears": lambda: ops.lora_linears(X, [ops.Linear(EYE)]),
    "lora_glu_mlp": lambda: ops.lora_glu_mlp(X, *[ops.Linear(EYE)] * 3),
    "linear_cross_entropy": lambda: ops.linear_cross_entropy(X[0, 0], EYE, mx.arange(4)),
    "linear_log_probs": lambda: ops.linear_log_probs(X[0, 0], EYE, mx.arange(4)),
}


@pytest.mark.parametrize("op", FACES)
def test_an_op_waits_for_the_check_of_its_gpu(op, monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    monkeypatch.setattr(ops, "self_check", lambda: asked.append(op))
    FACES[op]()
    assert asked == [op]
