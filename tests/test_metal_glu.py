"""Runs the Metal kernels for gated linear units on the CPU, and compares them with the oracle.

See docs/metal_on_linux.md.
"""

import mlx.core as mx
import numpy as np
import pytest

from lib import oracle, specs
from lib.checks import f64, rand
from metal_emulator import MetalError
from metal_emulator.kernels import Change, emulated
from mlx_segtrain import ops
from mlx_segtrain.ops import reference

pytestmark = pytest.mark.acceptance


def launch(op, gate, up, dy, *changes):
    """Returns y, dgate and dup."""
    with emulated(*changes):

        def unit(gate, up):
            return getattr(ops, op)(gate, up, impl="kernel")

        (y,), grads = mx.vjp(unit, [gate, up], [dy])
        return [y, *grads]


def check(op, n, dtype, *changes, scale=1):
    rng = np.random.default_rng(n)
    with mx.stream(mx.cpu):
        arrays = [rand(rng, n, dtype=dtype)[0] for _ in range(3)]
        arrays[0] = arrays[0] * scale
        exact = [f64(x) for x in arrays]
        got = launch(op, *arrays, *changes)
        plain = [getattr(reference, op)(*arrays[:2])]
        plain += grads_of(op, arrays)
        truth = [getattr(oracle, op)(*exact[:2]), *getattr(oracle, f"{op}_vjp")(*exact)]
        for name, x, ref, true in zip(("y", "dgate", "dup"), got, plain, truth, strict=True):
            oracle.assert_no_worse(name, f64(x), f64(ref), true, dtype)


def grads_of(op, arrays):
    return mx.vjp(getattr(reference, op), arrays[:2], arrays[2:])[1]


@pytest.mark.parametrize("dtype", specs.DTYPES)
# Arrays of fewer than 8 elements are in constant memory.
@pytest.mark.parametrize("n", [1, 7, 8, 255, 1024, 1025, 3000])
@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_glu(op, n, dtype):
    check(op, n, dtype)


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_far_gates(op):
    gate = mx.array([-1e38, -300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0, 1e38])
    one = mx.ones(9)
    y, dgate, dup = launch(op, gate, one, one)
    act = np.maximum(f64(gate), 0)
    for x in (y, dup):
        np.testing.assert_allclose(f64(x), act, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(f64(dgate), [0, 0, 0, 0, 0.5, 1, 1, 1, 1], atol=1e-7)


def test_same_call_is_bitwise_equal():
    arrays = [rand(np.random.default_rng(i), 1500, dtype="float16")[0] for i in range(3)]
    for x, y in zip(launch("geglu", *arrays), launch("geglu", *arrays), strict=True):
        assert mx.array_equal(x, y)


# ---- planted faults must be detected


@pytest.mark.parametrize(
    ("name", "old", "new", "at", "error"),
    [
        ("glu", "if (i >= uint(n)) return;", "", 0, "read out of bounds: gate"),
        ("glu_vjp", "i >= uint(n)", "i > uint(n)", 1, "read out of bounds: gate"),
        ("glu", "j < PER", "j < PER - 1", 0, "is never written"),
        ("glu_vjp", "group * PER + j", "group * (PER - 1) + j", 1, "after another thread wrote it"),
        ("glu_vjp", "dup[i] =", "dgate[i] =", 0, "is never written"),
    ],
)
def test_broken_memory_access(name, old, new, at, error):
    with pytest.raises(MetalError, match=error):
        check("geglu", 1500, "float32", Change(name, old, new, at))


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
@pytest.mark.parametrize(
    ("name", "old", "new", "at"),
    [
        ("glu", "u < 0.0f ? e * r : r", "r", 0),
        ("glu", "-abs(u)", "u", 0),
        ("glu", "T(g * at.s", "T(at.s", 0),
        ("glu_vjp", "e * r * r * du * g}", "e * r * r * du}", 0),
        ("glu_vjp", "(at.s + at.bend)", "at.s", 0),
        ("glu_vjp", "d * (g * at.s)", "d * at.s", 0),
    ],
)
def test_broken_mathematics(op, name, old, new, at):
    with pytest.raises(AssertionError):
        check(op, 1500, "bfloat16", Change(name, old, new, at))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("glu", "k = 1.5957691216f", "k = 1.59f"),
        ("glu", "k * g * (1.0f + cubic * q) : g", "k * g : g"),
        ("glu_vjp", "3.0f * cubic", "2.0f * cubic"),
    ],
)
def test_broken_gelu(name, old, new):
    with pytest.raises(AssertionError):
        check("geglu", 1500, "float32", Change(name, old, new))


def test_a_square_without_bound_is_found():
    change = Change("glu_vjp", "min(g * g, 1024.0f)", "g * g")
    gate, one = mx.full(9, 1e30), mx.ones(9)
    assert mx.isnan(launch("geglu", gate, one, one, change)[1]).all()
