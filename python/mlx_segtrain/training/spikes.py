"""Decides from recent steps when a loss is a spike."""

from collections.abc import Sequence
from statistics import median

#: Number of recent steps that count, and how many of them there must be.
WINDOW, LEAST = 64, 16
#: Deviations above the median, in units of a normal distribution's: 1.4826 times the median
#: deviation.
DEVIATIONS = 6
#: Most steps that are skipped in a row: after that it is no spike, but the new level of the loss.
MOST_SKIPPED = 8
#: Nats above the median that never count as a spike, and the multiple of the window's largest loss.
SLACK, MULTIPLE = 1.0, 1.5


def spike_bound(losses: Sequence[float]) -> float:
    """Returns the loss above which a step is a spike, given recent losses; infinite at first.

    Spikes that were taken do not move the median and the median deviation, but they do move the
    largest loss, so a loss that stays high is reported only once or twice.
    """
    if len(losses) < LEAST:
        return float("inf")
    middle = median(losses)
    deviation = 1.4826 * median(abs(x - middle) for x in losses)
    return max(middle + max(DEVIATIONS * deviation, SLACK), MULTIPLE * max(losses))
