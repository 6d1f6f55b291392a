"""Tests decode_linears, which computes several linear layers of a decoding step in one call and can
apply a different adapter to each row."""

import inspect

import mlx.core as mx
import numpy as np
import pytest

from lib.checks import f64, rand
from lib.linears import base_of
from mlx_segtrain import ops
from mlx_segtrain.ops import on_gpu, reference
from mlx_segtrain.ops.cases import decode_linears

WIDTH, ADAPTERS = 64, 3
KINDS = [None, ("affine", 4, 64), ("affine", 8, 32), ("affine", 3, 64), ("mxfp4", 4, 32)]


def layers(kind, ranks, dtype=mx.float32, seed=0, width=WIDTH, outs=(40, 20, 10)):
    """Returns the op's arguments, and a float64 reference as a function of x and picks."""
    rng = np.random.default_rng(seed)
    bases, weights, b, gains = [], [], [], []
    for i, rank in enumerate(ranks):
        out = outs[i]
        bias = rand(rng, out)[0].astype(dtype) if i == 1 else None
        base, weight = base_of(rng, out, width, kind, bias)
        if kind is None:
            base = ops.Base(base.weight.astype(dtype), bias=bias)
            weight = f64(base.weight)
        bases.append(base)
        weights.append(weight)
        b.append(rand(rng, ADAPTERS, out, rank)[0].astype(dtype) if rank else None)
        gains.append(rand(rng, ADAPTERS, out)[0] if i == 0 else None)
    a = rand(rng, ADAPTERS, sum(ranks), width)[0].astype(dtype) if sum(ranks) else None

    def exact(x, picks):
        ys, begin = [], 0
        for base, weight, own, gain, rank in zip(bases, weights, b, gains, ranks, strict=True):
            y = f64(x) @ weight.T
            for row, pick in enumerate(picks):
                if rank:
                    z = f64(a)[pick, begin : begin + rank] @ f64(x)[row]
                    y[row] += f64(own)[pick] @ z
                if gain is not None:
                    y[row] *= f64(gain)[pick]
            begin += rank
            ys.append(y if base.bias is None else y + f64(base.bias))
        return ys

    return (bases, a, b, gains), exact


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("ranks", "rows"), [((8, 0, 3), 1), ((3, 8), 5), ((70,), 16), ((0,), 2)])
def test_each_row_has_its_adapter(kind, ranks, rows):
    arguments, exact = layers(kind, ranks)
    x = rand(np.random.default_rng(1), rows, WIDTH)[0]
    picks = [(2 * i + 1) % ADAPTERS for i in range(rows)]
    wanted = exact(x, picks)
    op = ops.decode_linears(*arguments)
    ours = op(x, mx.array(picks, mx.uint32))
    plain = reference.decode_linears(x, *arguments, mx.array(picks))
    for y, other, right in zip(ours, plain, wanted, strict=True):
        for found in (y, other):
            error = np.linalg.norm(f64(found) - right) / np.linalg.norm(right)
            assert error < (1e-2 if on_gpu() else 1e-5), error


HALVES = [
    *((("affine", bits, group), mx.bfloat16) for bits in (2, 4, 8) for group in (32, 64, 128)),
    (("affine", 4, 64), mx.float16),
    (("affine", 8, 32), mx.float16),
    (None, mx.bfloat16),
    (None, mx.float16),
]


@pytest.mark.parametrize(("kind", "dtype"), HALVES, ids=str)
def test_rows_in_half_precision(kind, dtype):
    """Tests widths that are not multiples of the sizes of tiles and chunks. A row's result is the
    same in any batch of several rows."""
    ranks, outs, width = (16, 3, 8), (72, 40, 8), 16 * 7 if kind is None else 128 * 3
    arguments, exact = layers(kind, ranks, dtype, width=width, outs=outs)
    op = ops.decode_linears(*arguments)
    x = rand(np.random.default_rng(1), 16, width)[0].astype(dtype)
    picks = [(2 * i + 1) % ADAPTERS for i in range(16)]
    wanted, bound = exact(x, picks), 0.01 if dtype == mx.bfloat16 else 2e-3
    whole = op(x, mx.array(picks, mx.uint32))
    for rows in (1, 2, 5, 8, 9, 16):
        ours = op(x[:rows], mx.array(picks[:rows], mx.uint32))
        for y, right, other in zip(ours, wanted, whole, strict=True):
            error = np.linalg.norm(f64(y) - right[:rows]) / np.linalg.norm(right[:rows])
            assert y.dtype == dtype and error < bound, (rows, error)
            if on_gpu() and rows > 1:
                assert mx.array_equal(y, other[:rows]), rows


def test_a_device_s_cases_fit_its_kernel():
    """The kernel must support the calls of the self-check, because the self-check would otherwise
    disable the kernel."""
    for call in decode_linears.checks("cuda", 64):
        values = inspect.signature(call.kernel).parameters
        x, op, picks = (values[name].default for name in ("x", "kernel", "picks"))
        assert call.plain(*call.args).shape == mx.concatenate(op(x, picks), -1).shape
        widths = [y.shape[-1] for y in op(x, picks)]
        assert x.shape[-1] % 16 == 0 and all(width % 8 == 0 for width in widths), widths


def test_what_a_kernel_takes():
    arguments, _ = layers(("affine", 4, 64), (8,))
    op = ops.decode_linears(*arguments)
    if not on_gpu():
        assert op.unfit(mx.float32, 1) == "there is no GPU"
    x = mx.zeros((2, 3, WIDTH))
    (y,) = op(x, mx.zeros(6, mx.uint32))
    assert y.shape == (2, 3, 40)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda bases, a, b, gains: ([], a, b, gains), "at least one base"),
        (lambda bases, a, b, gains: (bases, a[:, 1:], b, gains), r"expected a \[E, 8, 64\]"),
        (lambda bases, a, b, gains: (bases, None, b, gains), "together with a"),
        (lambda bases, a, b, gains: (bases, a, [b[0][:, 1:]], gains), r"expected b \[E, 40, R_j\]"),
        (lambda bases, a, b, gains: (bases, a, b, [gains[0][:, 1:]]), r"gains \[E, 40\]"),
    ],
)
def test_arrays_that_do_not_fit(change, sentence):
    arguments, _ = layers(("affine", 4, 64), (8,))
    with pytest.raises(ValueError, match=sentence):
        ops.decode_linears(*change(*arguments))


def test_calls_that_do_not_fit():
    op = ops.decode_linears(*layers(("affine", 4, 64), (8,))[0])
    with pytest.raises(ValueError, match=r"expected x \[..., 64\]"):
        op(mx.zeros((1, 32)), mx.zeros(1, mx.uint32))
    with pytest.raises(ValueError, match=r"expected picks \[2\] of uint32"):
        op(mx.zeros((2, WIDTH)), mx.zeros(1, mx.uint32))
