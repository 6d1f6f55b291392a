"""Splits the text of an answer into reasoning, content and tool calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .decoding import overlap

#: The number of tokens at the end of a prompt that are searched for a tag that starts the
#: reasoning.
END = 32

Kind = Literal["content", "reasoning", "call"]


@dataclass(frozen=True)
class Tags:
    """The texts that start and end the reasoning and the tool calls. `think` and `call` are None if
    the model has no such tags.

    If the end tag of a call is empty, the call ends where the next call begins.
    """

    think: tuple[str, str] | None = None
    call: tuple[str, str] | None = None

    @classmethod
    def of(cls, tokenizer: Any, *, calls: bool = True) -> "Tags":
        """Returns the tags of a model, given its mlx-lm tokenizer."""
        think = (tokenizer.think_start, tokenizer.think_end) if tokenizer.has_thinking else None
        call = None
        if calls and tokenizer.has_tool_calling:
            call = (tokenizer.tool_call_start, tokenizer.tool_call_end)
        return cls(think, call)


class Parts:
    """Splits a text that arrives in pieces. The tags are left out, and a tool call is returned as a
    whole."""

    def __init__(self, tags: Tags, *, reasoning: bool = False):
        self._tags = tags
        self._kind: Kind = "reasoning" if reasoning and tags.think else "content"
        self._held = ""
        self._bare = False  # whether content after the reasoning was only white space

    @property
    def reasons(self) -> bool:
        """Whether the text that comes next is reasoning."""
        return self._kind == "reasoning"

    def add(self, text: str, *, last: bool = False) -> list[tuple[Kind, str]]:
        """Adds a piece of text. Returns the parts whose kind is certain; after the `last` piece,
        returns all the remaining text."""
        self._held += text
        found: list[tuple[Kind, str]] = []
        while (end := self._next_tag()) is not None:
            at, tag, kind = end
            self._out(found, self._held[:at], whole=True)
            self._held = self._held[at + len(tag) :]
            self._bare = self._bare or self._kind == "reasoning"
            self._kind = kind
        keep = 0 if last else self._begun()
        if self._kind != "call" or last:
            cut = len(self._held) - keep
            self._out(found, self._held[:cut], whole=last)
            self._held = self._held[cut:]
        return found

    def _ends(self) -> list[tuple[str, Kind]]:
        think, call = self._tags.think, self._tags.call
        if self._kind == "reasoning" and think:
            return [(think[1], "content")]
        if self._kind == "call" and call:
            return [(call[1], "content") if call[1] else (call[0], "call")]
        begins: list[tuple[str, Kind]] = []
        if think:
            begins.append((think[0], "reasoning"))
        if call:
            begins.append((call[0], "call"))
        return begins

    def _next_tag(self) -> tuple[int, str, Kind] | None:
        found = [(at, *end) for end in self._ends() if (at := self._held.find(end[0])) >= 0]
        return min(found, key=lambda end: end[0], default=None)

    def _begun(self) -> int:
        """Returns the number of characters at the end of the text that may be the beginning of a
        tag."""
        return max((overlap(self._held, tag) for tag, _ in self._ends()), default=0)

    def _out(self, found: list[tuple[Kind, str]], text: str, *, whole: bool) -> None:
        # Leaves out white space between reasoning and content, where templates have line breaks.
        if self._kind == "content" and self._bare:
            text = text.lstrip()
            self._bare = not text
        if text and (self._kind != "call" or (whole and text.strip())):
            found.append((self._kind, text))


def begins_reasoning(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Returns whether a prompt ends inside the reasoning, as it does with some chat templates."""
    if not tokenizer.has_thinking:
        return False
    end = list(prompt[-END:])
    begun = tokenizer.rfind_think_start(end)
    return begun >= 0 and tokenizer.decode(end[begun:]).strip() == tokenizer.think_start


def read_calls(tokenizer: Any, text: str, tools: Any) -> list[dict[str, Any]] | None:
    """Returns the tool calls in the text between two tags, or None if they cannot be parsed."""
    try:
        calls = tokenizer.tool_parser(text, tools)
        calls = calls if isinstance(calls, list) else [calls]
        return calls if all(map(_is_call, calls)) else None
    except Exception:  # the parser may fail in any way, since a model may write anything
        return None


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("name"), str) and bool(call["name"])
