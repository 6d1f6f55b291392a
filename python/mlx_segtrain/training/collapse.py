"""Whether rewards have collapsed."""

import math
from collections.abc import Sequence

import numpy as np

#: Standard errors of a difference that chance does not explain, though it is asked at every step.
ERRORS = 5


def collapsed(steps: Sequence[float], window: int) -> str | None:
    """Why rewards have collapsed, as a part of a sentence; None if they have not. `steps` are the
    mean rewards of all steps.

    The mean of the last `window` steps (0: never) has lost more than half of what the best such
    mean had gained over the first one, and more than chance explains.
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
    """Of a step's mean reward, other prompts included: half the mean square of what it differs by
    from the step before, of which a trend makes little."""
    moves = np.concatenate([np.diff(own) for own in parts])
    return float(np.square(moves).mean()) / 2 if moves.size else 0.0
