"""Sessions of browsers: a random id instead of the token, which can be revoked.

A cookie goes to every port of a host, so also to other programs on this machine. It must not be the
token, which never changes and opens the API from anywhere.
"""

import hashlib
import secrets
import time
from collections import OrderedDict

#: Seconds after which a browser has to log in again.
LASTS_S = 7 * 86400
#: The most sessions at once: a further one ends the oldest.
MOST = 1000


class Sessions:
    """The sessions of a server; only hashes of the ids are kept, so that a look-up takes constant
    time."""

    def __init__(self) -> None:
        self._ends: OrderedDict[bytes, float] = OrderedDict()

    def open(self) -> str:
        """Opens a session; returns its id."""
        id = secrets.token_urlsafe(32)
        self._ends[_hash(id)] = time.monotonic() + LASTS_S
        while len(self._ends) > MOST:
            self._ends.popitem(last=False)
        return id

    def holds(self, id: str) -> bool:
        """Returns whether the session is open."""
        return self._ends.get(_hash(id), 0.0) > time.monotonic()

    def close(self, id: str) -> None:
        self._ends.pop(_hash(id), None)

    def close_all(self) -> None:
        self._ends.clear()


def _hash(id: str) -> bytes:
    return hashlib.sha256(id.encode("utf-8", "replace")).digest()
