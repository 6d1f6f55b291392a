"""What is too fast for the log."""

import logging
import time

#: Warnings in the log: so many at once, and more by the second.
LINES, LINES_PER_S = 100, 2.0


class Bounded(logging.Filter):
    """Of warnings and errors, which clients can bring about, a few by the second get into the log,
    and how many did not."""

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
                f"{record.getMessage()} ({self.dropped} lines like it were left out before)"
            )
            record.args, self.dropped = (), 0
        return True
