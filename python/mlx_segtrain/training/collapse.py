"""Detects a collapse of the rewards."""

import math
from collections.abc import Sequence

import numpy as np

#: A collapse requires a drop of more than this many standard errors. The limit is high because the
#: test is repeated at every step.
ERRORS = 5


def collapsed(steps: Sequence[float], window: int) -> str | None:
    """Returns a clause that describes a collapse of the rewards, or None if they have not
    collapsed. `steps` are the mean rewards of all steps so far.

    The function compares moving averages over `window` steps. Rewards have collapsed if the last
    average is below the midpoint between the first and the best average, and if the drop from the
    best average is too large to be due to chance. The check is off if `window` is 0.
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
    """Estimates the variance of a step's mean reward, including the variance between prompts, as
    half the mean squared difference between consecutive steps. A trend has little influence on this
    estimate."""
    moves = np.concatenate([np.diff(own) for own in parts])
    return float(np.square(moves).mean()) / 2 if moves.size else 0.0
