"""Limits the rate of log lines."""

import logging
import time

#: The maximum number of logged warnings: in a burst, and per second after the burst.
LINES, LINES_PER_S = 100, 2.0


class Bounded(logging.Filter):
    """Drops and counts warnings and errors above the maximum rate, so that clients cannot flood
    the log."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.then, self.dropped = float(LINES), time.monotonic(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        now = time.monotonic()
        self.left = min(LINES, self.left + (now - self.then) * LINES_PER_S)
        self.then = now
        if self.left < 1:
            self.dropped += 1
            return False
        self.left -= 1
        if self.dropped:
            record.msg = (
                f"{record.getMessage()} ({self.dropped} earlier warnings and errors were dropped)"
            )
            record.args, self.dropped = (), 0
        return True
