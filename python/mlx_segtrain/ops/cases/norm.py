import functools
from collections.abc import Iterator

import mlx.core as mx

from ... import _core, ops
from .. import bench, reference, selfcheck


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    if device == "cpu":
        x, w = selfcheck.normal((rows, 512), (1, 512))
        kernel = functools.partial(_core.rms_norm, weight=w[0], eps=1e-5, impl="kernel")
        plain = functools.partial(reference.rms_norm, weight=w[0], eps=1e-5)
        yield selfcheck.Call("rms_norm", "", kernel, plain, [x])


def norm(op: str, rows: int, width: int) -> bench.Case:
    def run(impl: str) -> dict[str, bench.Work]:
        w = bench.normal(width)
        x, r, dy = (bench.normal(rows, width, seed=i) for i in range(3))
        if op == "rms_norm":

            def plain(x: mx.array) -> mx.array:
                if impl == "mlx":
                    return mx.fast.rms_norm(x, w, 1e-5)
                return ops.rms_norm(x, w, 1e-5, impl=impl)

            return bench.with_gradients(plain, [x], dy)

        def summed(x: mx.array, r: mx.array) -> tuple[mx.array, mx.array]:
            return ops.add_rms_norm(x, r, w, 1e-5, impl="stock" if impl == "mlx" else impl)

        return bench.with_gradients(summed, [x, r], dy, r)

    array = float(rows * width * bench.dtype().size)
    arrays = (2, 3, 4) if op == "rms_norm" else (4, 5, 7)
    moved = {what: n * array for what, n in zip(("forward", "grads", "both"), arrays, strict=True)}
    return bench.Case(
        op, f"{rows}×{width}", ["mlx"] if bench.on_gpu() else ["kernel", "mlx"], run, moved=moved
    )


def cases(gpu: bool) -> list[bench.Case]:
    size = (8192, 2560) if gpu else (512, 576)
    return [norm("rms_norm", *size), norm("add_rms_norm", *size)]
