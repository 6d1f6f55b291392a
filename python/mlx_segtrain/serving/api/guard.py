"""Who may ask what: Host, Origin, token, size and pace of bodies.

What is refused gets one sentence, and a line in the server's log.
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

#: Bytes of a body, at most: a prompt of a million tokens has about 4 MB.
MOST_BYTES = 8 << 20
#: Of this path less: a token.
SMALL_BODIES = {"/login": 4096}
#: Bytes of the bodies of all requests together, less what each may have: until each is read.
MOST_HELD, FREE = 32 << 20, 1 << 16
#: Seconds in which the next part of a body must come, and a body as a whole.
PART_S, BODY_S = 10.0, 60.0
#: Bodies that are written as they come (transfers.py): none of them is in memory.
UPLOADS = re.compile(r"/api/(datasets|adapters)/[^/]+/[^/]+")
UPLOAD_BYTES, UPLOAD_S = 4 << 30, 3600.0
#: Seconds for the rest of a body that is refused.
DRAIN_S = 2.0
#: Seconds that the answer to a wrong token takes, and how many of them are waited for at once. The
#: others are answered at once, and differently: whoever has the token waits for none of them.
WRONG_S, MOST_WRONG = 1.0, 16
#: Statuses of answers that the log has, too.
REFUSALS = (400, 401, 403, 422, 429)
#: Seconds after which a client that takes nothing of a stream is let go.
PATIENCE_S = 30
#: The cookie in which a browser keeps the id of its session.
COOKIE = "mlx-segtrain-session"
OWN_COOKIE = re.compile(rb'(?:^|;)\s*mlx-segtrain-session="?([\w-]{1,100})"?(?=\s*(?:;|$))')
#: A name, or an address of version 6 in brackets, and a port.
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:@/\[\]]+))(?::\d+)?")
#: What a browser asks for before it has a session.
OPEN = ("/login", "/login.css", "/healthz", "/favicon.ico")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (
        b"content-security-policy",
        # Scripts and styles are files of ours; nothing comes from elsewhere or goes there.
        b"default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        b"font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'self'; "
        b"object-src 'none'; frame-ancestors 'none'",
    ),
    (b"cache-control", b"no-cache"),  # or a browser mixes files of two versions
)


class Refused(Exception):
    """A request that is not passed on: status, and why in one sentence."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Guard:
    """The outermost of the app: what it lets through is from here, known, and not too large."""

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
            _log({**scope, "method": "WEBSOCKET"}, 403, "nothing here speaks to sockets.")
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
                return  # what the app makes of a body that broke off
            if message["type"] == "http.response.start":
                started = True
                if refused is None and message["status"] in REFUSALS:
                    _log(scope, message["status"], "its answer says why")
                known = {name.lower() for name, _ in message.get("headers", ())}
                added = [pair for pair in HEADERS if pair[0] not in known]
                added.append((b"x-request-id", id.encode()))
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        try:
            if any(names.count(name) > 1 for name in (b"host", b"origin", b"content-length")):
                raise Refused(400, "a header stands twice.")
            self._check_host(headers)
            self._check_origin(scope, headers)
            try:
                self._check_token(scope, headers, session.decode())
            except Refused:
                if b"authorization" in headers:  # ids of sessions are too long to guess
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
        raise Refused(403, f"Host {text[:100]!r} is not a name of this server: see --allow-host.")

    def _check_origin(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """A page elsewhere can make a browser send requests; the browser then says from where."""
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        host = headers[b"host"].decode("latin-1").lower()
        if origin and origin not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, f"a page of {origin[:100]!r} may not use this server.")
        site, mode = headers.get(b"sec-fetch-site"), headers.get(b"sec-fetch-mode")
        if site == b"cross-site" and not (mode == b"navigate" and scope.get("method") == "GET"):
            raise Refused(403, "a page of another site may not use this server.")

    def _check_token(self, scope: Scope, headers: dict[bytes, bytes], session: str) -> None:
        if self.token is None or scope["path"] in OPEN:
            return
        given = headers.get(b"authorization", b"").decode("latin-1")
        scheme, _, value = given.partition(" ")
        if scheme.lower() == "bearer" and self.is_token(value.strip().encode("latin-1")):
            return
        if session and self.sessions.holds(session):
            return
        raise Refused(401, "this server wants its token: send Authorization: Bearer TOKEN.")

    def is_token(self, given: bytes) -> bool:
        """Takes as long whatever is given, in UTF-8."""
        return hmac.compare_digest(given, (self.token or "").encode())

    async def slow_down(self) -> None:
        """After a wrong token; Refused if there are too many of them. The right one is never slowed
        down, and no guess outlives its connection's request by more than a second."""
        if self.guesses.locked():
            raise Refused(429, "too many wrong tokens come at once: try again later.")
        async with self.guesses:
            await asyncio.sleep(WRONG_S)


class Held:
    """Bytes of bodies that are in memory."""

    bytes = 0


class _Body:
    """Of a request, counted and timed. Once it is refused, the client is taken to be gone."""

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
        self.comes = True  #: more of it
        self.held, self.own, self.most = held, 0, most
        self.begun = time.monotonic()
        self.refused: Refused | None = None

    def check_length(self, header: bytes | None) -> None:
        if header is not None and header.isdigit() and int(header[:20]) > self.most:
            raise Refused(413, f"the body has {int(header[:20])} bytes, more than {self.most}.")

    async def receive(self) -> Message:
        if self.ended:
            return await self.inner()
        left = min(PART_S, self.seconds - (time.monotonic() - self.begun))
        try:
            message = await self._next(max(left, 0.01))
        except asyncio.TimeoutError:
            raise self._refuse(408, "the body did not come in time.") from None
        self.size += len(message.get("body", b""))
        self.ended = not self.comes
        if self.size > self.most:
            raise self._refuse(413, f"the body has more than {self.most} bytes.")
        if not self.streamed:
            self._hold(max(0, self.size - FREE))
        if self.held.bytes > MOST_HELD:
            raise self._refuse(503, "other large requests are worked on: try again in a moment.")
        return message

    async def drain(self) -> None:
        """Takes the rest and keeps nothing: a client that still sends would find its connection
        reset, and no answer."""
        end, left = time.monotonic() + DRAIN_S, MOST_BYTES
        while self.comes and left > 0 and (seconds := end - time.monotonic()) > 0:
            with suppress(asyncio.TimeoutError):
                left -= len((await self._next(seconds)).get("body", b""))

    async def _next(self, seconds: float) -> Message:
        """TimeoutError: nothing more is waited for."""
        self.comes = False
        message = await asyncio.wait_for(self.inner(), seconds)
        self.comes = message.get("more_body", False)
        return message

    def let_go(self) -> None:
        """It is not in memory any more."""
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
    """Our cookie in the headers of a request.

    Others are of other programs on this machine, and reading a quoted one takes Python minutes
    (CVE-2024-7592).
    """
    text = b";".join(value for name, value in headers if name.lower() == b"cookie")
    found = OWN_COOKIE.findall(text)
    return found[-1] if found else b""


def _answer(scope: Scope, headers: dict[bytes, bytes], refused: Refused) -> Response:
    """As the routes of the path answer; a browser without a token is led to where it gives it."""
    more = {"connection": "close"}  # whatever of the body is still to come
    if refused.status == 401:
        if b"text/html" in headers.get(b"accept", b"") and scope["method"] == "GET":
            return RedirectResponse("/login", 303)
        more["www-authenticate"] = "Bearer"
    content = json.dumps(error_body(scope["path"], refused.reason, refused.status))
    return Response(content, refused.status, more, "application/json")


def _log(scope: Scope, status: int, reason: str) -> None:
    client = (scope.get("client") or ("?",))[0]
    # repr: a path may hold characters that a terminal obeys. No query: it may hold a secret.
    logger.warning(
        "refused (%d) %.20s %.200r from %.60s: %.300s",
        *(status, scope["method"], scope["path"], client, reason),
    )
