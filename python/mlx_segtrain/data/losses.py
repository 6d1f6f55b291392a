"""Finds the parts of a row that are missing from its rendering."""

import json
from collections.abc import Iterator
from typing import Any

from .messages import Message
from .spelling import arguments, reasoning


def missing(rendered: str, message: Message, earlier: bool = False) -> Iterator[str]:
    """Yields findings (notes.FINDINGS) about the parts of a message that are missing from its
    rendering. Missing reasoning of an `earlier` turn is not a finding, because templates drop it on
    purpose."""
    thoughts, answer = reasoning(message)
    if not earlier and not _holds(rendered, thoughts):
        yield "reasoning"
    if not _holds(rendered, answer):
        yield "result" if message["role"] == "tool" else "text"
    for call in message.get("tool_calls") or ():
        if not _holds_call(rendered, call):
            yield "call"


def missing_tools(rendered: str, tools: Any) -> Iterator[str]:
    """Yields a finding for each tool whose definition is missing from the rendering."""
    for tool in tools or ():
        name = tool.get("function", tool).get("name") if isinstance(tool, dict) else None
        if name and name not in rendered:
            yield "tools"


#: The beginning of a list of content parts in Python's or JSON's notation. A rendering contains it
#: if the template writes the list as text.
PARTS = ("[{'type': 'text', 'text': ", '[{"type": "text", "text": ')


def _holds(rendered: str, text: str) -> bool:
    """Returns whether the rendering contains a text, unchanged or as part of a JSON string."""
    text = text.strip()
    if text and any(part in rendered and part not in text for part in PARTS):
        return False
    if text in rendered:
        return True
    if any(json.dumps(text, ensure_ascii=x)[1:-1] in rendered for x in (True, False)):
        return True
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict | list) and _holds_value(rendered, value)


def _holds_call(rendered: str, call: Message) -> bool:
    """Returns whether the rendering contains a tool call with its arguments, either as JSON or as
    separate values. Arguments in Python's notation, or as JSON within a JSON string, are not
    accepted."""
    name, given = call.get("function", call)["name"], arguments(call)
    if name and name not in rendered:
        return False
    if not isinstance(given, dict):
        return given is None or str(given) in rendered
    if given and repr(given) in rendered and repr(given) not in json.dumps(given):
        return False
    quoted = json.dumps(json.dumps(given))[1:-1]
    if given and quoted != json.dumps(given) and quoted in rendered:
        return False
    return _holds_value(rendered, given)


def _holds_value(rendered: str, value: Any) -> bool:
    """Returns whether the rendering contains every key and every leaf of a JSON value."""
    if isinstance(value, dict):
        return all(
            _holds(rendered, str(key)) and _holds_value(rendered, own) for key, own in value.items()
        )
    if isinstance(value, list):
        return all(_holds_value(rendered, own) for own in value)
    if isinstance(value, str):
        return _holds(rendered, value)
    return json.dumps(value) in rendered or str(value) in rendered
