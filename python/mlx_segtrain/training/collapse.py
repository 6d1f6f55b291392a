"""Detects a collapse of the rewards."""

import math
from collections.abc import Sequence

import numpy as np

#: A loss of this many standard errors is not due to chance, even if the test is repeated at every
#: step.
ERRORS = 5


def collapsed(steps: Sequence[float], window: int) -> str | None:
    """Returns part of a sentence about a collapse of the rewards, or None. `steps` are the mean
    rewards of all steps.

    Rewards have collapsed if the mean of the last `window` steps (0 turns the check off) has lost
    more than half of the gain of the best such mean over the first, and more than chance explains.
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
    """Returns the variance of a step's mean reward, including that of the prompts: half the mean
    squared difference between consecutive steps, on which a trend has little influence."""
    moves = np.concatenate([np.diff(own) for own in parts])
    return float(np.square(moves).mean()) / 2 if moves.size else 0.0
