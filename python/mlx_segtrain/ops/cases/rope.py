import functools
from collections.abc import Iterator

from ... import _core
from .. import reference, selfcheck


def checks(device: str, rows: int) -> Iterator[selfcheck.Call]:
    if device == "cpu":
        kernel = functools.partial(_core.rope, dims=64, base=1e4, impl="kernel")
        plain = functools.partial(reference.rope, dims=64, base=1e4)
        yield selfcheck.Call("rope", "", kernel, plain, selfcheck.normal((1, 4, rows, 128)))
