"""Converts messages between spellings (equivalent forms), because no chat template supports all of
them.

Rows have OpenAI's form, but templates expect different forms: arguments of tool calls as JSON text
or as a mapping; missing content as a missing key or as ""; reasoning under one of three keys, or
between tags in the content; content as text or as a list of parts; call ids of any form, or with
exactly nine letters and digits; developer messages unchanged, or as system messages.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args, get_type_hints

from .messages import REASONING, Message, ReasoningKey

Messages = Sequence[Message]


@dataclass(frozen=True)
class Spelling:
    """A spelling of messages. Each field represents a difference between templates, and is named
    after the part of a message that it affects. Most templates understand the defaults."""

    ids: Literal["given", "short"] = "given"  #: Mistral's templates need short ids
    arguments: Literal["mapping", "text"] = "mapping"
    null: Literal[None, ""] = None  #: what replaces missing content; None: no key
    developer: Literal["developer", "system"] = "developer"  #: the role of developer messages
    reasoning: Literal["given", ReasoningKey, "tags"] = "given"
    content: Literal["text", "parts"] = "text"


#: The possible values of each field; the default is first.
CHOICES = {name: get_args(kind) for name, kind in get_type_hints(Spelling).items()}


def traits(messages: Messages) -> frozenset[str]:
    """Returns the fields of Spelling that affect these messages."""
    found = {"content"}
    for message in messages:
        if message.get("tool_calls"):
            found |= {"arguments", "ids"}
        if message.get("content") is None:
            found.add("null")
        if message.get("role") == "developer":
            found.add("developer")
        if reasoning(message)[0]:
            found.add("reasoning")
    return frozenset(found)


def spellings(of: frozenset[str]) -> Iterator[Spelling]:
    """Yields every spelling of messages with these traits, beginning with the default."""
    names = [name for name in reversed(CHOICES) if name in of]
    for values in product(*(CHOICES[name] for name in names)):
        yield Spelling(**dict(zip(names, values, strict=True)))


def spell(messages: Messages, spelling: Spelling) -> list[dict[str, Any]]:
    """Converts messages to a spelling."""
    return [_spelled(message, spelling) for message in messages]


def _spelled(message: Message, spelling: Spelling) -> dict[str, Any]:
    own = dict(message)
    if own.get("role") == "developer":
        own["role"] = spelling.developer
    if calls := own.get("tool_calls"):
        own["tool_calls"] = [_call(call, spelling) for call in calls]
    if spelling.ids == "short" and own.get("tool_call_id"):
        own["tool_call_id"] = _short(own["tool_call_id"])
    thoughts, answer = reasoning(own)
    if thoughts and spelling.reasoning != "given":
        own = {key: value for key, value in own.items() if key not in REASONING}
        if spelling.reasoning == "tags":
            own["content"] = f"<think>\n{thoughts}\n</think>\n\n{answer}"
        else:
            own |= {"content": answer or (own.get("content") and ""), spelling.reasoning: thoughts}
    if own.get("content") is None:
        # Remove the key, because versions of transformers before 5.21 pass None to the template,
        # which then writes "None".
        own.pop("content", None)
        if spelling.null is not None:
            own["content"] = spelling.null
    if spelling.content == "parts" and isinstance(own.get("content"), str):
        own["content"] = [{"type": "text", "text": own["content"]}]
    return own


def _call(call: Message, spelling: Spelling) -> dict[str, Any]:
    own = dict(call)
    function = dict(call.get("function", call))
    if "arguments" in function:
        function["arguments"] = given = arguments(call)
        if spelling.arguments == "text" and not isinstance(given, str):
            function["arguments"] = json.dumps(given, ensure_ascii=False)
    own = {**own, "function": function} if "function" in call else function
    if spelling.ids == "short":
        own["id"] = _short(str(own.get("id") or ""))
    return own


def _short(id: str) -> str:
    """Converts an id to exactly nine letters and digits, because Mistral's templates reject other
    ids."""
    plain = "".join(char for char in id if char.isascii() and char.isalnum())
    return plain[-9:].rjust(9, "0")


def arguments(call: Message) -> Any:
    """Returns the arguments of a call. Arguments that are a JSON object in text form are
    decoded."""
    given = call.get("function", call).get("arguments")
    if isinstance(given, str):
        try:
            decoded = json.loads(given or "{}")
        except ValueError:
            return given
        return decoded if isinstance(decoded, dict) else given
    return {} if given is None else given


def reasoning(message: Message) -> tuple[str, str]:
    """Returns the reasoning and the answer of a message, without the tags and the whitespace around
    them. The reasoning is under a separate key, or between tags at the start of the content."""
    content = message.get("content")
    text = content if isinstance(content, str) else ""
    for key in REASONING:
        if isinstance(message.get(key), str) and message[key].strip():
            return message[key].strip(), text
    if message.get("role") == "assistant":
        for start, end in TAGS:
            if text.lstrip().startswith(start) and end in text:
                thoughts, _, answer = text.lstrip()[len(start) :].partition(end)
                return thoughts.strip(), answer.lstrip()
    return "", text


#: The tags that may surround reasoning in the content.
TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thinking>", "</thinking>"))
