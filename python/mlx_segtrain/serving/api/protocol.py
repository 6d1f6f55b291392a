"""HTTP with limits on the time and the size of a request's head."""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger("mlx_segtrain.serving")

#: Maximum seconds and bytes for the head of a request.
HEAD_S, HEAD_BYTES = 10.0, 64 << 10


class Patient(HttpToolsProtocol):
    """Refuses heads that arrive too slowly or are too large, which would otherwise tie up
    resources."""

    late: asyncio.TimerHandle | None = None
    head = 0  #: bytes of headers, including trailers
    unread = 0  #: bytes of an incomplete head that have been received

    def data_received(self, data: bytes) -> None:
        before = self.late
        super().data_received(data)
        # While a head is incomplete, all received data belongs to that head and is buffered by the
        # parser.
        incomplete = self.late is not None and self.late is before
        self.unread = self.unread + len(data) if incomplete else 0
        if self.unread > HEAD_BYTES and not self.transport.is_closing():
            self._refuse_large()

    def on_url(self, url: bytes) -> None:
        self.head += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head += len(name) + len(value) + 4
        if self.head > HEAD_BYTES:  # the parser responds to the exception with send_400_response
            raise ValueError("the head is too large")
        super().on_header(name, value)

    def send_400_response(self, msg: str) -> None:
        if self.head > HEAD_BYTES:
            return self._refuse_large()
        super().send_400_response(msg)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.head = 0
        self._wait()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop_waiting()
        self.late = self.loop.call_later(
            HEAD_S, self._refuse, "408 Request Timeout", "its head did not arrive in time"
        )

    def _stop_waiting(self) -> None:
        if self.late is not None:
            self.late.cancel()
            self.late = None

    def _refuse_large(self) -> None:
        self._refuse("431 Request Header Fields Too Large", "its head is too large")

    def _refuse(self, status: str, why: str) -> None:
        client = self.client[0] if self.client else "?"
        logger.warning("refused (%s) a request from %s: %s.", status[:3], client, why)
        self._stop_waiting()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(f"HTTP/1.1 {status}\r\nconnection: close\r\n\r\n".encode())
        self.transport.close()
