"""Searches of the hub that clients ask for as they type: few of them reach it."""

import time
from collections import OrderedDict, deque

from ..hub import Kind
from ..hub_search import Hit, search
from .pools import Busy, Pool

#: Seconds for which an answer is kept, and how many of them.
KEPT_S, KEPT = 300.0, 200
#: Requests to the hub in a minute.
PER_MINUTE = 60


class Searches:
    def __init__(self) -> None:
        self._pool = Pool("searches of the hub", 2, 8)
        self._known: OrderedDict[tuple[str, Kind], tuple[float, list[Hit]]] = OrderedDict()
        self._asked: deque[float] = deque(maxlen=PER_MINUTE)

    async def run(self, words: str, kind: Kind) -> list[Hit]:
        """InputError if the hub cannot be asked, Busy if it has been asked too often."""
        now, key = time.monotonic(), (" ".join(words.lower().split()), kind)
        when, found = self._known.get(key, (-KEPT_S, []))
        if now - when < KEPT_S:
            return found
        if len(self._asked) == PER_MINUTE and now - self._asked[0] < 60:
            raise Busy(f"the hub is searched {PER_MINUTE} times a minute: wait a moment.")
        self._asked.append(now)
        found = await self._pool.run(search, key[0], kind)
        self._known[key] = (now, found)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return found
