"""One module for each op, named like its folder in csrc/ops/: how its kernels are checked and
timed.

`checks(device, rows)` returns calls of its kernels on "cpu", "metal" or "cuda"; those on a GPU have
this many rows. `cases(gpu)` returns what is timed there. An op has either or both.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any


def of_every_op(kind: str) -> Iterator[Callable[..., Any]]:
    """Collects `checks` or `cases` of the ops that have them."""
    for module in pkgutil.iter_modules(__path__):
        found = getattr(importlib.import_module(f"{__name__}.{module.name}"), kind, None)
        if found is not None:
            yield found
