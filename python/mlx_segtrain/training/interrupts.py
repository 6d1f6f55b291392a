"""Signals that end a run: taken at once while it computes, held back while it writes."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

#: Ctrl-C, the system's request to end, and a terminal that was closed; and what they do unless
#: somebody has decided otherwise (as nohup does).
DEFAULTS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


class Interrupts:
    """Within it the first signal raises KeyboardInterrupt in the next, or the present, `allowed`;
    the second one raises it wherever the run is.

    Only the main thread gets signals: elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self.open = False
        self.before: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if self.open or again:
            raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        self.open = True
        try:
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self.open = False

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number, default in DEFAULTS.items():
                if signal.getsignal(number) == default:
                    self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
