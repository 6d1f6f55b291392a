"""Every op against the float64 oracle; it must be no worse than the plain code."""

import mlx.core as mx
import numpy as np
import pytest

import oracle
import specs
from checks import check_op, f64, grads, rand
from mlx_segtrain import ops, reference

IMPLS = {
    "swiglu": ["kernel", "stock"],
    "rms_norm": ["kernel", "stock"],
    "rope": ["kernel", "stock"],
    "lora_linear": ["kernel", "stock"],
    "linear_cross_entropy": ["kernel", "blocked"],
}


# ---- the oracle itself


def test_oracle_vjps_are_complex_steps():
    rng = np.random.default_rng(1)
    x, y, dy, w = rng.standard_normal((4, 3, 6))
    pairs = [
        (oracle.swiglu, [x, y], oracle.swiglu_vjp(x, y, dy)),
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
    truth = oracle.vjp(lambda x, a, b: oracle.lora_linear(x, weight, 0, a, b, 1.5), [x, a, b], dy)
    for grad, true in zip(oracle.lora_linear_vjp(x, weight, a, b, 1.5, dy), truth, strict=True):
        oracle.assert_close("vjp", grad, true, 1e-12)
    targets, weights = np.array([1, -1, 4]), np.array([0.5, 1, 2.0])
    for cap in (None, 2.0):
        rest = (weight, targets, weights, cap)
        (truth,) = oracle.vjp(lambda h, r=rest: oracle.cross_entropy(h, *r), [x], np.array(1.0))
        oracle.assert_close("vjp", oracle.cross_entropy_vjp(x, *rest), truth, 1e-12)


# ---- the reference


def test_reference_vjps_follow_the_oracle():
    rng = np.random.default_rng(5)
    (x, x64), (y, y64), (dy, dy64) = (rand(rng, 9, 33) for _ in range(3))
    for grad, true in zip(
        reference.swiglu_vjp(x, y, dy), oracle.swiglu_vjp(x64, y64, dy64), strict=True
    ):
        oracle.assert_close("reference", f64(grad), true, 1e-6)
    w, w64 = rand(rng, 33)
    got = reference.rms_norm_vjp(x, w, dy, 1e-5)
    oracle.assert_close("reference", f64(got), oracle.rms_norm_vjp(x64, w64, dy64, 1e-5), 1e-6)
    (weight, weight64), (a, a64), (b, b64) = rand(rng, 33, 33), rand(rng, 33, 4), rand(rng, 4, 33)
    got = reference.lora_linear_vjp(x, ops.Base(weight), a, b, 0.5, dy)
    truth = oracle.lora_linear_vjp(x64, weight64, a64, b64, 0.5, dy64)
    for grad, true in zip(got, truth, strict=True):
        oracle.assert_close("reference", f64(grad), true, 2e-6)


# ---- elementwise and rows


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 129), (40, 1536)], ids=str)
@pytest.mark.parametrize("impl", IMPLS["swiglu"])
def test_swiglu(impl, shape, dtype):
    rng = np.random.default_rng(3)
    (g, g64), (u, u64), (dy, dy64) = (rand(rng, *shape, dtype=dtype) for _ in range(3))
    f, plain = (lambda *x: ops.swiglu(*x, impl=impl)), reference.swiglu
    truth, true_grads = oracle.swiglu(g64, u64), oracle.swiglu_vjp(g64, u64, dy64)
    check_op("swiglu", f, plain, [g, u], truth, true_grads, dy, dtype)


def test_swiglu_of_large_values_is_finite():
    x = mx.array([-200.0, -90.0, -88.0, 0.0, 88.0, 90.0, 200.0])
    y = ops.swiglu(x, mx.ones(7))
    assert np.allclose(np.array(y), [0, 0, 0, 0, 88, 90, 200], atol=1e-30)
    dg, du = grads(ops.swiglu, [x, mx.ones(7)], mx.ones(7))
    assert mx.isfinite(dg).all() and mx.isfinite(du).all()


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (2, 5, 65), (70, 576)], ids=str)
@pytest.mark.parametrize("impl", IMPLS["rms_norm"])
def test_rms_norm(impl, shape, dtype):
    rng = np.random.default_rng(4)
    (x, x64), (dy, dy64) = (rand(rng, *shape, dtype=dtype) for _ in range(2))
    w, w64 = rand(rng, shape[-1], dtype=dtype)
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
    ]:
        options["traditional"] = traditional
        exact = {k: f64(v) if k == "freqs" else v for k, v in options.items()}
        back = {
            **exact,
            "freqs": -exact.get("freqs", exact.get("base", 1) ** (np.arange(0, dims, 2) / dims)),
            "base": None,
        }
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


def base_of(rng, n, k, base, bias=None):
    """A base, and its values in float64."""
    w = mx.array(rng.standard_normal((n, k)).astype(np.float32))
    if base is None:
        return ops.Base(w, bias=bias), f64(w)
    bits, group = base
    q = mx.quantize(w, group_size=group, bits=bits)
    packed = ops.Base(*q, bias, group_size=group, bits=bits)
    return packed, f64(mx.dequantize(*q, group_size=group, bits=bits))


@pytest.mark.parametrize("base", specs.BASES, ids=str)
def test_dequantize(base):
    if base is None:
        with pytest.raises(ValueError, match="not quantized"):
            ops.dequantize(ops.Base(mx.ones((4, 4))))
        return
    packed, w64 = base_of(np.random.default_rng(7), 37, 384, base)
    oracle.assert_close("dequantize", f64(ops.dequantize(packed)), w64, 1e-7)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_other_quantization_modes(mode):
    rng = np.random.default_rng(8)
    bits, group = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}[mode]
    w = mx.array(rng.standard_normal((48, 64)).astype(np.float32))
    packed, scales, *_ = mx.quantize(w, mode=mode)
    base = ops.Base(packed, scales, group_size=group, bits=bits, mode=mode)
    x, x64 = rand(rng, 5, 64)
    w64 = f64(mx.dequantize(packed, scales, mode=mode))
    oracle.assert_close("y", f64(ops.lora_linear(x, base)), x64 @ w64.T, 1e-6)


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("base", specs.BASES, ids=str)
@pytest.mark.parametrize("impl", IMPLS["lora_linear"])
def test_lora_linear(impl, base, dtype):
    rng = np.random.default_rng(9)
    bias, bias64 = rand(rng, 530)
    packed, w64 = base_of(rng, 530, 256, base, bias)
    (x, x64), (dy, dy64) = rand(rng, 65, 256, dtype=dtype), rand(rng, 65, 530, dtype=dtype)
    (a, _), (b, _) = rand(rng, 256, 4), rand(rng, 4, 530)
    # The matmuls take a and b in x's dtype: that rounding is not the op's error.
    a64, b64 = f64(a.astype(getattr(mx, dtype))), f64(b.astype(getattr(mx, dtype)))
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


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("base", [None, (4, 64), (8, 32)], ids=str)
@pytest.mark.parametrize("impl", IMPLS["linear_cross_entropy"])
def test_linear_cross_entropy(impl, base, softcap):
    rng = np.random.default_rng(10)
    head, w64 = base_of(rng, 777, 128, base)
    h, h64 = rand(rng, 300, 128)
    targets = rng.integers(-1, 777, 300)
    weights = rng.uniform(0, 2, 300).astype(np.float32)
    weights[5] = 0
    t, w = mx.array(targets.astype(np.int32)), mx.array(weights)
    rest = (w64, targets, weights.astype(np.float64), softcap)
    check_op(
        "linear_cross_entropy",
        lambda h: ops.linear_cross_entropy(h, head, t, w, softcap=softcap, impl=impl),
        lambda h: reference.linear_cross_entropy(h, head, t, w, softcap=softcap),
        [h],
        oracle.cross_entropy(h64, *rest),
        [0.7 * oracle.cross_entropy_vjp(h64, *rest)],
        mx.array(0.7),
        "float32",
    )
    only = ops.linear_cross_entropy(h, head, t, w, softcap=softcap, needs_grad=False, impl=impl)
    full = ops.linear_cross_entropy(h, head, t, w, softcap=softcap, impl=impl)
    assert mx.array_equal(only, full)


def test_linear_cross_entropy_memory_has_no_rows_times_vocabulary():
    """4096 rows of 32768 logits would be 537 MB; a chunk is 64 MB at most."""
    h = mx.random.normal((4096, 32))
    head = ops.Base(mx.random.normal((32768, 32)))
    t = mx.zeros(4096, mx.int32)
    mx.eval(h, head.weight)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(lambda h: ops.linear_cross_entropy(h, head, t))(h))
    assert mx.get_peak_memory() - before < 75e6


# ---- bad arguments

BAD = [
    (lambda x: ops.swiglu(x, x[0]), r"\[swiglu\] gate and up must have one shape"),
    (lambda x: ops.rms_norm(x, mx.ones(7), 1e-5), r"weight \[H\]; got \(1,2,5,8\) and \(7\)"),
    (lambda x: ops.rope(x, 7, base=1e4), r"dims must be even"),
    (lambda x: ops.rope(x, 8), r"either base or freqs"),
    (lambda x: ops.lora_linear(x, ops.Base(mx.ones((4, 9)))), r"x \[..., 9\]; got \(1,2,5,8\)"),
    (lambda x: ops.lora_linear(x, ops.Base(mx.ones((4, 8))), mx.ones((8, 2))), r"both a and b"),
    (
        lambda x: ops.linear_cross_entropy(x[0, 0], ops.Base(mx.ones((4, 8))), mx.zeros(5)),
        r"integer targets \[5\]",
    ),
]


@pytest.mark.parametrize("call,message", BAD, ids=[m for _, m in BAD])
def test_bad_arguments_are_named_when_the_graph_is_built(call, message):
    with pytest.raises(ValueError, match=message):
        call(mx.ones((1, 2, 5, 8)))
