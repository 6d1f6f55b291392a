"""Creates the application (the routes, the error handlers and the guard around them) and runs the
server."""

import asyncio
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from .. import __version__
from ..errors import InputError
from .api import completions, openai, openai_responses, routes, transfers
from .api.brake import Bounded
from .api.faults import add_handlers
from .api.guard import Guard
from .api.pages import add_pages
from .api.protocol import Patient
from .opening import confine
from .service import Service
from .settings import LOOPBACK, Settings

#: Maximum number of simultaneous connections. Further connections receive status 503.
CONNECTIONS = 2000
#: The limit on open files, if the system allows it. Each client that follows a job needs one open
#: file.
OPEN_FILES = 65536
#: The routes of the API.
ROUTERS = [x.router for x in (routes, transfers, completions, openai, openai_responses)]


def create(service: Service) -> Guard:
    """Creates the application of a server."""
    settings = service.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        transfers.clean(service.uploads)
        yield
        await service.close()

    app = FastAPI(
        title="mlx_segtrain",
        version=__version__,
        description="Fine-tunes language models on one machine, and serves them with adapters.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    guard = Guard(
        app,
        hosts=(settings.host, *settings.allow_hosts),
        token=settings.token,
        any_address=settings.host not in LOOPBACK,
        sessions=service.sessions,
    )
    app.state.service, app.state.guard = service, guard
    for router in ROUTERS:
        app.include_router(router)
    add_handlers(app)
    add_pages(app)
    return guard


class Plain(logging.Formatter):
    """Escapes unprintable characters in log lines, so that clients cannot send control sequences to
    a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def run(settings: Settings, level: int = logging.INFO) -> None:
    """Serves until a signal arrives. Jobs keep running after that. Raises InputError for unusable
    settings.

    Log messages of at least `level` go to stderr. With DEBUG, these include messages from uvicorn.
    """
    allow_open_files(OPEN_FILES)
    handler = logging.StreamHandler()
    handler.addFilter(Bounded())
    handler.setFormatter(Plain("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=max(level, logging.INFO))
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=1024)
        # Accepted connections inherit this option from the listener. asyncio sets it only for
        # sockets with a protocol number. Without it, each response to a client with delayed ACKs
        # waits 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise InputError(
            f"port {settings.port} on address {settings.host} is not available "
            f"({error.strerror}): choose another --port."
        ) from None
    service = Service(settings)
    confine(service.roots)
    asyncio.run(_serve(service, listener, level))


def allow_open_files(wanted: int) -> None:
    """Raises this process's limit on open files to `wanted`, or to the system's maximum if that is
    lower.

    On macOS the hard limit is infinite, but the system enforces kern.maxfilesperproc.
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


async def _serve(service: Service, listener: socket.socket, level: int) -> None:
    await service.start()  # first, so that the server does not start with a faulty model
    config = uvicorn.Config(
        create(service),
        http=Patient,
        # Off by default, because a client could use these headers to forge its address.
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        access_log=False,  # paths may contain secrets
        log_level=logging.INFO if level < logging.INFO else logging.WARNING,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    host = service.settings.host
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{listener.getsockname()[1]}/finetune", flush=True)
    await uvicorn.Server(config).serve([listener])
