"""Turns errors into one-sentence responses, in OpenAI's format for /v1 and in our own format
elsewhere."""

import json
import reprlib
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Mount

from ...config import TrainConfig, allowed, meant
from ...errors import InputError, RunError, word

#: Values of the retry-after header, in seconds, by status: for /v1, and for other paths.
RETRY_OPENAI_S, RETRY_S = {429: 5, 503: 30}, {429: 30, 503: 30}

#: Fields whose values must not appear in responses.
SECRET = ("token",)
#: The beginning of many pydantic messages.
SHOULD_BE = "input should be "


def sentence(faults: Sequence[Any], body: Any) -> tuple[str, dict[str, Any]]:
    """Returns a sentence about one of the errors, and the error's details: field, value and allowed
    values.

    Unknown fields take precedence, because a misspelled field is often the reason why a required
    field is missing.
    """
    fault = min(faults, key=lambda fault: fault["type"] != "extra_forbidden")
    if fault["type"] == "json_invalid":
        reason = fault.get("ctx", {}).get("error", "it ends early")
        return f"the body is not valid JSON: {reason} (at character {fault['loc'][-1]}).", {}
    where = place(fault, body)
    if not where:
        problem = fault["msg"].removeprefix("Value error, ")
        if fault["type"].endswith("_type"):
            problem = "it is not a JSON object (content-type: application/json)"
        return f"the body cannot be used: {problem}.", {}
    if where[0] in TrainConfig.model_fields and fault["type"] not in ("missing", "extra_forbidden"):
        value, values = _plain(fault["input"]), allowed(where[0], fault["input"])
        more = {"field": where[0], "value": value, "allowed": values}
        return f"{where[0]} must be {values}; got {value!r}.", more
    own, where = _within(faults, where, body)
    fault, field = own[0], ".".join(where)
    value = None if field in SECRET else _plain(fault["input"])
    if fault["type"] == "missing":
        return f"{field} is missing.", {"field": field, "allowed": "required"}
    if fault["type"] == "extra_forbidden":
        hint = meant(field, list(TrainConfig.model_fields))
        return f"unknown field {field}.{hint}", {"field": field, "value": value}
    problem = _either([fault["msg"] for fault in own])
    return f"{field}: {problem}.", {"field": field, "value": value, "allowed": problem}


def _within(
    faults: Sequence[Any], where: tuple[str, ...], body: Any
) -> tuple[list[Any], tuple[str, ...]]:
    """Returns the errors of a field, and their place in the body. For a union, returns the errors
    of the member that fits the body best."""
    found = [(place(fault, body), fault) for fault in faults]
    found = [pair for pair in found if pair[0][: len(where)] == where]
    deepest = max((at for at, _ in found), key=len)
    return [fault for at, fault in found if at == deepest], deepest


def _either(messages: Sequence[str]) -> str:
    """Joins the messages about the members of a union into one."""
    found = list(dict.fromkeys(words[0].lower() + words[1:] for words in messages))
    if len(found) > 1 and all(words.startswith(SHOULD_BE) for words in found):
        return SHOULD_BE + " or ".join(words.removeprefix(SHOULD_BE) for words in found)
    return ", or ".join(found)


def place(fault: Any, body: Any) -> tuple[str, ...]:
    """Returns the place of an error in the body: pydantic's `loc` without the members of unions."""
    start, *parts = fault["loc"]
    if start != "body":  # in a query, a header or a path
        return tuple(map(_name, parts))
    found: list[str] = []
    for i, part in enumerate(parts):
        keys = body if isinstance(body, dict) else range(len(body) if isinstance(body, list) else 0)
        if part in keys:
            body = body[part]
        elif fault["type"] != "missing" or i + 1 < len(parts):
            continue
        found.append(_name(part))
    return tuple(found)


def _name(part: str | int) -> str:
    """Returns an index or a field name as safe text. Clients can choose field names."""
    return str(part) if isinstance(part, int) else word(part)


def _plain(value: Any) -> Any:
    """Returns a value in a form that is short enough for a response."""
    if isinstance(value, bool | None) or (isinstance(value, str) and len(value) <= 200):
        return value
    if isinstance(value, int) and abs(value) < 1 << 64:
        return value
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def add_handlers(app: FastAPI) -> None:
    """Adds handlers that respond to every error with one sentence. The package's own errors specify
    the status of the response."""

    @app.exception_handler(InputError)
    @app.exception_handler(RunError)
    async def known(request: Request, error: Any) -> Response:
        code, field = getattr(error, "code", None), getattr(error, "field", None)
        more = {} if field is None else {"field": field}
        return error_answer(request, error.status, str(error), code, **more)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, more = sentence(error.errors(), error.body)
        if request.url.path.startswith("/v1/"):
            return error_answer(request, 400, message)
        if request.url.path == "/api/finetune/submit" and more.get("allowed") == "required":
            # This response is kept for existing clients.
            return error_answer(request, 400, "model_dir and data_dir required")
        return error_answer(request, 422, message, **more)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        status, message, path = error.status_code, str(error.detail), request.url.path
        headers = dict(error.headers or {})
        if message == HTTPStatus(status).phrase:  # raised by the router itself
            if status == 404:
                message = f"{path} does not exist: see /docs."
            elif status == 405:
                message = f"{path} does not support {request.method}."
                headers["allow"] = ", ".join(_methods(request))
        found = error_answer(request, status, message)
        found.headers.update(headers)
        return found

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        # Starlette logs the traceback.
        return error_answer(request, 500, "the server failed to answer this request: see its log.")


def _methods(request: Request) -> list[str]:
    """Returns the HTTP methods of all routes with the request's path."""
    routes = [route for route in request.app.routes if not isinstance(route, Mount)]
    scopes = [
        {**request.scope, "method": x} for x in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
    ]
    return [s["method"] for s in scopes if any(x.matches(s)[0] is Match.FULL for x in routes)]


def error_answer(
    request: Request, status: int, message: str, code: str | None = None, **more: Any
) -> Response:
    """Returns the response for an error. It has a retry-after header if a retry may succeed."""
    path = request.url.path
    retry = RETRY_OPENAI_S if path.startswith("/v1/") else RETRY_S
    headers = {"retry-after": str(retry[status])} if status in retry else None
    # The JSON is ASCII, because the message may repeat an unpaired surrogate, which UTF-8 cannot
    # encode.
    content = json.dumps({**error_body(path, message, status, code), **more})
    return Response(content, status, headers, "application/json")


def error_body(path: str, message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """Returns the content of an error response: in OpenAI's format for /v1, and in our own format
    for other paths."""
    if path.startswith("/v1/"):
        return openai_error(status, message, code)
    return {"ok": False, "error": message}


def openai_error(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """Returns an error in OpenAI's format."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "code": code}}
