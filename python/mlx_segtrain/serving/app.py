"""The application: routes, errors as sentences, the guard around it, and its server."""

import asyncio
import json
import logging
import os
import re
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import uvicorn
from fastapi import FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import compile_path
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .. import __version__
from ..errors import InputError, RunError
from . import page
from .api import openai
from .api import routes as api
from .api.brake import Bounded
from .api.faults import sentence
from .api.guard import COOKIE, Guard, Refused, error_body
from .generation.engine import Busy, Ended, NoMemory
from .jobs.queue import Conflict, Full
from .opening import confine
from .roots import Outside
from .service import Fault, Service
from .sessions import LASTS_S
from .settings import LOOPBACK, Settings

logger = logging.getLogger("mlx_segtrain.serving")

#: Seconds in which the head of a request must have come, and bytes that it may have.
HEAD_S, HEAD_BYTES = 10.0, 64 << 10
#: Connections at once; more are answered 503.
CONNECTIONS = 2000
#: Files that are open at once, if the system allows it: each follower of a job is a connection.
OPEN_FILES = 65536


def create(service: Service) -> Guard:
    """The application of a server."""
    settings = service.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="mlx_segtrain",
        version=__version__,
        description="Fine-tunes language models on one machine, and serves them with adapters.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    guard = Guard(
        app,
        hosts=(settings.host, *settings.allow_hosts),
        token=settings.token,
        any_address=settings.host not in LOOPBACK,
        sessions=service.sessions,
        page_fits=page.make_room,
    )
    app.include_router(api.router(service))
    app.include_router(
        openai.router(
            service.engine,
            lambda: service.jobs.training,
            settings.while_training,
            service.roots.resolve,
            service.available,
        )
    )
    _add_docs(app)
    _add_login(app, guard)
    _add_errors(app)
    page.mount(app, service)
    return guard


def _add_docs(app: FastAPI) -> None:
    """Swagger's page, whose files come from a package and not from elsewhere."""
    app.mount("/docs-files", StaticFiles(packages=[("fastapi_offline", "static")]))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="mlx_segtrain API",
            swagger_js_url="/docs-files/swagger-ui-bundle.js",
            swagger_css_url="/docs-files/swagger-ui.css",
            swagger_favicon_url="/docs-files/favicon.png",
        )


LOGIN = """<!doctype html><html lang="en"><meta name="viewport" content="width=device-width">
<title>mlx_segtrain</title><style>body{{font:1rem system-ui;max-width:24rem;margin:20vh auto;
padding:1rem;color-scheme:light dark}}input,button{{font:inherit;padding:.5rem;width:100%;
box-sizing:border-box;margin:.25rem 0}}</style>
<h1>mlx_segtrain</h1><form method="post"><label for="token">The token of this server</label>
<input id="token" name="token" type="password" autocomplete="current-password" autofocus required>
<button>Open</button></form><p role="alert">{problem}</p></html>"""


def _add_login(app: FastAPI, guard: Guard) -> None:
    """Where a browser gets, for the token, the cookie that stands for it, and gives it back."""

    @app.get("/login", include_in_schema=False)
    async def login() -> HTMLResponse:
        return HTMLResponse(LOGIN.format(problem=""))

    @app.post("/login", include_in_schema=False)
    async def check(token: str = Form("")) -> Response:
        if guard.token is not None and not guard.is_token(token.encode("utf-8", "replace")):
            try:
                await guard.slow_down()
            except Refused as error:
                return HTMLResponse(LOGIN.format(problem=error.reason), error.status)
            return HTMLResponse(LOGIN.format(problem="That is not the token."), 401)
        answer = RedirectResponse("/finetune", 303)
        if guard.token is not None:
            how = {"httponly": True, "samesite": "strict", "max_age": LASTS_S}
            answer.set_cookie(COOKIE, guard.sessions.open(), **how)
        return answer

    @app.post("/logout", include_in_schema=False)
    async def logout(request: Request) -> Response:
        guard.sessions.close(request.cookies.get(COOKIE, ""))
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return answer

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/finetune")


def _add_errors(app: FastAPI) -> None:
    """Every error is a sentence, in the form that clients of the path know."""

    def answer(request: Request, status: int, message: str, **more: Any) -> JSONResponse:
        body = error_body(request.url.path, message, status)
        headers = {"retry-after": "30"} if status in (429, 503) else {}
        return Ascii({**body, **more}, status, headers)

    @app.exception_handler(InputError)
    async def bad_input(request: Request, error: InputError) -> Response:
        status = {Outside: 403, Conflict: 409, Full: 429}.get(type(error), 400)
        more: dict[str, Any] = {}
        if isinstance(error, Fault):
            status = 422
            if error.field is not None:
                more = {"field": error.field, "value": error.value, "allowed": error.allowed}
        return answer(request, status, str(error), **more)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return answer(request, 429, str(error))

    @app.exception_handler(RunError)
    async def failed(request: Request, error: RunError) -> Response:
        return answer(request, 503 if isinstance(error, Ended | NoMemory) else 500, str(error))

    @app.exception_handler(api.NotFound)
    async def not_found(request: Request, error: api.NotFound) -> Response:
        return answer(request, 404, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, more = sentence(error.errors(), error.body)
        if request.url.path.startswith("/v1/"):
            return answer(request, 400, message)
        if request.url.path == "/api/finetune/submit" and more.get("allowed") == "required":
            return answer(request, 400, "model_dir and data_dir required")  # as it ever was
        return answer(request, 422, message, **more)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        found = answer(request, error.status_code, str(error.detail))
        found.headers.update(error.headers or {})
        return found

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        # Starlette's server logs the traceback; a client has no use for it.
        return answer(request, 500, "the server failed at this request: its log says why.")

    @cache
    def documented() -> list[tuple[re.Pattern[str], set[str]]]:
        paths = app.openapi()["paths"]
        return [(compile_path(path)[0], {way.upper() for way in paths[path]}) for path in paths]

    async def unknown(request: Request) -> Response:
        """What no route above is: or the page's library would answer it with a page."""
        path = request.url.path
        methods = {way for match, ways in documented() if match.match(path) for way in ways}
        if methods:
            allow = {"allow": ", ".join(sorted(methods))}
            raise HTTPException(405, f"{request.method} is not for {path}.", allow)
        raise HTTPException(404, f"there is nothing at {path}: see /docs.")

    every = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"]
    for start in ("/api", "/v1", "/healthz", "/openapi.json"):
        app.add_route(start, unknown, every, include_in_schema=False)
        app.add_route(start + "/{rest:path}", unknown, every, include_in_schema=False)


class Ascii(JSONResponse):
    """What a client sent may be no text at all (a lone surrogate), and is repeated to it."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


class Plain(logging.Formatter):
    """Clients' words may be in a line; none of it is a line of its own, or moves a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Patient(HttpToolsProtocol):
    """HTTP whose heads must come in time, and end: a client that sends a byte a minute holds
    nothing, nor does one that sends a head without an end."""

    late: asyncio.TimerHandle | None = None
    head = 0  #: bytes of headers, those after a body too
    unread = 0  #: bytes of a head that has not ended, as they come

    def data_received(self, data: bytes) -> None:
        before = self.late
        super().data_received(data)
        # While the same head is waited for all that comes is of it; the parser keeps it.
        self.unread = (
            self.unread + len(data) if self.late is not None and self.late is before else 0
        )
        if self.unread > HEAD_BYTES and not self.transport.is_closing():
            self._refuse_large()

    def on_url(self, url: bytes) -> None:
        self.head += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head += len(name) + len(value) + 4
        if self.head > HEAD_BYTES:  # which the parser takes for a fault of what it reads
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
        self.late = self.loop.call_later(HEAD_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self.late is not None:
            self.late.cancel()
            self.late = None

    def _give_up(self) -> None:
        self._refuse("408 Request Timeout", "its head did not come in time")

    def _refuse_large(self) -> None:
        self._refuse("431 Request Header Fields Too Large", "its head is too large")

    def _refuse(self, status: str, why: str) -> None:
        client = self.client[0] if self.client else "?"
        logger.warning("refused (%s) a request from %s: %s.", status[:3], client, why)
        self._stop_waiting()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(f"HTTP/1.1 {status}\r\nconnection: close\r\n\r\n".encode())
        self.transport.close()


def run(settings: Settings) -> None:
    """Serves until a signal; jobs go on. InputError, before it listens, for what cannot be used."""
    allow_open_files(OPEN_FILES)
    handler = logging.StreamHandler()
    handler.addFilter(Bounded())
    handler.setFormatter(Plain("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        raise InputError(
            f"the address {settings.host}, port {settings.port} cannot be had ({error.strerror}): "
            "give another --port."
        ) from None
    service = Service(settings)
    confine(service.roots)
    asyncio.run(_serve(service, listener))


def allow_open_files(wanted: int) -> None:
    """Lets this process have so many files open, or as many as the system allows.

    The hard limit may be more than that: macOS says infinity, and takes kern.maxfilesperproc.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return
    taken, refused = soft, most + 1
    while (asked := most if refused > most else (taken + refused) // 2) > taken:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (asked, hard))
            taken = asked
        except (ValueError, OSError):
            refused = asked


async def _serve(service: Service, listener: socket.socket) -> None:
    await service.start()  # a model that cannot be loaded is known before anyone asks
    config = uvicorn.Config(
        create(service),
        http=Patient,
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,  # else anyone may say to be another
        ws_max_size=1 << 20,
        access_log=False,  # paths may be followed by secrets
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    host = service.settings.host
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{listener.getsockname()[1]}/finetune", flush=True)
    await uvicorn.Server(config).serve([listener])
