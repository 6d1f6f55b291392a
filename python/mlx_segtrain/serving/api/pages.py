"""Swagger's page, where browsers log in and out, and what is said where there is nothing."""

import re
from functools import cache
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Form, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import compile_path

from ..sessions import LASTS_S
from .guard import COOKIE, Guard, Refused

LOGIN = """<!doctype html><html lang="en"><meta name="viewport" content="width=device-width">
<title>mlx_segtrain</title><style>body{{font:1rem system-ui;max-width:24rem;margin:20vh auto;
padding:1rem;color-scheme:light dark}}input,button{{font:inherit;padding:.5rem;width:100%;
box-sizing:border-box;margin:.25rem 0}}</style>
<h1>mlx_segtrain</h1><form method="post"><label for="token">The token of this server</label>
<input id="token" name="token" type="password" autocomplete="current-password" autofocus required>
<button>Open</button></form><p role="alert">{problem}</p></html>"""


async def guard_of(request: Request) -> Guard:
    return request.app.state.guard


Used = Annotated[Guard, Depends(guard_of)]
router = APIRouter(include_in_schema=False)
#: The files of Swagger's page, from a package and not from elsewhere.
SWAGGER = "/docs-files"


@router.get("/docs")
async def docs() -> HTMLResponse:
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="mlx_segtrain API",
        swagger_js_url=f"{SWAGGER}/swagger-ui-bundle.js",
        swagger_css_url=f"{SWAGGER}/swagger-ui.css",
        swagger_favicon_url=f"{SWAGGER}/favicon.png",
    )


@router.get("/login")
async def login() -> HTMLResponse:
    return HTMLResponse(LOGIN.format(problem=""))


@router.post("/login")
async def check(guard: Used, token: Annotated[str, Form()] = "") -> Response:
    """For the token a browser gets the cookie that stands for it."""
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


@router.post("/logout")
async def logout(guard: Used, request: Request) -> Response:
    guard.sessions.close(request.cookies.get(COOKIE, ""))
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


@router.get("/")
async def root() -> Response:
    return RedirectResponse("/finetune")


def add_pages(app: FastAPI) -> None:
    """After all routes that the document has: where nothing is, the page's library would answer
    with a page."""
    app.mount(SWAGGER, StaticFiles(packages=[("fastapi_offline", "static")]))
    app.include_router(router)

    @cache
    def documented() -> list[tuple[re.Pattern[str], set[str]]]:
        paths = app.openapi()["paths"]
        return [(compile_path(path)[0], {way.upper() for way in paths[path]}) for path in paths]

    async def unknown(request: Request) -> Response:
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
