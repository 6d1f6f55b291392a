import functools
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from ... import _core
from .. import reference, selfcheck


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    if device != "cuda":
        return
    index = mx.arange(rows) * 31 % (rows // 2)  # unordered, and most indices occur twice
    x = selfcheck.normal((rows, 96), dtype=mx.bfloat16)
    yield selfcheck.Call.of("take_rows", "", x, index=index)
    yield from _of_a_table(rows, index)


def _of_a_table(rows: int, index: mx.array) -> Iterator[selfcheck.Call]:
    """Yields checks of ops without gradients. Their results are multiplied by an array that has a
    gradient, because a check compares gradients."""
    w, x, norm = selfcheck.normal((rows // 2, 512), (rows, 128), (1, 128), dtype=mx.bfloat16)
    table = _core.Base(*mx.quantize(w, bits=4), group_size=64, bits=4)

    def embedded(x: mx.array, of: Any = _core) -> mx.array:
        return x * of.embedded_rows(table, index, begin=256, end=384, factor=3.0)

    def own(x: mx.array, of: Any = _core) -> mx.array:
        given = mx.stop_gradient(x)
        return x * of.own_input(given, norm[0], 1e-5, table, index, 128, [0.5, 2.0, 0.75])

    ops: dict[str, Callable[..., mx.array]] = {"embedded_rows": embedded, "own_input": own}
    for op, run in ops.items():
        yield selfcheck.Call(op, "", run, functools.partial(run, of=reference), [x])
