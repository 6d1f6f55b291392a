"""The text of metal/rope.metal run on the CPU, against the oracle: docs/metal_on_linux.md."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from lib import oracle, specs
from lib.checks import f64, rand
from metal_emulator import MetalError, kernels
from mlx_segtrain.ops import reference

pytestmark = pytest.mark.acceptance


def check(dims, traditional, dtype, of=kernels.KERNELS, t=11, offset=0):
    rng = np.random.default_rng(dims)
    segments = [0, 1, 5, offset + t]
    with mx.stream(mx.cpu):
        (x, x64), (dy, dy64) = (rand(rng, 2, 3, t, 24, dtype=dtype) for _ in range(2))
        freqs = mx.array(rng.uniform(1, 50, dims // 2).astype(np.float32))
        positions = reference.positions_of(offset, t, segments)
        how = (dims, freqs, positions.tolist(), 0.5, traditional)
        plain = {"traditional": traditional, "scale": 0.5, "offset": offset, "segments": segments}
        (y,), (dx,) = mx.vjp(lambda x: reference.rope(x, dims, freqs=freqs, **plain), [x], [dy])
        exact = {**plain, "freqs": f64(freqs)}
        back = {**plain, "freqs": -f64(freqs)}
        got = kernels.rope(x, *how, kernels=of)
        oracle.assert_no_worse("y", f64(got), f64(y), oracle.rope(x64, dims, **exact), dtype)
        got = kernels.rope(dy, *how, back=True, kernels=of)
        oracle.assert_no_worse("dx", f64(got), f64(dx), oracle.rope(dy64, dims, **back), dtype)


@pytest.mark.parametrize("dtype", specs.DTYPES)
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize(("dims", "t", "offset"), [(24, 11, 0), (16, 3, 9), (8, 40, 2)])
def test_rope(dims, t, offset, traditional, dtype):
    check(dims, traditional, dtype, t=t, offset=offset)


# ---- the tests themselves: broken text does not pass


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
    kernel = kernels.KERNELS["rope"]
    assert old in kernel.header
    header = kernel.header.replace(old, new)
    with pytest.raises(error):
        check(16, False, "float32", kernels.KERNELS | {"rope": replace(kernel, header=header)})
