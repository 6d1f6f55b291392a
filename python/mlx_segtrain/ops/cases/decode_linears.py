"""Linear layers of a step of generation with updates by rows, in one launch on CUDA."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from ... import _core
from .. import reference, selfcheck

#: Bits of a weight, group size, rows of x, ranks of the linear layers (0 means no update).
CASES = (
    (4, 64, 1, (8, 0, 8)),
    (4, 32, 4, (16, 3)),
    (8, 128, 16, (40, 8, 8)),
    (2, 64, 1, (96,)),
    (0, 0, 3, (16, 16)),
)


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    """Yields checks. The op has no gradient, so it is a factor of a product that has one."""
    if device != "cuda":
        return
    width, adapters = 512, 3
    for bits, group, m, ranks in CASES:
        bases, b, gains = [], [], []
        for i, rank in enumerate(ranks):
            out = 256 >> i
            weight, bias = selfcheck.normal((out, width), (1, out), dtype=mx.bfloat16, seed=i)
            how: dict[str, Any] = {"group_size": group, "bits": bits}
            own = mx.quantize(weight / 16, **how) if bits else (weight / 16, None, None)
            bases.append(_core.Base(*own, bias[0], **(how if bits else {})))
            (right,) = selfcheck.normal(
                (adapters, out, max(rank, 1)), dtype=mx.bfloat16, seed=9 + i
            )
            b.append(right if rank else None)
            (gain,) = selfcheck.normal((adapters, out), seed=20 + i)
            gains.append(gain if i == 0 else None)
        total = max(sum(ranks), 1)
        x, a = selfcheck.normal((m, width), (adapters, total, width), dtype=mx.bfloat16, seed=5)
        picks = (mx.arange(m) % adapters).astype(mx.uint32)
        kernel = _core.DecodeLinears(bases, a / 16, b, gains)

        def run(one: mx.array, x=x, kernel=kernel, picks=picks) -> mx.array:
            return one * mx.concatenate(kernel(x, picks, impl="kernel"), -1)

        def plain(one: mx.array, x=x, a=a / 16, of=(bases, b, gains), picks=picks) -> mx.array:
            bases, b, gains = of
            ys = reference.decode_linears(x, bases, a, b, gains, picks)
            return one * mx.concatenate(ys, -1).astype(mx.bfloat16)

        case = f"{bits or 16} bits, {m} rows, ranks {', '.join(map(str, ranks))}"
        one = mx.ones((m, sum(base.out_dims for base in bases)), mx.bfloat16)
        yield selfcheck.Call("decode_linears", case, run, plain, [one])
