import functools
from collections.abc import Iterator

import mlx.core as mx

from ... import _core, ops
from .. import bench, reference, selfcheck


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    if device == "cpu":
        x, w = selfcheck.normal((rows, 512), (1, 512))
        yield selfcheck.Call.of("rms_norm", "", [x], weight=w[0], eps=1e-5)
    if device == "cuda":
        # With the first width, some threads have no elements; with the second, each thread has more
        # than eight elements.
        for width in (1000, 4096):
            h, x, w = selfcheck.normal((rows, width), (rows, width), (2, width), dtype=mx.bfloat16)
            factor = mx.array([0.5], mx.bfloat16)

            def run(h: mx.array, x: mx.array, of=_core, w=w, factor=factor) -> mx.array:
                h, y = of.rms_norm_beside(h, w[0], 1e-5)
                x = of.rms_norm(x, w[1], 1e-5) + y
                h = of.add_rms_norm(h, x, w[0], 1e-5)
                return of.add_rms_norm(h, x, w[1], 1e-5, factor)

            plain = functools.partial(run, of=reference)
            yield selfcheck.Call("rms_norm", f"{width} wide", run, plain, [h, x])


def norm(rows: int, width: int) -> bench.Case:
    def run(impl: str) -> dict[str, bench.Work]:
        w = bench.normal(width)
        x, dy = (bench.normal(rows, width, seed=i) for i in range(2))

        def plain(x: mx.array) -> mx.array:
            if impl == "mlx":
                return mx.fast.rms_norm(x, w, 1e-5)
            return ops.rms_norm(x, w, 1e-5, impl=impl)

        return bench.with_gradients(plain, [x], dy)

    array = float(rows * width * bench.dtype().size)
    moved = {"forward": 2 * array, "grads": 3 * array, "both": 4 * array}
    impls = ["mlx"] if bench.on_gpu() else ["kernel", "mlx"]
    return bench.Case("rms_norm", f"{rows}×{width}", impls, run, moved=moved)


def cases(gpu: bool) -> list[bench.Case]:
    return [norm(*((8192, 2560) if gpu else (512, 576)))]
