"""Checks requests: Host, Origin, the token, and the size and rate of bodies.

The response to a refused request is one sentence, and the refusal is logged.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress

from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..sessions import Sessions
from ..settings import LOOPBACK
from .faults import error_body

logger = logging.getLogger("mlx_segtrain.serving")

#: Maximum bytes of a body. A prompt of a million tokens takes about 4 MB.
MOST_BYTES = 8 << 20
#: Lower limits for specific paths. A login sends only a token, which is short.
SMALL_BODIES = {"/login": 4096}
#: Maximum total bytes of the bodies in memory, not counting the first FREE bytes of each body.
MOST_HELD, FREE = 32 << 20, 1 << 16
#: Maximum seconds until the next part of a body arrives, and until the whole body has arrived.
PART_S, BODY_S = 10.0, 60.0
#: Paths whose bodies are written to disk as they arrive (transfers.py) instead of being kept in
#: memory.
UPLOADS = re.compile(r"/api/(datasets|adapters)/[^/]+/[^/]+")
UPLOAD_BYTES, UPLOAD_S = 4 << 30, 3600.0
#: Maximum number of seconds to keep reading the rest of a refused body.
DRAIN_S = 2.0
#: The response to a wrong token is delayed by WRONG_S seconds. At most MOST_WRONG responses are
#: delayed at a time; further requests with a wrong token are refused immediately. Requests with the
#: right token are never delayed.
WRONG_S, MOST_WRONG = 1.0, 16
#: Statuses of the responses that are logged.
REFUSALS = (400, 401, 403, 422, 429)
#: A client that does not read its stream for this many seconds is disconnected.
PATIENCE_S = 30
#: The cookie with the id of a browser's session.
COOKIE = "mlx-segtrain-session"
OWN_COOKIE = re.compile(rb'(?:^|;)\s*mlx-segtrain-session="?([\w-]{1,100})"?(?=\s*(?:;|$))')
#: A host name, or an IPv6 address in brackets, with or without a port.
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:@/\[\]]+))(?::\d+)?")
#: Paths that need no token.
OPEN = ("/login", "/login.css", "/healthz", "/favicon.ico")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (
        b"content-security-policy",
        # Allows only our own scripts and styles, and no connections to other hosts.
        b"default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        b"font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'self'; "
        b"object-src 'none'; frame-ancestors 'none'",
    ),
    (b"cache-control", b"no-cache"),  # otherwise a browser could mix two versions
)


class Refused(Exception):
    """Raised to refuse a request with an HTTP status. The reason is one sentence."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Guard:
    """The outermost layer of the application. It refuses requests that come from other origins,
    have no token, or are too large."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Sequence[str],
        token: str | None,
        any_address: bool,
        sessions: Sessions | None = None,
    ):
        self.app, self.token, self.any_address = app, token, any_address
        self.sessions = sessions or Sessions()
        self.hosts = {*LOOPBACK, *(host.lower() for host in hosts)}
        self.held, self.guesses = Held(), asyncio.Semaphore(MOST_WRONG)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            _log({**scope, "method": "WEBSOCKET"}, 403, "this server has no WebSocket routes.")
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        session = _session(scope["headers"])
        scope["headers"] = [pair for pair in scope["headers"] if pair[0].lower() != b"cookie"]
        if session:
            scope["headers"].append((b"cookie", b"%s=%s" % (COOKIE.encode(), session)))
        names = [name.lower() for name, _ in scope["headers"]]
        scope["mlx_segtrain.request"] = id = f"req_{uuid.uuid4().hex}"
        body = _Body(receive, self.held, SMALL_BODIES.get(scope["path"], MOST_BYTES))
        if scope["method"] == "PUT" and UPLOADS.fullmatch(scope["path"]):
            body = _Body(receive, Held(), UPLOAD_BYTES, UPLOAD_S, streamed=True)
        scope["mlx_segtrain.body_read"] = body.let_go
        started = False
        refused: Refused | None = None

        async def send_on(message: Message) -> None:
            nonlocal started
            if body.refused is not None and not started:
                return  # the app has responded to an incomplete body
            if message["type"] == "http.response.start":
                started = True
                if refused is None and message["status"] in REFUSALS:
                    _log(scope, message["status"], "the response states the reason")
                known = {name.lower() for name, _ in message.get("headers", ())}
                added = [pair for pair in HEADERS if pair[0] not in known]
                added.append((b"x-request-id", id.encode()))
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        try:
            if any(names.count(name) > 1 for name in (b"host", b"origin", b"content-length")):
                raise Refused(400, "the Host, Origin or Content-Length header is repeated.")
            self._check_host(headers)
            self._check_origin(scope, headers)
            try:
                self._check_token(scope, headers, session.decode())
            except Refused:
                if b"authorization" in headers:  # tokens only: session ids are too long to guess
                    await self.slow_down()
                raise
            if self.token is not None:
                scope["mlx_segtrain.authority"] = "token"
            body.check_length(headers.get(b"content-length"))
            await self.app(scope, body.receive, send_on)
        except Refused as error:
            refused = error
        finally:
            body.let_go()
        refused, body.refused = refused or body.refused, None
        if refused is None:
            return
        _log(scope, refused.status, refused.reason)
        if not started:
            await body.drain()
            await _answer(scope, headers, refused)(scope, receive, send_on)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        text = headers.get(b"host", b"").decode("latin-1").lower()
        parts = HOST.fullmatch(text)
        name = (parts[1] or parts[2]) if parts else ""
        if name in self.hosts or (self.any_address and _is_address(name)):
            return
        raise Refused(
            403, f"Host {text[:100]!r} is not a name of this server: allow it with --allow-host."
        )

    def _check_origin(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Refuses requests that a browser sends on behalf of a page from another site."""
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        host = headers[b"host"].decode("latin-1").lower()
        if origin and origin not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, f"pages from {origin[:100]!r} may not use this server.")
        site, mode = headers.get(b"sec-fetch-site"), headers.get(b"sec-fetch-mode")
        if site == b"cross-site" and not (mode == b"navigate" and scope.get("method") == "GET"):
            raise Refused(403, "pages from other sites may not use this server.")

    def _check_token(self, scope: Scope, headers: dict[bytes, bytes], session: str) -> None:
        if self.token is None or scope["path"] in OPEN:
            return
        given = headers.get(b"authorization", b"").decode("latin-1")
        scheme, _, value = given.partition(" ")
        if scheme.lower() == "bearer" and self.is_token(value.strip().encode("latin-1")):
            return
        if session and self.sessions.holds(session):
            return
        raise Refused(
            401, "this server requires a token: send the header 'Authorization: Bearer TOKEN'."
        )

    def is_token(self, given: bytes) -> bool:
        """Returns whether `given` is the token in UTF-8. The comparison takes constant time."""
        return hmac.compare_digest(given, (self.token or "").encode())

    async def slow_down(self) -> None:
        """Delays the response to a wrong token, which makes guessing slow. Raises Refused if too
        many such responses are waiting."""
        if self.guesses.locked():
            raise Refused(429, "too many requests with a wrong token: try again later.")
        async with self.guesses:
            await asyncio.sleep(WRONG_S)


class Held:
    """The total size, in bytes, of the request bodies in memory."""

    bytes = 0


class _Body:
    """The body of a request, with limits on size and time. Reading stops when a limit is
    exceeded."""

    def __init__(
        self,
        receive: Receive,
        held: Held,
        most: int,
        seconds: float | None = None,
        *,
        streamed: bool = False,
    ):
        self.inner, self.size, self.ended = receive, 0, False
        self.seconds, self.streamed = seconds or BODY_S, streamed
        self.comes = True  #: whether more of the body is expected
        self.held, self.own, self.most = held, 0, most
        self.begun = time.monotonic()
        self.refused: Refused | None = None

    def check_length(self, header: bytes | None) -> None:
        if header is not None and header.isdigit() and int(header[:20]) > self.most:
            raise Refused(
                413,
                f"the body is {int(header[:20])} bytes long, more than the limit of {self.most}.",
            )

    async def receive(self) -> Message:
        if self.ended:
            return await self.inner()
        left = min(PART_S, self.seconds - (time.monotonic() - self.begun))
        try:
            message = await self._next(max(left, 0.01))
        except asyncio.TimeoutError:
            raise self._refuse(408, "the body did not arrive in time.") from None
        self.size += len(message.get("body", b""))
        self.ended = not self.comes
        if self.size > self.most:
            raise self._refuse(413, f"the body has more than {self.most} bytes.")
        if not self.streamed:
            self._hold(max(0, self.size - FREE))
        if self.held.bytes > MOST_HELD:
            raise self._refuse(
                503, "the server is busy with other large requests: try again in a moment."
            )
        return message

    async def drain(self) -> None:
        """Reads and discards the rest of the body; otherwise, a client that is still sending would
        not receive the response."""
        end, left = time.monotonic() + DRAIN_S, MOST_BYTES
        while self.comes and left > 0 and (seconds := end - time.monotonic()) > 0:
            with suppress(asyncio.TimeoutError):
                left -= len((await self._next(seconds)).get("body", b""))

    async def _next(self, seconds: float) -> Message:
        """Returns the next message. Raises TimeoutError."""
        self.comes = False
        message = await asyncio.wait_for(self.inner(), seconds)
        self.comes = message.get("more_body", False)
        return message

    def let_go(self) -> None:
        """Subtracts the body's size from the number of bytes in memory."""
        self._hold(0)

    def _hold(self, own: int) -> None:
        self.held.bytes += own - self.own
        self.own = own

    def _refuse(self, status: int, reason: str) -> Refused:
        self.ended, self.refused = True, Refused(status, reason)
        return self.refused


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _session(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Returns the value of our cookie. Cookies of other programs on this machine are not parsed,
    because parsing could take minutes (CVE-2024-7592)."""
    text = b";".join(value for name, value in headers if name.lower() == b"cookie")
    found = OWN_COOKIE.findall(text)
    return found[-1] if found else b""


def _answer(scope: Scope, headers: dict[bytes, bytes], refused: Refused) -> Response:
    """Returns the response to a refused request: an error in the API's format, or, for a browser
    without access, a redirect to /login."""
    more = {"connection": "close"}  # the client may still send the body
    if refused.status == 401:
        if b"text/html" in headers.get(b"accept", b"") and scope["method"] == "GET":
            return RedirectResponse("/login", 303)
        more["www-authenticate"] = "Bearer"
    content = json.dumps(error_body(scope["path"], refused.reason, refused.status))
    return Response(content, refused.status, more, "application/json")


def _log(scope: Scope, status: int, reason: str) -> None:
    client = (scope.get("client") or ("?",))[0]
    # The path is logged as its repr, since it may contain control characters. The query is not
    # logged, since it may contain a secret.
    logger.warning(
        "refused (%d) %.20s %.200r from %.60s: %.300s",
        *(status, scope["method"], scope["path"], client, reason),
    )
