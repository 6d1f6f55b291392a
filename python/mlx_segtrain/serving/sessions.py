"""Browser sessions. Instead of the token, a browser receives a cookie with a random id, which can
be revoked.

Browsers send a cookie to every port of a host, and therefore also to other programs on this
machine. The cookie must not contain the token, because the token never changes and gives access to
the API from anywhere.
"""

import hashlib
import secrets
import time
from collections import OrderedDict

#: Seconds after which a browser has to log in again.
LASTS_S = 7 * 86400
#: Maximum number of simultaneous sessions. Opening another session ends the oldest one.
MOST = 1000


class Sessions:
    """The sessions of a server. Only hashes of the ids are stored, so that the duration of a
    look-up reveals nothing about an id."""

    def __init__(self) -> None:
        self._ends: OrderedDict[bytes, float] = OrderedDict()

    def open(self) -> str:
        """Opens a session, and returns its id."""
        id = secrets.token_urlsafe(32)
        self._ends[_hash(id)] = time.monotonic() + LASTS_S
        while len(self._ends) > MOST:
            self._ends.popitem(last=False)
        return id

    def holds(self, id: str) -> bool:
        """Returns whether the session with this id is open."""
        return self._ends.get(_hash(id), 0.0) > time.monotonic()

    def close(self, id: str) -> None:
        self._ends.pop(_hash(id), None)

    def close_all(self) -> None:
        self._ends.clear()


def _hash(id: str) -> bytes:
    return hashlib.sha256(id.encode("utf-8", "replace")).digest()
