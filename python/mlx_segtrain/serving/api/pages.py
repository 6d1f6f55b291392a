"""Routes for browsers: the page, Swagger's page, login and logout.

The page consists of the files in ../page. Its scripts use /api and /v1 like any other client.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Form, Request
from fastapi.staticfiles import StaticFiles
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from ..sessions import LASTS_S
from .guard import COOKIE, Guard, Refused

FILES = Path(__file__).parents[1] / "page"
LOGIN = (FILES / "login.html").read_text(encoding="utf-8")
#: The paths of the page, each with the module that main.js loads for it.
PAGES = {
    **{"/finetune": "setup", "/finetune/": "setup", "/finetune/jobs": "jobs"},
    **{"/finetune/job/{id}": "job", "/finetune/library": "library", "/finetune/chat": "chat"},
}
#: Single files, by their addresses.
ONES = {"/login.css": "login.css", "/favicon.ico": "icon.svg"}
IMPORT = re.compile(r"""(?:from|import\()\s*["'`]\./([\w/]+\.js)["'`]""")


def _version() -> str:
    """Returns a hash of the page's files. The hash is part of the files' addresses, so that a
    browser can cache the files forever and never mixes two versions."""
    found = hashlib.sha256()
    for path in sorted(FILES.rglob("*")):
        if path.is_file():
            found.update(f"{path.relative_to(FILES)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]


VERSION = _version()


def modules(*names: str) -> list[str]:
    """Returns these modules and all modules that they import, so that a browser can load them all
    at the same time."""
    found = dict.fromkeys(names)
    for name in found:
        text = (FILES / name).read_text(encoding="utf-8")
        more = [own for own in IMPORT.findall(text) if own not in found]
        if more:
            return modules(*found, *more)
    return list(found)


def page(name: str) -> str:
    """Returns the HTML for a module. Scripts run in the order in which they are listed, so uPlot
    must precede the modules that use it."""
    needed = modules("main.js", f"{name}.js")
    lines = [f'<link rel="modulepreload" href="FILES/{own}" />' for own in needed]
    if "charts.js" in needed:
        lines.append('<link rel="stylesheet" href="FILES/vendor/uPlot.css" />')
        lines.append('<script src="FILES/vendor/uPlot.min.js" defer></script>')
    html = (FILES / "index.html").read_text(encoding="utf-8")
    return html.replace("<!-- PRELOADED -->", "\n    ".join(lines))


async def guard_of(request: Request) -> Guard:
    return request.app.state.guard


Used = Annotated[Guard, Depends(guard_of)]
router = APIRouter(include_in_schema=False)


def _login(problem: str = "", status: int = 200) -> HTMLResponse:
    return HTMLResponse(LOGIN.replace("PROBLEM", problem), status)


@router.get("/login")
async def login() -> HTMLResponse:
    return _login()


@router.post("/login")
async def check(guard: Used, token: Annotated[str, Form()] = "") -> Response:
    """Checks the token. If the token is right, the browser receives a session cookie, which
    replaces the token in later requests."""
    if guard.token is not None and not guard.is_token(token.encode("utf-8", "replace")):
        try:
            await guard.slow_down()
        except Refused as error:
            return _login(error.reason, error.status)
        return _login("The token is wrong.", 401)
    answer = RedirectResponse("/finetune", 303)
    if guard.token is not None:
        how = {"httponly": True, "samesite": "strict", "max_age": LASTS_S}
        answer.set_cookie(COOKIE, guard.sessions.open(), **how)
    return answer


@router.post("/logout")
async def logout(guard: Used, request: Request) -> Response:
    guard.sessions.close(request.cookies.get(COOKIE, ""))
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


@router.get("/")
async def root() -> Response:
    return RedirectResponse("/finetune")


class Kept(StaticFiles):
    """Files that a browser can cache forever, because their address changes with their content."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        answer = super().file_response(*args, **kwargs)
        answer.headers["cache-control"] = "private, max-age=31536000, immutable"
        return answer


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        return FileResponse(FILES / name)

    return send


def _html(text: str) -> Callable[[Request], Awaitable[Response]]:
    """Returns a route that sends HTML in which FILES is replaced by the address of the page's
    files."""
    text = text.replace("FILES/", f"/finetune/files/{VERSION}/")

    async def send(request: Request) -> Response:
        return HTMLResponse(text)

    return send


def add_pages(app: FastAPI) -> None:
    app.include_router(router)
    for path, name in PAGES.items():
        app.add_route(path, _html(page(name)), include_in_schema=False)
    docs = (FILES / "docs.html").read_text(encoding="utf-8")
    app.add_route("/docs", _html(docs), include_in_schema=False)
    for path, name in ONES.items():
        app.add_route(path, _file(name), include_in_schema=False)
    app.mount(f"/finetune/files/{VERSION}", Kept(directory=FILES))
    # Swagger's files come from a Python package instead of another host.
    app.mount("/docs-files", StaticFiles(packages=[("fastapi_offline", "static")]))
