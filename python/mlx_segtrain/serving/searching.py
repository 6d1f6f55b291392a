"""Searches the hub on behalf of clients, which send a request for each keystroke. Therefore results
are cached, and the number of requests to the hub is limited."""

import time
from collections import OrderedDict, deque

from ..hub import Kind
from ..hub_search import Hit, search
from .pools import Busy, Pool

#: Seconds for which results are cached, and maximum number of cached results.
KEPT_S, KEPT = 300.0, 200
#: Maximum number of requests to the hub per minute.
PER_MINUTE = 60


class Searches:
    def __init__(self) -> None:
        self._pool = Pool("hub searches", 2, 8)
        self._known: OrderedDict[tuple[str, Kind], tuple[float, list[Hit]]] = OrderedDict()
        self._asked: deque[float] = deque(maxlen=PER_MINUTE)

    async def run(self, words: str, kind: Kind) -> list[Hit]:
        """Returns the search results. Raises InputError if the search fails, and Busy if there have
        been too many requests."""
        now = time.monotonic()
        key: tuple[str, Kind] = (" ".join(words.lower().split()), kind)
        when, found = self._known.get(key, (-KEPT_S, []))
        if now - when < KEPT_S:
            return found
        if len(self._asked) == PER_MINUTE and now - self._asked[0] < 60:
            raise Busy(
                f"the limit of {PER_MINUTE} searches per minute has been reached: wait a moment."
            )
        self._asked.append(now)
        found = await self._pool.run(search, key[0], kind)
        self._known[key] = (now, found)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return found
