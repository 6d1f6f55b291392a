"""Detects when the wall clock disagrees with the time that has passed."""

import time

#: Seconds by which the two may drift apart between checks: clocks are adjusted in small steps.
SLACK = 60


class Clock:
    """Remembers the offset between the wall clock and elapsed time. Sleep of the machine shows as a
    jump."""

    def __init__(self) -> None:
        self.apart = time.time() - time.monotonic()

    def jumped(self) -> float:
        """Returns the seconds by which the wall clock ran ahead since the last call; 0 if only
        about none."""
        before, self.apart = self.apart, time.time() - time.monotonic()
        moved = self.apart - before
        return moved if abs(moved) > SLACK else 0.0
