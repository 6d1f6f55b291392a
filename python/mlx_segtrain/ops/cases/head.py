from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ... import _core, ops
from .. import bench, selfcheck
from .linear import frozen, mlx_product


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    if device == "metal":
        return
    dtype = mx.float32 if device == "cpu" else mx.bfloat16
    vocabulary = 2000 if device == "cpu" else 17000  # two tiles of the head
    h, w = selfcheck.normal((rows, 512), (vocabulary, 512), dtype=dtype)
    head, targets = _core.Base(w / 16), mx.arange(rows) * 31 % vocabulary
    how: dict[str, Any] = {"head": head, "targets": targets, "softcap": 30.0}
    yield selfcheck.Call.of("linear_cross_entropy", "softcap", [h], **how)


def head(
    rows: int, width: int, vocabulary: int, bits: int, group: int, cap: float | None
) -> bench.Case:
    def run(impl: str) -> dict[str, bench.Work]:
        base = frozen(vocabulary, width, bits, group)
        targets = mx.random.randint(0, vocabulary, (rows,))
        mx.eval(targets)
        if impl == "products":
            w, h = ops.dequantize(base, bench.dtype()), bench.normal(rows, width)
            mx.eval(w, h)

            def both(h: mx.array, w: mx.array) -> mx.array:
                return (h @ w.T) @ w

            return {"both": bench.Work(both, (h, w), mx.compile(both))}

        def f(h: mx.array) -> mx.array:
            if impl != "mlx":
                return ops.linear_cross_entropy(h, base, targets, softcap=cap, impl=impl)
            z = mlx_product(h, base)
            z = z if cap is None else cap * mx.tanh(z / cap)
            return nn.losses.cross_entropy(z.astype(mx.float32), targets, reduction="sum")

        return bench.with_gradients(f, [bench.normal(rows, width)], mx.array(1.0))

    flops = {"both": 4.0 * rows * width * vocabulary}
    shape = f"{rows}×{width}×{vocabulary}"
    impls = ["kernel", "blocked", "mlx", *(["products"] if bench.on_gpu() else [])]
    limit = 400.0 if bench.on_gpu() else None
    return bench.Case("linear_cross_entropy", shape, impls, run, flops, limit_mb=limit)


def cases(gpu: bool) -> list[bench.Case]:
    if not gpu:
        return [head(512, 576, 49152, 8, 32, None)]
    return [head(2048, 2560, 262144, 4, 64, 30.0)]
