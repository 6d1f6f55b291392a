import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import mlx.core as mx

from ... import _core
from .. import reference, selfcheck


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    def call(case: str, shape: tuple[int, ...], dtype: mx.Dtype, ends: list[int], **how: Any):
        how |= {"dims": 64, "base": 1e4}
        ranges = {"segments": list(pairwise(ends))} if ends else {}
        kernel = functools.partial(_core.rope, impl="kernel", **how, **ranges)
        plain = functools.partial(reference.rope, segments=ends or None, **how)
        return selfcheck.Call("rope", case, kernel, plain, selfcheck.normal(shape, dtype=dtype))

    if device == "cpu":
        yield call("", (1, 4, rows, 128), mx.float32, [])
        return
    ends = [0, 7, rows // 3, rows]  # without segments, MLX's rope is used
    for traditional in (False, True):
        for dtype in (mx.bfloat16, mx.float32):
            name = f"{str(dtype).split('.')[-1]}, {'neighbours' if traditional else 'halves'}"
            yield call(name, (2, 4, rows, 128), dtype, ends, traditional=traditional)
