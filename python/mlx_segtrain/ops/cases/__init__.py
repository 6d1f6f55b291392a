"""One module an op, by the name of its folder in csrc/ops/: how its kernels are checked and timed.

`checks(device, rows)` gives calls of its kernels on a "cpu", on "metal" or on "cuda"; those on a
GPU have this many rows. `cases(gpu)` gives what is timed there. An op has one of them, or both.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any


def of_every_op(kind: str) -> Iterator[Callable[..., Any]]:
    """`checks` or `cases` of the ops that have it."""
    for module in pkgutil.iter_modules(__path__):
        found = getattr(importlib.import_module(f"{__name__}.{module.name}"), kind, None)
        if found is not None:
            yield found
