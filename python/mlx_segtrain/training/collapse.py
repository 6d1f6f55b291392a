"""Whether rewards have collapsed."""

import math
from collections.abc import Sequence

import numpy as np

#: Standard errors of a difference that chance does not explain.
ERRORS = 4


def mean_of(rewards: Sequence[float]) -> tuple[float, float]:
    """The mean of a step's rewards, and the variance of that mean."""
    own = np.array(rewards, np.float64)
    return float(own.mean()), float(own.var() / len(own))


def collapsed(steps: Sequence[tuple[float, float]], window: int) -> str | None:
    """Why rewards have collapsed, as a part of a sentence; None if they have not.

    The mean of the last `window` steps (0: never) has lost more than half of what the best such
    mean had gained over the first one, and more than chance explains.
    """
    if not window or len(steps) <= window:
        return None
    means, variances = np.array(steps).T
    kernel = np.ones(window) / window
    smooth = np.convolve(means, kernel, "valid")
    errors = np.convolve(variances, kernel, "valid") / window
    best, last = int(smooth.argmax()), len(smooth) - 1
    lost = smooth[best] - smooth[last]
    chance = ERRORS * math.sqrt(errors[best] + errors[last])
    if lost > (smooth[best] - smooth[0]) / 2 and lost > chance and lost > 0:
        return (
            f"the mean reward of {window} steps fell from {smooth[best]:.3f} to {smooth[last]:.3f}"
        )
    return None
