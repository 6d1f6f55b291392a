"""When a step's loss is a spike, by the steps before it."""

from collections.abc import Sequence
from statistics import median

#: Steps that are looked back upon, and how many of them there must be.
WINDOW, LEAST = 64, 16
#: Deviations above the median, as of a normal distribution: 1.4826 times the median deviation.
DEVIATIONS = 6
#: Steps in a row that are left out at most: then it is no spike, but what losses are by now.
MOST_SKIPPED = 8
#: Nats above the median that are never a spike, and the multiple of the window's largest loss.
SLACK, MULTIPLE = 1.0, 1.5


def spike_bound(losses: Sequence[float]) -> float:
    """The loss above which one is a spike, after steps of these losses; infinite at first.

    Median and median deviation are not moved by spikes that were taken; the largest loss is, so
    that losses which stay high are told once or twice only.
    """
    if len(losses) < LEAST:
        return float("inf")
    middle = median(losses)
    deviation = 1.4826 * median(abs(x - middle) for x in losses)
    return max(middle + max(DEVIATIONS * deviation, SLACK), MULTIPLE * max(losses))
