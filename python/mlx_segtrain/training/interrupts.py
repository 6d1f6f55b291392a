"""Handles signals that end a run. A run that is computing ends immediately; a run that is
writing files finishes them first.

If there are several ranks, all must end after the same step, so a signal takes effect only when
all ranks know about it.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .ranks import ALONE, Ranks

#: The handled signals (Ctrl-C, a request to terminate, a closed terminal) and their default
#: handlers. If a signal has another handler, such as one set by nohup, that handler is not
#: replaced.
DEFAULTS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
#: Signals within this many seconds count as one, because closing a terminal sends several.
PATIENCE = 2.0


class Interrupts:
    """Makes signals raise KeyboardInterrupt in the current or the next `allowed` block.

    A second signal that arrives more than PATIENCE seconds later kills the process. The run can
    then be resumed from its last checkpoint, as after a power cut. This class has no effect outside
    the main thread, because only the main thread receives signals.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.asked: float | None = None  # the time of the first signal
        self.open = False
        self.before: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if (lost := self.ranks.lost()) is not None:
            if self.open:
                raise lost
            return
        now = time.monotonic()
        if self.asked is None:
            self.asked = now
            if self.open and self.ranks.size == 1:
                raise KeyboardInterrupt
        elif now - self.asked > PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        self.open = True
        try:
            if self.asked is not None and self.ranks.size == 1:
                raise KeyboardInterrupt
            if (lost := self.ranks.lost()) is not None:
                raise lost
            yield
        finally:
            self.open = False

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number, default in DEFAULTS.items():
                if signal.getsignal(number) == default:
                    self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
