"""Bodies of JSON: counted before they are parsed, and parsed beside the event loop if large.

A body of a few bytes may hold millions of values, and each costs memory, and time in which nobody
else is served. So what is outside of its strings is counted first.
"""

import json
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from ..pools import Busy, Pool

#: Bytes up to which a body is parsed at once.
SMALL = 1 << 16


@dataclass(frozen=True)
class Most:
    """Objects and lists, names in objects, and values that a large body may hold."""

    containers: int
    names: int
    values: int


#: A prompt may be a list of tokens, a chat one of turns; a configuration has a few fields.
OF_PROMPT, OF_CONFIGURATION = Most(50_000, 50_000, 1_100_000), Most(1000, 1000, 5000)

_PARSING = Pool("large bodies", 2, 16)

#: A string, which stays, or a comment to the end of its line. A string without an end is one too:
#: or each of its quotes would be tried anew.
_COMMENT = re.compile(r'("(?:[^"\\]|\\.)*"?)|//[^\n]*', re.DOTALL)
#: What a lone surrogate looks like in JSON; most such are half of a pair.
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class NotText(ValueError):
    """JSON that holds what is no text; why, in a sentence."""


class Json(Request):
    """A request whose JSON is text: UTF-8, without lone surrogates.

    A large body is parsed in a thread; each can be let go before the answer. A small one that is
    not OpenAI's may have // comments, as people write it in a shell.
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
        """The value; NotText, HTTPException for too much of it, or JSONDecodeError, with which
        FastAPI says where."""
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
        """Frees the body: what it said is known by now."""
        self._body, self._json = b"", None
        freed = self.scope.get("mlx_segtrain.body_read")
        if freed is not None:
            freed()


class JsonRoute(APIRoute):
    """A route whose bodies are read so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await handle(Json(request.scope, request.receive))

        return answer


def _decoded(body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8 ({error.reason} at byte {error.start})."
        raise NotText(message) from None


def _count(text: str, most: Most) -> None:
    """HTTPException, 413, if a text of JSON holds too much; 400 if what would be too much is no
    JSON, of which the other counts mean nothing."""
    # Within a string a quote has a backslash before it; outside of strings there is none.
    if "\\" in text:
        text = text.replace("\\\\", "").replace('\\"', "")
    if text.count('"') > 4 * most.names:
        raise _too_much("strings", 2 * most.names)
    outside = "".join(text.split('"')[::2])
    opened = outside.count("{") + outside.count("[")
    closed = outside.count("}") + outside.count("]")
    if opened > most.containers and opened != closed:
        message = f"it opens {opened} objects and lists, and closes {closed}"
        raise HTTPException(400, f"the body is not JSON: {message}.")
    for what, found, allowed in (
        ("objects and lists", opened, most.containers),
        ("names", outside.count(":"), most.names),
        ("values", outside.count(","), most.values),
    ):
        if found > allowed:
            raise _too_much(what, allowed)


def _too_much(what: str, most: int) -> HTTPException:
    return HTTPException(413, f"the body holds more than {most} {what}: send less at once.")


def _check_text(value: Any) -> None:
    """NotText for a lone surrogate: no tokenizer, template or file name can take one."""
    waiting = [("", value)]
    while waiting:
        where, value = waiting.pop()
        where = where[:200]  # or a long key would be repeated for each thing below it
        if isinstance(value, str):
            if found := _SURROGATE.search(value):
                raise NotText(
                    f"{where or 'the body'} has half of a character (the lone surrogate "
                    f"\\u{ord(found[0]):x}): send whole characters."
                )
            continue
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        waiting += [(f"{where}.{key}".lstrip("."), own) for key, own in pairs if _may_lack(own)]
        if isinstance(value, dict):
            named = f"{where or 'the body'} holds a key that"
            waiting += [(named, key) for key in value if _may_lack(key)]


def _may_lack(value: Any) -> bool:
    """Whether it is a text with a lone surrogate, or may hold one: the others are not kept."""
    return isinstance(value, dict | list) or (
        isinstance(value, str) and _SURROGATE.search(value) is not None
    )
