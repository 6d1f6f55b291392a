"""Process-wide settings of MLX during a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from .. import ops
from ..config import TrainConfig
from ..planning.budget import working_set


@contextmanager
def run_policy(config: TrainConfig) -> Iterator[None]:
    """Applies these settings while a run is loading and training: with `deterministic`, `auto`
    takes only implementations that are bit-identical between runs; on Metal, MLX's memory is wired.
    RunPlan.limits sets further limits once there is a plan."""
    with ops.repeatable(config.deterministic), wired():
        yield


@contextmanager
def wired() -> Iterator[None]:
    """On Metal, keeps arrays from being paged out: sets MLX's wired limit to the working set, from
    which the planner also takes its budget. Restores the previous limit at the end."""
    before = wire()
    try:
        yield
    finally:
        if before is not None:
            mx.set_wired_limit(before)


def wire() -> int | None:
    """Sets MLX's wired limit on Metal permanently; returns the previous one, or None on other
    devices."""
    most = working_set()
    return None if most is None else int(mx.set_wired_limit(most))
