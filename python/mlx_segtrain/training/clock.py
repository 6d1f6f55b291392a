"""Detects jumps of the wall clock."""

import time

#: A difference of up to this many seconds between the wall clock and the elapsed time is not
#: reported as a jump, because the system may be adjusting its clock gradually.
SLACK = 60


class Clock:
    """Compares the wall clock with the monotonic clock. The two also diverge when the machine
    sleeps."""

    def __init__(self) -> None:
        self.apart = time.time() - time.monotonic()

    def jumped(self) -> float:
        """Returns the number of seconds by which the wall clock has jumped since the last call, or
        0 if it has not jumped."""
        before, self.apart = self.apart, time.time() - time.monotonic()
        moved = self.apart - before
        return moved if abs(moved) > SLACK else 0.0
