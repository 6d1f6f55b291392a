"""Detects a collapse of the rewards."""

import math
from collections.abc import Sequence

import numpy as np

#: Standard errors that chance does not explain, given that the test is repeated at every step.
ERRORS = 5


def collapsed(steps: Sequence[float], window: int) -> str | None:
    """Returns how the rewards collapsed, as part of a sentence; None if they did not. `steps` are
    the mean rewards of all steps.

    They collapsed if the mean of the last `window` steps (0: never) has lost more than half of what
    the best such mean had gained over the first, and more than chance explains.
    """
    if not window or len(steps) <= window:
        return None
    means = np.array(steps, np.float64)
    smooth = np.convolve(means, np.ones(window) / window, "valid")
    best, last = int(smooth.argmax()), len(smooth) - 1
    lost = smooth[best] - smooth[last]
    ends = [means[begin : begin + window] for begin in (best, last)]
    chance = ERRORS * math.sqrt(2 * max(_variance(means), _variance(*ends)) / window)
    if lost > (smooth[best] - smooth[0]) / 2 and lost > chance and lost > 0:
        return (
            f"the mean reward of {window} steps fell from {smooth[best]:.3f} to {smooth[last]:.3f}"
        )
    return None


def _variance(*parts: np.ndarray) -> float:
    """Returns the variance of a step's mean reward, including the choice of prompts: half the mean
    square of the differences between consecutive steps, which a trend changes little."""
    moves = np.concatenate([np.diff(own) for own in parts])
    return float(np.square(moves).mean()) / 2 if moves.size else 0.0
