"""Settings of MLX that apply to the whole process during a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from .. import _core, ops
from ..config import TrainConfig
from ..errors import InputError
from ..planning.budget import working_set


@contextmanager
def run_policy(config: TrainConfig) -> Iterator[None]:
    """Applies MLX's settings while a run is loading and training. If `deterministic` is set, only
    implementations whose results are bit-identical between runs are chosen automatically. On Metal,
    MLX's memory is wired. Once the run is planned, RunPlan.limits sets further limits. Raises
    InputError if this device does not support the configured matmul_precision."""
    rounds = config.matmul_precision == "bfloat16"
    if rounds and mx.default_device() != mx.Device(mx.cpu):
        raise InputError(
            "matmul_precision bfloat16 is only for CPUs; on a GPU, products are computed in the "
            "model's dtype: leave matmul_precision out.",
            field="matmul_precision",
        )
    if rounds and not _core.has_bfloat16_products():
        raise InputError(
            "matmul_precision bfloat16 requires AVX512-BF16, which this CPU does not have: leave "
            "matmul_precision out.",
            field="matmul_precision",
        )
    with ops.repeatable(config.deterministic), ops.bfloat16_products(rounds), wired():
        yield


@contextmanager
def wired() -> Iterator[None]:
    """On Metal, prevents arrays from being paged out: sets MLX's wired limit to the recommended
    working set size, from which the planner also derives its budget. Restores the previous limit at
    the end."""
    before = wire()
    try:
        yield
    finally:
        if before is not None:
            mx.set_wired_limit(before)


def wire() -> int | None:
    """Sets MLX's wired limit on Metal for the rest of the process and returns the previous limit.
    Does nothing on other devices and returns None."""
    most = working_set()
    return None if most is None else int(mx.set_wired_limit(most))
