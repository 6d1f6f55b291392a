"""Sends the pieces of a completion from the engine's thread to a reader in an event loop."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from weakref import WeakKeyDictionary

from ...generation.decoding import Piece

_Queue = asyncio.Queue[Piece | Exception | None]


class _Mail:
    """The items that the engine's thread sends to the readers in an event loop. Waking the loop
    takes a system call, so the loop is woken only once for all items that arrive before it reads
    them."""

    def __init__(self) -> None:
        self._items: deque[tuple[_Queue, Piece | Exception]] = deque()
        self._called = False

    def put(self, loop: asyncio.AbstractEventLoop, queue: _Queue, item: Piece | Exception) -> None:
        """Sends an item to a queue. Raises RuntimeError if the loop has ended."""
        self._items.append((queue, item))
        if not self._called or loop.is_closed():
            self._called = True
            try:
                loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._items.clear()
                self._called = False
                raise

    def _deliver(self) -> None:
        # This must come first, so that an item that arrives during delivery wakes the loop again.
        self._called = False
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)


_mail: WeakKeyDictionary[asyncio.AbstractEventLoop, _Mail] = WeakKeyDictionary()


class Outbox:
    """A queue that carries items from the engine's thread to a reader in an event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: _Queue = asyncio.Queue()
        self.closed = False
        self._mail = _mail.setdefault(self.loop, _Mail())

    def put(self, item: Piece | Exception) -> None:
        if self.closed:
            return
        try:
            self._mail.put(self.loop, self.queue, item)
        except RuntimeError:  # the loop has ended
            self.closed = True


class Generation(AsyncIterator[Piece]):
    """Yields the pieces of a completion. Raises RunError if the completion fails. Deleting this
    object ends the completion."""

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
        """Ends the completion, even if a reader in another task is waiting for it."""
        if not self._outbox.closed:
            self._outbox.closed = True
            self._outbox.queue.put_nowait(None)

    def __del__(self) -> None:
        self._outbox.closed = True
