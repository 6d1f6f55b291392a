"""Checks and benchmarks of the ops. Each op has a module that is named after the op's folder in
csrc/ops/.

In such a module, `checks(device, rows)` yields calls of the op's kernels on "cpu", "metal" or
"cuda", each with `rows` rows, and `cases(gpu)` returns the cases to time. A module defines one or
both of these functions.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any


def of_every_op(kind: str) -> Iterator[Callable[..., Any]]:
    """Yields the function named `kind` ("checks" or "cases") of each module that defines it."""
    for module in pkgutil.iter_modules(__path__):
        found = getattr(importlib.import_module(f"{__name__}.{module.name}"), kind, None)
        if found is not None:
            yield found
