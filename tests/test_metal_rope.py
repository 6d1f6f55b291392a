"""Runs the Metal kernels for rotary embeddings on the CPU, and compares them with the oracle.

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


def check(dims, traditional, dtype, *changes, t=11, offset=0):
    rng = np.random.default_rng(dims)
    segments = [0, 1, 5, offset + t]
    with mx.stream(mx.cpu):
        (x, x64), (dy, dy64) = (rand(rng, 2, 3, t, 24, dtype=dtype) for _ in range(2))
        freqs = mx.array(rng.uniform(1, 50, dims // 2).astype(np.float32))
        how = {"traditional": traditional, "scale": 0.5, "offset": offset, "segments": segments}

        def differentiated(op, **more):
            (y,), (dx,) = mx.vjp(lambda x: op(x, dims, freqs=freqs, **how, **more), [x], [dy])
            return y, dx

        plain = differentiated(reference.rope)
        with emulated(*changes):
            got = differentiated(ops.rope, impl="kernel")
        truth = [
            oracle.rope(x64, dims, freqs=f64(freqs), **how),
            oracle.rope(dy64, dims, freqs=-f64(freqs), **how),
        ]
        for name, y, ref, true in zip(("y", "dx"), got, plain, truth, strict=True):
            oracle.assert_no_worse(name, f64(y), f64(ref), true, dtype)


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize(("dims", "t", "offset"), [(24, 11, 0), (16, 3, 9), (8, 40, 2)])
def test_rope(dims, t, offset, traditional, dtype):
    check(dims, traditional, dtype, t=t, offset=offset)


# ---- planted faults must be detected


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("positions[t]", "t", AssertionError),
        ("-precise::sin", "precise::sin", AssertionError),
        ("u * c - v * s", "u * c + v * s", AssertionError),
        ("row / H % N", "row % N", AssertionError),
        ("if (row >= B * N * H) return;", "", MetalError),
        ("if (item >= half_dims) {", "if (item > half_dims) {", MetalError),
    ],
)
def test_broken_text(old, new, error):
    with pytest.raises(error):
        check(16, False, "float32", Change("rope", old, new))
