"""Threads by kind of work, so many of each: what fills one kind leaves the others free."""

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
    """A request that is not taken now. The message is one sentence: why, and what to do.

    `status` and `code` are those with which it is answered.
    """

    status, code = 429, "busy"


class Transfers:
    """Files that are being sent or taken, so many at once."""

    def __init__(self, most: int = 4):
        self.most, self.places = most, dict[object, None]()

    @contextmanager
    def place(self, name: object = None) -> Iterator[None]:
        """One of the places, within it; Busy if all are taken, or the one of this name is."""
        name = object() if name is None else name
        if len(self.places) >= self.most:
            raise Busy(f"{self.most} transfers are under way: try again when one has ended.")
        if name in self.places:
            raise Busy("the same is being sent already: wait until that has ended.")
        self.places[name] = None
        try:
            yield
        finally:
            del self.places[name]

    def check_none(self, folder: Path) -> None:
        """Busy if one of the places has a path below this folder as its name."""
        if any(isinstance(own, Path) and own.is_relative_to(folder) for own in self.places):
            raise Busy(f"files of {folder.name} are being sent: wait until that has ended.")


class Pool:
    """Up to `threads` calls run, and `waiting` more wait; the next is Busy."""

    def __init__(self, name: str, threads: int, waiting: int):
        self.name, self._places = name, threading.Semaphore(threads + waiting)
        self._threads = ThreadPoolExecutor(threads, f"mlx-segtrain {name}")

    async def run(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The call's result. One that nobody waits for any more counts until it has ended."""
        if not self._places.acquire(blocking=False):
            raise Busy(f"too many requests for {self.name} wait already: try again in a moment.")
        future = self._threads.submit(fn, *args, **kwargs)
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)
