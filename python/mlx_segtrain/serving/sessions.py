"""What a browser shows in place of the token: a random id, which can be revoked.

A cookie goes to every port of a host, so to other programs of this machine, too. It must not be the
token: that never changes, and opens the API from anywhere.
"""

import hashlib
import secrets
import time
from collections import OrderedDict

#: Seconds after which a browser has to log in again.
LASTS_S = 7 * 86400
#: Sessions at once: of more the oldest end.
MOST = 1000


class Sessions:
    """Those of a server's life; only hashes of the ids are kept, so that looking one up takes as
    long whatever is given."""

    def __init__(self) -> None:
        self._ends: OrderedDict[bytes, float] = OrderedDict()

    def open(self) -> str:
        """A new one's id."""
        id = secrets.token_urlsafe(32)
        self._ends[_hash(id)] = time.monotonic() + LASTS_S
        while len(self._ends) > MOST:
            self._ends.popitem(last=False)
        return id

    def holds(self, id: str) -> bool:
        """Whether it is open."""
        return self._ends.get(_hash(id), 0.0) > time.monotonic()

    def close(self, id: str) -> None:
        self._ends.pop(_hash(id), None)

    def close_all(self) -> None:
        self._ends.clear()


def _hash(id: str) -> bytes:
    return hashlib.sha256(id.encode("utf-8", "replace")).digest()
