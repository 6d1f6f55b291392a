"""Whether the clock on the wall agrees with the time that passes."""

import time

#: Seconds that they may drift apart between two looks: clocks are set right in small steps.
SLACK = 60


class Clock:
    """Remembers how far wall clock and passing time are apart. A machine that slept is a jump."""

    def __init__(self) -> None:
        self.apart = time.time() - time.monotonic()

    def jumped(self) -> float:
        """Seconds by which the wall clock went too far since the last look; 0 if about none."""
        before, self.apart = self.apart, time.time() - time.monotonic()
        moved = self.apart - before
        return moved if abs(moved) > SLACK else 0.0
