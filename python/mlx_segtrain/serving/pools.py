"""Thread pools and slots. Each kind of work has its own pool, so that no kind can block another."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from ..errors import RunError

P = ParamSpec("P")
T = TypeVar("T")


class Busy(RunError):
    """Too much work is waiting. The message says what to do. `status` and `code` are used in the
    HTTP response."""

    status, code = 429, "busy"


class Transfers:
    """Limits the number of simultaneous transfers."""

    def __init__(self, most: int = 4):
        self.most, self.places = most, dict[object, None]()

    @contextmanager
    def place(self, name: object = None) -> Iterator[None]:
        """Occupies a slot while the context is active. Raises Busy if all slots are taken, or if
        `name` already occupies one."""
        name = object() if name is None else name
        if len(self.places) >= self.most:
            raise Busy(f"{self.most} transfers are running: try again when one has ended.")
        if name in self.places:
            raise Busy("this file is already being sent: wait until the transfer has ended.")
        self.places[name] = None
        try:
            yield
        finally:
            del self.places[name]

    def check_none(self, folder: Path) -> None:
        """Raises Busy if a file in this folder is being transferred."""
        if any(isinstance(own, Path) and own.is_relative_to(folder) for own in self.places):
            raise Busy(f"files of {folder.name} are being sent: wait until the transfer has ended.")


class Pool:
    """Runs up to `threads` calls at the same time, and queues up to `waiting` more. Raises Busy for
    further calls."""

    def __init__(self, name: str, threads: int, waiting: int):
        self.name, self._places = name, threading.Semaphore(threads + waiting)
        self._threads = ThreadPoolExecutor(threads, f"mlx-segtrain {name}")

    async def run(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns the call's result. If the caller is cancelled, the call keeps running, and counts
        towards the limit until it ends."""
        if not self._places.acquire(blocking=False):
            raise Busy(f"too many requests for {self.name} are waiting: try again in a moment.")
        future = self._threads.submit(fn, *args, **kwargs)
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)
