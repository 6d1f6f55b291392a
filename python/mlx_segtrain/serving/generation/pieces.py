"""Sends the pieces of an answer from the engine's thread to a reader in an event loop."""

import asyncio
from collections.abc import AsyncIterator

from ...generation.decoding import Piece


class Outbox:
    """A queue from the engine's thread to a reader in an event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self.closed = False

    def put(self, item: Piece | Exception) -> None:
        if self.closed:
            return
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the loop has ended
            self.closed = True


class Generation(AsyncIterator[Piece]):
    """Yields the pieces of an answer. Raises RunError if the answer fails. If this object is
    dropped, the answer ends."""

    def __init__(self, outbox: Outbox):
        self._outbox = outbox

    async def __anext__(self) -> Piece:
        if self._outbox.closed:
            raise StopAsyncIteration
        item = await self._outbox.queue.get()
        if not isinstance(item, Piece):
            self._outbox.closed = True
            raise item or StopAsyncIteration
        if item.finish:
            self._outbox.closed = True
        return item

    async def aclose(self) -> None:
        """Ends the answer, also for a reader that is waiting in another task."""
        if not self._outbox.closed:
            self._outbox.closed = True
            self._outbox.queue.put_nowait(None)

    def __del__(self) -> None:
        self._outbox.closed = True
