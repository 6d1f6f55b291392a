"""Settings of MLX that apply to the whole process during a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from .. import ops
from ..config import TrainConfig
from ..planning.budget import working_set


@contextmanager
def run_policy(config: TrainConfig) -> Iterator[None]:
    """Applies MLX's settings while a run is loading and training. If `deterministic` is set, only
    implementations whose results are bit-identical between runs are chosen automatically. On Metal,
    MLX's memory is wired. Once the run is planned, RunPlan.limits sets further limits."""
    with ops.repeatable(config.deterministic), wired():
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
