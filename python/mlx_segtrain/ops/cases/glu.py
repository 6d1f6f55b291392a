from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from ... import ops
from .. import bench, selfcheck


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    for dtype in (mx.float32,) if device == "cpu" else (mx.bfloat16, mx.float32):
        for op in ("swiglu", "geglu"):
            args = selfcheck.normal((rows, 1023), (rows, 1023), dtype=dtype)
            yield selfcheck.Call.of(op, str(dtype).split(".")[-1], args)


def glu(op: str, rows: int, width: int) -> bench.Case:
    def run(impl: str) -> dict[str, bench.Work]:
        act = nn.gelu_approx if op == "geglu" else nn.silu

        def f(gate: mx.array, up: mx.array) -> mx.array:
            return act(gate) * up if impl == "mlx" else getattr(ops, op)(gate, up, impl=impl)

        gate, up, dy = (bench.normal(rows, width, seed=i) for i in range(3))
        return bench.with_gradients(f, [gate, up], dy)

    array = float(rows * width * bench.dtype().size)
    moved = {"forward": 3 * array, "grads": 5 * array, "both": 6 * array}
    return bench.Case(op, f"{rows}×{width}", ["kernel", "stock", "mlx"], run, moved=moved)


def cases(gpu: bool) -> list[bench.Case]:
    if not gpu:
        return [glu("geglu", 512, 1536), glu("swiglu", 512, 1536), glu("swiglu", 8192, 1536)]
    return [glu("geglu", 8192, 10240), glu("swiglu", 8192, 4608)]
