"""DoRA: trains the magnitudes of an adapted weight's rows separately from their directions.

    y = m / ‖W + s·(ab)ᵀ‖ ⊙ (W + s·(ab)ᵀ)x        for each row; then the bias is added

The gradient treats the norm as a constant. The norm is computed without forming W + s·(ab)ᵀ,
because that would require the dequantized weight. For a row w of W and its update u, ‖w + u‖² =
‖w‖² + 2w·u + ‖u‖². The first term is known, the second needs a pass of R rows through the frozen
layer, and the third needs the inner products of a's columns. See Liu et al. 2024, arXiv:2402.09353.
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import ops

#: The number of rows of a weight that are dequantized at a time.
ROWS = 1024


@dataclass(frozen=True)
class Stretch:
    """The parts of a frozen linear layer that DoRA needs: the weight, the bias, and the norms ‖w‖
    of the weight's rows, float32 [out]."""

    base: ops.Base
    bias: mx.array | None
    norms: mx.array

    @classmethod
    def of(cls, base: ops.Base) -> "Stretch":
        """Computes the norms of the weight's rows. Dequantizes the weight once, ROWS rows at a
        time."""
        norms = []
        for begin in range(0, base.out_dims, ROWS):
            rows = ops.rows_of(base, begin, min(begin + ROWS, base.out_dims))
            weight = rows.weight if rows.scales is None else ops.dequantize(rows)
            norms.append(mx.linalg.norm(weight.astype(mx.float32), axis=1))
            mx.eval(norms)
        bare = ops.Base(base.weight, base.scales, base.biases, **ops.packing(base))
        return cls(bare, base.bias, mx.concatenate(norms))

    def __call__(self, z: mx.array, linear: ops.Linear, m: mx.array) -> mx.array:
        """Maps z [..., out], the layer's output with the update but without the bias, to y [...,
        out]. m [out] contains the magnitudes.

        Gradients are computed for z and m.
        """
        y: Any = _times(z, self.gain(z.dtype, linear, m))
        return y if self.bias is None else y + self.bias

    def gain(self, dtype: mx.Dtype, linear: ops.Linear, m: mx.array) -> mx.array:
        """Returns m / ‖w + u‖, float32 [out]. The pass through the frozen layer is computed in
        `dtype`."""
        return m / mx.stop_gradient(self._lengths(dtype, linear))

    @property
    def start(self) -> mx.array:
        """Returns the initial magnitudes: the norms of the frozen weight's rows, which leave the
        layer's output unchanged."""
        return self.norms

    @staticmethod
    def dense(weight: mx.array, m: mx.array) -> mx.array:
        """Scales each row of `weight` [out, in], which includes the update, to its magnitude in m
        [out]."""
        return weight * (m / mx.linalg.norm(weight, axis=1))[:, None]

    def _lengths(self, dtype: mx.Dtype, linear: ops.Linear) -> mx.array:
        """Returns ‖w + u‖, float32 [out]."""
        assert linear.a is not None and linear.b is not None
        a, b = mx.stop_gradient(linear.a), linear.scale * mx.stop_gradient(linear.b)
        across = ops.lora_linear(a.T.astype(dtype), self.base).astype(mx.float32)  # [R, out]
        own = (a.T @ a) @ b
        return mx.sqrt(mx.maximum(self.norms**2 + (b * (2 * across + own)).sum(0), 0))


@mx.custom_function
def _times(z: mx.array, gain: mx.array) -> mx.array:
    """Returns gain ⊙ z in z's dtype. The product is computed as z + (gain − 1) ⊙ z, because
    bfloat16 is too coarse for a gain near 1."""
    return z + z * (gain - 1).astype(z.dtype)


@_times.vjp
def _times_vjp(
    primals: tuple[mx.array, mx.array], dy: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    z, gain = primals
    # A matrix product with ones replaces a sum, because a matrix product accumulates in float32
    # regardless of the dtype.
    ones = mx.ones((1, math.prod(z.shape[:-1])), z.dtype)
    d_gain = (ones @ (dy * z).reshape(-1, z.shape[-1]))[0].astype(mx.float32)
    return mx.depends([dy + dy * (gain - 1).astype(dy.dtype)], [d_gain])[0], d_gain
