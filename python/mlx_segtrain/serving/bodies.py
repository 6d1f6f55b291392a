"""Bodies of JSON: counted before they are parsed, and parsed beside the event loop if large.

A body of a few bytes may hold millions of values, and each costs memory, and time in which nobody
else is served. So what is outside of its strings is counted first.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request

from .pools import Busy, Pool

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


class Body(Request):
    """A request whose large body is parsed in a thread; then it can be let go before the answer."""

    most = OF_PROMPT

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            parse = self.parse
            try:
                self._json = parse(body) if len(body) <= SMALL else await _PARSING.run(parse, body)
            except Busy as error:
                raise HTTPException(429, str(error)) from None
        return self._json

    def parse(self, body: bytes) -> Any:
        """The value; HTTPException, or json.JSONDecodeError."""
        text = body.decode("utf-8", "replace")
        if len(body) > SMALL:
            _count(text, self.most)
        return json.loads(text)

    def let_go(self) -> None:
        """Frees the body: what it said is known by now."""
        self._body, self._json = b"", None
        freed = self.scope.get("mlx_segtrain.body_read")
        if freed is not None:
            freed()


class Commented(Body):
    """A request whose JSON may have // comments, as people write it in a shell."""

    most = OF_CONFIGURATION

    def parse(self, body: bytes) -> Any:
        try:
            return super().parse(body)
        except json.JSONDecodeError:
            if len(body) > SMALL:
                raise
            text = body.decode("utf-8", "replace")
            return json.loads(_COMMENT.sub(lambda found: found[1] or "", text))


#: A string, which stays, or a comment to the end of its line. A string without an end is one too:
#: or each of its quotes would be tried anew.
_COMMENT = re.compile(r'("(?:[^"\\]|\\.)*"?)|//[^\n]*', re.DOTALL)


def _count(text: str, most: Most) -> None:
    """413 if a text of JSON holds too much. Of what is no JSON the count means nothing."""
    # Within a string a quote has a backslash before it; outside of strings there is none.
    if "\\" in text:
        text = text.replace("\\\\", "").replace('\\"', "")
    if text.count('"') > 4 * most.names:
        raise _too_much("strings", 2 * most.names)
    outside = "".join(text.split('"')[::2])
    for what, found, allowed in (
        ("objects and lists", outside.count("{") + outside.count("["), most.containers),
        ("names", outside.count(":"), most.names),
        ("values", outside.count(","), most.values),
    ):
        if found > allowed:
            raise _too_much(what, allowed)


def _too_much(what: str, most: int) -> HTTPException:
    return HTTPException(413, f"the body holds more than {most} {what}: send less at once.")
