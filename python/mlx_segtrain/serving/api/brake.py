"""What is too fast: wrong tokens, and lines of the log."""

import asyncio
import logging
import time

#: Seconds that the answer to a wrong token takes, and how many of them are waited for at once. The
#: others are answered at once, and differently: whoever has the token waits for none of them.
WRONG_S, MOST_WRONG = 1.0, 16
#: Warnings in the log: so many at once, and more by the second.
LINES, LINES_PER_S = 100, 2.0


class Brake:
    """Slows down who guesses tokens. The right one is never slowed down, and no guess outlives its
    connection's request by more than a second."""

    def __init__(self) -> None:
        self.guesses = asyncio.Semaphore(MOST_WRONG)

    async def wrong(self) -> bool:
        """Whether the guess may be told that it was wrong, which takes a while; else it is one of
        too many."""
        if self.guesses.locked():
            return False
        async with self.guesses:
            await asyncio.sleep(WRONG_S)
        return True


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
