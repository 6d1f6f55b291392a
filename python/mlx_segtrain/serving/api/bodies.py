"""Parses JSON bodies: limits the number of values, and uses a thread for large bodies.

A body of a few megabytes may contain millions of values. These need a lot of memory, and parsing
them blocks the server. Therefore, before a body is parsed, the punctuation outside strings is
counted to limit the number of values.
"""

import json
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from ..pools import Busy, Pool

#: A body of at most this many bytes is parsed directly instead of in a thread.
SMALL = 1 << 16


@dataclass(frozen=True)
class Most:
    """The maximum numbers of containers (objects and lists), of names in objects, and of values in
    a body."""

    containers: int
    names: int
    values: int


#: A prompt may be a long list of tokens, and a chat a long list of turns; configurations are small.
OF_PROMPT, OF_CONFIGURATION = Most(50_000, 50_000, 1_100_000), Most(1000, 1000, 5000)

_PARSING = Pool("large bodies", 2, 16)

#: Matches a string, or a comment up to the end of the line. It also matches an unterminated string;
#: otherwise a match would be attempted again at each quote in that string.
_COMMENT = re.compile(r'("(?:[^"\\]|\\.)*"?)|//[^\n]*', re.DOTALL)
#: Matches an escape sequence for half of a surrogate pair. Usually, the other half follows.
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class NotText(ValueError):
    """A string in the JSON is not valid text. The message says where."""


class Json(Request):
    """A request with a JSON body in UTF-8, without unpaired surrogates.

    A large body is parsed in a thread. Except in /v1, a small body may contain //
    comments, for requests typed in a shell.
    """

    @property
    def is_openai(self) -> bool:
        return self.url.path.startswith("/v1/")

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            parse = self.parse
            try:
                self._json = parse(body) if len(body) <= SMALL else await _PARSING.run(parse, body)
            except Busy as error:
                raise HTTPException(429, str(error)) from None
            except NotText as error:
                raise HTTPException(400 if self.is_openai else 422, str(error)) from None
        return self._json

    def parse(self, body: bytes) -> Any:
        """Returns the parsed body. Raises NotText, JSONDecodeError, or HTTPException for too many
        values."""
        text = _decoded(body)
        if len(body) > SMALL:
            _count(text, OF_PROMPT if self.is_openai else OF_CONFIGURATION)
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            if self.is_openai or len(body) > SMALL:
                raise
            text = _COMMENT.sub(lambda found: found[1] or "", text)
            value = json.loads(text)
        if _ESCAPED.search(text):
            _check_text(value)
        return value

    def let_go(self) -> None:
        """Frees the body after it has been parsed."""
        self._body, self._json = b"", None
        freed = self.scope.get("mlx_segtrain.body_read")
        if freed is not None:
            freed()


class JsonRoute(APIRoute):
    """A route that reads JSON bodies with the class `Json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await handle(Json(request.scope, request.receive))

        return answer


def _decoded(body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"the body is not valid UTF-8 ({error.reason} at byte {error.start})."
        raise NotText(message) from None


def _count(text: str, most: Most) -> None:
    """Raises HTTPException with status 413 if a JSON text has too many values, or with status 400
    if its brackets are unbalanced, which would make the counts meaningless."""
    # Without escaped characters, every quote begins or ends a string.
    if "\\" in text:
        text = text.replace("\\\\", "").replace('\\"', "")
    if text.count('"') > 4 * most.names:
        raise _too_much("strings", 2 * most.names)
    outside = "".join(text.split('"')[::2])
    opened = outside.count("{") + outside.count("[")
    closed = outside.count("}") + outside.count("]")
    if opened > most.containers and opened != closed:
        message = f"it opens {opened} objects and lists, but closes {closed}"
        raise HTTPException(400, f"the body is not valid JSON: {message}.")
    for what, found, allowed in (
        ("objects and lists", opened, most.containers),
        ("names", outside.count(":"), most.names),
        ("values", outside.count(","), most.values),
    ):
        if found > allowed:
            raise _too_much(what, allowed)


def _too_much(what: str, most: int) -> HTTPException:
    return HTTPException(413, f"the body contains more than {most} {what}: shorten it.")


def _check_text(value: Any) -> None:
    """Raises NotText for an unpaired surrogate, which no tokenizer, template or file name
    accepts."""
    waiting = [("", value)]
    while waiting:
        where, value = waiting.pop()
        where = where[:200]  # otherwise a long key would be copied for each value below it
        if isinstance(value, str):
            if found := _SURROGATE.search(value):
                raise NotText(
                    f"{where or 'the body'} has half of a character (the lone surrogate "
                    f"\\u{ord(found[0]):x}): send whole characters."
                )
            continue
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        waiting += [(f"{where}.{key}".lstrip("."), own) for key, own in pairs if _may_fail(own)]
        if isinstance(value, dict):
            named = f"{where or 'the body'} contains a key that"
            waiting += [(named, key) for key in value if _may_fail(key)]


def _may_fail(value: Any) -> bool:
    """Returns whether a value is a container, or a string with an unpaired surrogate."""
    if isinstance(value, str):
        return _SURROGATE.search(value) is not None
    return isinstance(value, dict | list)
