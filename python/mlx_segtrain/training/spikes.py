"""Decides whether a loss is a spike, from the losses of recent steps."""

from collections.abc import Sequence
from statistics import median

#: The number of recent steps that count, and the minimum for a decision.
WINDOW, LEAST = 64, 16
#: A spike is this many standard deviations above the median; one is 1.4826 times the median
#: absolute deviation, as for a normal distribution.
DEVIATIONS = 6
#: After this many skipped steps in a row, a high loss is not a spike, but the new level.
MOST_SKIPPED = 8
#: A spike is more than SLACK nats above the median, and above MULTIPLE times the largest loss.
SLACK, MULTIPLE = 1.0, 1.5


def spike_bound(losses: Sequence[float]) -> float:
    """Returns the loss above which a step is a spike, given recent losses; infinite at first.

    Steps with a spike hardly change the median and the deviation, but they do change the largest
    loss, so a loss that stays high is reported only once or twice.
    """
    if len(losses) < LEAST:
        return float("inf")
    middle = median(losses)
    deviation = 1.4826 * median(abs(x - middle) for x in losses)
    return max(middle + max(DEVIATIONS * deviation, SLACK), MULTIPLE * max(losses))
