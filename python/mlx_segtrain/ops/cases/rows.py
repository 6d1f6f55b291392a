import functools
from collections.abc import Iterator

import mlx.core as mx

from ... import _core
from .. import reference, selfcheck


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    if device != "cuda":
        return
    index = mx.arange(rows) * 31 % (rows // 2)  # in no order, and most of them twice
    kernel = functools.partial(_core.take_rows, index=index, impl="kernel")
    plain = functools.partial(reference.take_rows, index=index)
    yield selfcheck.Call(
        "take_rows", "", kernel, plain, selfcheck.normal((rows, 96), dtype=mx.bfloat16)
    )
