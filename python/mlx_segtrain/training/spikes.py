"""Determines from the losses of recent steps whether a loss is a spike."""

from collections.abc import Sequence
from statistics import median

#: The number of recent steps that are considered, and the minimum number of steps needed to detect
#: a spike.
WINDOW, LEAST = 64, 16
#: A spike is at least this many standard deviations above the median. The standard deviation is
#: estimated as 1.4826 times the median absolute deviation, since this is the ratio between the two
#: in a normal distribution.
DEVIATIONS = 6
#: After this many consecutive skipped steps, a high loss is considered the new normal level instead
#: of a spike.
MOST_SKIPPED = 8
#: A spike must also be more than SLACK nats above the median, and more than MULTIPLE times the
#: largest recent loss.
SLACK, MULTIPLE = 1.0, 1.5


def spike_bound(losses: Sequence[float]) -> float:
    """Returns the loss above which a step is a spike, given recent losses. Returns infinity if
    there are fewer than LEAST losses.

    A spike hardly changes the median and the deviation, but it does raise the largest loss, so a
    loss that stays high is reported only once or twice.
    """
    if len(losses) < LEAST:
        return float("inf")
    middle = median(losses)
    deviation = 1.4826 * median(abs(x - middle) for x in losses)
    return max(middle + max(DEVIATIONS * deviation, SLACK), MULTIPLE * max(losses))
