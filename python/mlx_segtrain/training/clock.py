"""Detects jumps of the wall clock."""

import time

#: Seconds by which wall clock and elapsed time may drift apart: clocks are adjusted gradually.
SLACK = 60


class Clock:
    """Remembers the offset between the wall clock and elapsed time. When the machine sleeps, the
    clock jumps."""

    def __init__(self) -> None:
        self.apart = time.time() - time.monotonic()

    def jumped(self) -> float:
        """Returns the seconds by which the wall clock has jumped since the last call, or 0."""
        before, self.apart = self.apart, time.time() - time.monotonic()
        moved = self.apart - before
        return moved if abs(moved) > SLACK else 0.0
