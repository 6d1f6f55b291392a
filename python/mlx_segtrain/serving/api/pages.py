"""What a browser gets: the page's files, Swagger's page, and where it logs in and out.

The page is files alone (../page): its scripts ask /api and /v1, as any client does.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Form, Request
from fastapi.staticfiles import StaticFiles
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from ..sessions import LASTS_S
from .guard import COOKIE, Guard, Refused

FILES = Path(__file__).parents[1] / "page"
LOGIN = (FILES / "login.html").read_text(encoding="utf-8")
#: The addresses of the page: which of them it is, its scripts see.
PAGES = (
    *("/finetune", "/finetune/", "/finetune/jobs", "/finetune/job/{id}"),
    *("/finetune/library", "/finetune/chat"),
)
#: Files of these addresses.
ONES = {
    **dict.fromkeys(PAGES, "index.html"),
    **{"/docs": "docs.html", "/login.css": "login.css", "/favicon.ico": "icon.svg"},
}


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
    """For the token a browser gets the cookie that stands for it."""
    if guard.token is not None and not guard.is_token(token.encode("utf-8", "replace")):
        try:
            await guard.slow_down()
        except Refused as error:
            return _login(error.reason, error.status)
        return _login("That is not the token.", 401)
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


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        return FileResponse(FILES / name)

    return send


def add_pages(app: FastAPI) -> None:
    app.include_router(router)
    for path, name in ONES.items():
        app.add_route(path, _file(name), include_in_schema=False)
    app.mount("/finetune/files", StaticFiles(directory=FILES))
    # Swagger's files, from a package and not from elsewhere.
    app.mount("/docs-files", StaticFiles(packages=[("fastapi_offline", "static")]))
