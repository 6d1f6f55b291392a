"""Checks and benchmarks of the ops, in a module for each, which is named like the op's folder in
csrc/ops/.

`checks(device, rows)` yields calls of its kernels on "cpu", "metal" or "cuda"; on a GPU they have
this many rows. `cases(gpu)` returns the cases to time. An op has either or both.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any


def of_every_op(kind: str) -> Iterator[Callable[..., Any]]:
    """Yields the functions `checks` or `cases` of the ops that have them."""
    for module in pkgutil.iter_modules(__path__):
        found = getattr(importlib.import_module(f"{__name__}.{module.name}"), kind, None)
        if found is not None:
            yield found
