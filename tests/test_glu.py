"""Compares gated linear units with the float64 oracle on the default device."""

import mlx.core as mx
import numpy as np
import pytest

from lib import oracle, specs
from lib.checks import check_op, f64, grads, rand, served
from mlx_segtrain import ops
from mlx_segtrain.ops import reference

OPS = ["swiglu", "geglu"]
IMPLS = ["kernel", "stock", "auto"]


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("shape", specs.GLU, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", OPS)
def test_glu(op, impl, shape, dtype):
    rng = np.random.default_rng(3)
    (g, g64), (u, u64), (dy, dy64) = (rand(rng, *shape, dtype=dtype) for _ in range(3))
    truth = getattr(oracle, op)(g64, u64)
    true_grads = getattr(oracle, f"{op}_vjp")(g64, u64, dy64)

    def f(*x):
        return getattr(ops, op)(*x, impl=impl)

    with served():
        check_op(op, f, getattr(reference, op), [g, u], truth, true_grads, dy, dtype)


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("shape", specs.GLU_TINY, ids=str)
@pytest.mark.parametrize("impl", ["stock", "auto"])
@pytest.mark.parametrize("op", OPS)
def test_few_elements(op, impl, shape, dtype):
    """Makes sixty calls and checks the error of all their results together."""
    rng = np.random.default_rng(4)
    (g, g64), (u, u64), (dy, dy64) = (rand(rng, 60, *shape, dtype=dtype) for _ in range(3))
    truth = getattr(oracle, op)(g64, u64)
    true_grads = getattr(oracle, f"{op}_vjp")(g64, u64, dy64)

    def f(g, u):
        calls = [getattr(ops, op)(*x, impl=impl) for x in zip(g, u, strict=True)]
        assert all(y.shape == shape for y in calls)
        return mx.stack(calls)

    check_op(op, f, getattr(reference, op), [g, u], truth, true_grads, dy, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", OPS)
def test_under_compile(op, impl):
    g, u, dy = (rand(np.random.default_rng(i), 5, 77, dtype="float16")[0] for i in range(3))

    def both(g, u, dy):
        out, vjps = mx.vjp(lambda *x: getattr(ops, op)(*x, impl=impl), [g, u], [dy])
        return [*out, *vjps]

    names = ("y", "dgate", "dup")
    for name, x, y in zip(names, mx.compile(both)(g, u, dy), both(g, u, dy), strict=True):
        oracle.assert_close(name, f64(x), f64(y), oracle.EPS["float16"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", OPS)
def test_parts_of_arrays(op, impl):
    """Tests slices of columns, and rows whose start is not aligned with the packs of elements that
    the kernel reads."""
    x, x64 = rand(np.random.default_rng(8), 6, 2 * 333, dtype="bfloat16")
    for at in (np.s_[:, :333], np.s_[:, 333:]), (np.s_[1], np.s_[3]):
        (g, u), (g64, u64) = ([x[i] for i in at] for x in (x, x64))
        y, plain = getattr(ops, op)(g, u, impl=impl), getattr(reference, op)(g, u)
        oracle.assert_no_worse(op, f64(y), f64(plain), getattr(oracle, op)(g64, u64), "bfloat16")


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", OPS)
def test_far_gates(op, impl, dtype):
    """Far from 0, act(g) is g or 0 and its slope is 1 or 0. Nothing may overflow."""
    top = 6e4 if dtype == "float16" else 1e38
    g = mx.array([-top, -300.0, -90.0, -89.0, 0.0, 89.0, 90.0, 300.0, top]).astype(
        getattr(mx, dtype)
    )
    one = mx.ones_like(g)

    def f(*x):
        return getattr(ops, op)(*x, impl=impl)

    dg, du = grads(f, [g, one], one)
    act = np.maximum(f64(g), 0)
    for x in (f(g, one), du):
        np.testing.assert_allclose(f64(x), act, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(f64(dg), [0, 0, 0, 0, 0.5, 1, 1, 1, 1], atol=1e-30)


@pytest.mark.parametrize("op", OPS)
def test_the_kernel_keeps_the_digits_of_negative_gates(op):
    """gelu(-4) is -7e-5. A computation with 1 + tanh would give only three correct digits."""
    g = np.linspace(-5, -1, 99).astype(np.float32)
    (dg, du), one = grads(getattr(ops, op), [mx.array(g), mx.ones(99)], mx.ones(99)), np.ones(99)
    truth = getattr(oracle, f"{op}_vjp")(g.astype(np.float64), one, one)
    np.testing.assert_allclose(f64(du), truth[1], rtol=2e-5)
    np.testing.assert_allclose(f64(dg), truth[0], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("op", OPS)
def test_empty_arrays(op):
    assert getattr(ops, op)(mx.ones((0, 5)), mx.ones((0, 5))).shape == (0, 5)
