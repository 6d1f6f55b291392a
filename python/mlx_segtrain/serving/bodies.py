"""JSON that clients send: read and checked in one place, whatever route it is for."""

import json
import re
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

__all__ = ["Commented", "Json"]

#: A string, which stays, or a comment to the end of its line. A string without an end is one too:
#: or each of its quotes would be tried anew.
_COMMENT = re.compile(r'("(?:[^"\\]|\\.)*"?)|//[^\n]*', re.DOTALL)
#: What a lone surrogate looks like in JSON; most such are half of a pair.
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class NotText(ValueError):
    """JSON that holds what is no text; why, in a sentence."""


class Json(Request):
    """A request whose JSON is text: UTF-8, without lone surrogates."""

    commented = False

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = parse(await self.body(), commented=self.commented)
            except NotText as error:
                status = 400 if self.url.path.startswith("/v1/") else 422
                raise HTTPException(status, str(error)) from None
        return self._json


class Commented(Json):
    """A request whose JSON may have // comments, as people write it in a shell."""

    commented = True


def parse(body: bytes, *, commented: bool = False) -> Any:
    """The value; JSONDecodeError (with which FastAPI says where), or NotText."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8 ({error.reason} at byte {error.start})."
        raise NotText(message) from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        if not commented:
            raise
        text = _COMMENT.sub(lambda found: found[1] or "", text)
        value = json.loads(text)
    if _ESCAPED.search(text):
        _check_text(value)
    return value


def _check_text(value: Any) -> None:
    """NotText for a lone surrogate: no tokenizer, template or file name can take one."""
    waiting = [("", value)]
    while waiting:
        where, value = waiting.pop()
        where = where[:200]  # or a long key would stand in the place of each thing below it
        if isinstance(value, dict):
            waiting += [(f"{where}.{key}".lstrip("."), own) for key, own in value.items()]
            waiting += [(f"{where or 'the body'} holds a key that", key) for key in value]
        elif isinstance(value, list):
            waiting += [(f"{where}.{i}".lstrip("."), own) for i, own in enumerate(value)]
        elif isinstance(value, str) and (found := _SURROGATE.search(value)):
            raise NotText(
                f"{where or 'the body'} has half of a character (the lone surrogate "
                f"\\u{ord(found[0]):x}): send whole characters."
            )
