"""What a run sets in MLX for the whole process while it computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from .. import ops
from ..config import TrainConfig
from ..planning.budget import working_set


@contextmanager
def run_policy(config: TrainConfig) -> Iterator[None]:
    """While it is active, a run loads and computes: training, probes, evaluation, references,
    charts.

    If the run is `deterministic`, `auto` takes only implementations that repeat bit for bit; on
    Metal, what MLX allocates stays in memory. RunPlan.limits sets further limits once there is a
    plan.
    """
    with ops.repeatable(config.deterministic), wired():
        yield


@contextmanager
def wired() -> Iterator[None]:
    """On Metal, keeps arrays from being paged out: sets MLX's wired limit to the working set.

    The planner takes its budget from the same figure. The previous limit is restored at the end.
    Does nothing on other devices.
    """
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
