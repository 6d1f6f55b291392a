"""Connections between ranks that are used to determine which rank is lost (see watch.py). They are
separate from MLX's connections.

Each rank listens on one address until all others have connected. It accepts only peers that know
the secret, which the ranks have exchanged through MLX.
"""

import hmac
import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from . import watch
from .watch import Lost, Watch

#: The time in seconds within which all ranks must connect, and the maximum size of a message in
#: bytes.
TO_CONNECT, MOST = 60.0, 1 << 16
#: The time in seconds within which a connected peer must identify itself.
TO_GREET = 5.0
#: The polling interval, in seconds.
LOOK = 0.1


class Links:
    """A thread that runs a Watch once all ranks are connected.

    `gather` sends a value to all ranks and returns the list of all ranks' values. The thread calls
    `on_lost` when the ranks have agreed on which rank is lost. Raises OSError if a rank cannot be
    reached.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        address: str,
        gather: Callable[[Any], list[Any]],
        on_lost: Callable[[], None],
    ):
        self.on_lost = on_lost
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as server:
            server.bind((address, 0))
            server.listen(size)
            own = {"at": server.getsockname()[:2], "secret": secrets.token_hex(16)}
            every = gather(own)
            self._secret = every[0]["secret"].encode()
            self._sockets = {r: self._connect(r, rank, every[r]["at"]) for r in range(rank)}
            self._accept(server, set(range(rank + 1, size)))
        self._buffers = {r: bytearray() for r in self._sockets}
        self._unsent = {r: bytearray() for r in self._sockets}
        how = {"patience": watch.PATIENCE, "settle": watch.SETTLE, "beat": watch.BEAT}
        self.watch = Watch(rank, size, time.monotonic(), **how)
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    def _connect(self, r: int, rank: int, at: list[Any]) -> socket.socket:
        made = socket.create_connection((at[0], at[1]), TO_CONNECT)
        made.sendall(b"%d %s\n" % (rank, self._secret))
        made.setblocking(False)
        return made

    def _accept(self, server: socket.socket, missing: set[int]) -> None:
        """Accepts connections from peers that know the secret, and closes all others."""
        deadline = time.monotonic() + TO_CONNECT
        while missing:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                made, _ = server.accept()
            except TimeoutError:
                raise OSError(f"no connection from rank {min(missing)}") from None
            with suppress(OSError, ValueError):
                end = min(deadline, time.monotonic() + TO_GREET)
                hello = bytearray()
                while not hello.endswith(b"\n") and len(hello) < 100:
                    made.settimeout(max(0.01, end - time.monotonic()))
                    if not (byte := made.recv(1)):
                        break
                    hello += byte
                number, secret = bytes(hello).split()
                if hmac.compare_digest(secret, self._secret) and int(number) in missing:
                    made.setblocking(False)
                    missing.discard(int(number))
                    self._sockets[int(number)] = made
                    continue
            made.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for r, own in self._sockets.items():
                selector.register(own, selectors.EVENT_READ, r)
            while not self._ends.is_set():
                ready = [key.data for key, _ in selector.select(LOOK)]
                with self._lock:
                    for r in ready:
                        if not self._read(r):
                            selector.unregister(self._sockets[r])
                            self.watch.closed(r, time.monotonic())
                    before = self.watch.decided
                    self.watch.tick(time.monotonic())
                    self._flush()
                    decided = before is None and self.watch.decided is not None
                if decided:
                    self.on_lost()

    def _read(self, r: int) -> bool:
        """Handles the messages that have arrived. Returns False if the connection has ended."""
        try:
            found = self._sockets[r].recv(MOST)
        except BlockingIOError:
            return True
        except OSError:
            return False
        *lines, rest = (self._buffers[r] + found).split(b"\n")
        self._buffers[r] = bytearray(rest)
        for line in lines:
            self.watch.receive(r, json.loads(line), time.monotonic())
        return bool(found) and len(rest) <= MOST

    def _flush(self) -> None:
        """Sends the messages that the Watch has queued. Messages stay buffered until the receiving
        rank reads them. If more than MOST bytes wait for a rank, further messages to it are
        discarded: it has not read for so long that it is about to be declared lost."""
        for to, message in self.watch.out:
            line = json.dumps(message).encode() + b"\n"
            for r in to:
                if len(self._unsent[r]) < MOST:
                    self._unsent[r] += line
        self.watch.out.clear()
        for r, unsent in self._unsent.items():
            try:
                while unsent:
                    del unsent[: self._sockets[r].send(unsent)]
            except BlockingIOError:
                continue
            except OSError:
                unsent.clear()

    def waits(self, yes: bool) -> None:
        """Reports that this rank starts (`yes`) or stops waiting for other ranks."""
        with self._lock:
            self.watch.waits = yes
            self.watch.at[self.watch.rank] += 1

    def behind(self) -> list[int]:
        """Returns the ranks that are not waiting, which are the ranks that all others are waiting
        for."""
        return [r for r in self.watch.others if self.watch.at[r] % 2 == 0]

    @property
    def suspects(self) -> bool:
        """Whether this rank knows of a lost rank, even if the ranks have not yet agreed on one."""
        return bool(self.watch.lost)

    @property
    def lost(self) -> Lost | None:
        return self.watch.decided

    def fail(self, why: str) -> None:
        """Reports to all ranks that this one cannot continue, unless the ranks have already agreed
        on a lost rank."""
        with self._lock:
            if self.watch.decided is None:
                self.watch.fail(why, time.monotonic())
                self._flush()

    def close(self) -> None:
        """Closes the connections. If a rank is lost, first waits a few seconds for the ranks to
        agree on which rank it is."""
        deadline = time.monotonic() + 2 * self.watch.settle
        while self.watch.lost and self.watch.decided is None and time.monotonic() < deadline:
            time.sleep(LOOK)
        self._ends.set()
        self._thread.join()
        self.watch.leave()
        self._flush()
        for own in self._sockets.values():
            own.close()
