"""What a run sets in MLX for the whole process, for as long as it computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from .. import ops
from ..config import TrainConfig
from ..planning.budget import working_set


@contextmanager
def run_policy(config: TrainConfig) -> Iterator[None]:
    """Within it a run loads and computes: training, probes, evaluation, references, pictures.

    `auto` takes only implementations that give the same bits again if the run is `deterministic`,
    and on Metal what MLX allocates stays in memory. What a plan limits besides, once there is one,
    is RunPlan.limits.
    """
    with ops.repeatable(config.deterministic), wired():
        yield


@contextmanager
def wired() -> Iterator[None]:
    """On Metal, arrays are not paged out within it: MLX's wired limit is the working set.

    That is the figure from which the planner takes its budget. The limit that was set before is
    set again after it. Does nothing on other devices.
    """
    before = wire()
    try:
        yield
    finally:
        if before is not None:
            mx.set_wired_limit(before)


def wire() -> int | None:
    """Sets MLX's wired limit on Metal, for good; the one that was set before, None elsewhere."""
    most = working_set()
    return None if most is None else int(mx.set_wired_limit(most))
