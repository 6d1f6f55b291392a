"""Tests the estimated remaining time of a run, including the time for evaluations and
checkpoints."""

import pytest

from mlx_segtrain.training.pace import Pace, due


@pytest.mark.parametrize("every", [0, 1, 3, 7, 50])
def test_what_is_due_is_what_the_loop_does(every: int) -> None:
    for last in range(1, 25):
        for after in range(-1, last + 1):
            steps = range(after + 1, last + 1)
            there = sum(s == last or (every > 0 and s % every == 0) for s in steps)
            assert due(after, last, every) == there, (after, last)


def test_what_is_left_counts_evaluations_and_checkpoints() -> None:
    pace = Pace()
    assert pace.left(10, 2, 2) == 0  # without any measured times
    pace.add("step", 9.0)
    assert pace.left(10, 2, 2) == 90
    for _ in range(3):
        pace.add("step", 1.0)  # the first step was slow because it compiled kernels
    pace.add("evaluation", 20.0)
    assert pace.left(10, 2, 2) == 50
    pace.add("checkpoint", 0.5)
    assert pace.left(10, 2, 2) == 51


def test_old_times_are_forgotten() -> None:
    pace = Pace()
    for seconds in [5.0] * 40 + [1.0] * 32:
        pace.add("step", seconds)
    assert pace.left(1, 0, 0) == 1
