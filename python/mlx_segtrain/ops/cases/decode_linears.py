"""Linear layers in a generation step, with a LoRA update per row. On CUDA, a single kernel launch
computes them."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from ... import _core, ops
from .. import bench, reference, selfcheck
from .linear import frozen, mlx_product

#: Bits of the weights (0 means dense), group size, number of rows of x, and ranks of the linear
#: layers (0 means no update).
CASES = (
    (4, 64, 1, (8, 0, 8)),
    (4, 32, 4, (16, 3)),
    (4, 64, 7, (16, 8, 8)),
    (8, 128, 16, (40, 8, 8)),
    (2, 64, 1, (96,)),
    (2, 32, 12, (8,)),
    (0, 0, 3, (16, 16)),
    (0, 0, 16, (8,)),
)


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    """Yields checks. The op has no gradient, but a check compares gradients. Therefore, the op's
    result is multiplied by an array that has a gradient."""
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


def linears(name: str, outs: tuple[int, ...], width: int, rank: int, rows: int) -> bench.Case:
    """Returns a benchmark of 4-bit layers that read the same rows, where each row uses one of three
    adapters. MLX's implementation computes no updates."""

    def run(impl: str) -> dict[str, bench.Work]:
        bases = [frozen(out, width, 4, 64, seed=i) for i, out in enumerate(outs)]
        x, picks = bench.normal(rows, 1, width), (mx.arange(rows) % 3).astype(mx.uint32)
        mx.eval(x, picks)
        if impl == "mlx":
            return {"forward": bench.Work(lambda x: [mlx_product(x, w) for w in bases], (x,))}
        a = bench.normal(3, rank * len(outs), width) if rank else None
        b = [bench.normal(3, out, rank) if rank else None for out in outs]
        op = ops.decode_linears(bases, a, b)
        return {"forward": bench.Work(lambda x: op(x, picks, impl=impl), (x,))}

    moved = sum(outs) * width * (4 + 32 / 64) / 8
    shape = f"{name} {rows}×{width}, rank {rank}"
    return bench.Case("decode_linears", shape, ["kernel", "mlx"], run, moved={"forward": moved})


def cases(gpu: bool) -> list[bench.Case]:
    """Returns cases with the layers of MiniCPM5-1B."""
    layers = (
        ("q, k, v", (2048, 256, 256), 1536, 16),
        ("o", (1536,), 2048, 16),
        ("gate, up", (4608, 4608), 1536, 16),
        ("down", (1536,), 4608, 16),
        ("head", (130560,), 1536, 0),
    )
    return [linears(*layer, rows) for layer in layers for rows in (1, 4, 8, 16)] if gpu else []
