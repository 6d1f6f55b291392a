"""Checks the messages of a row and converts them to a common form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import InputError, shown

Message = Mapping[str, Any]

#: The keys under which a message may store reasoning.
ReasoningKey = Literal["reasoning_content", "reasoning", "thinking"]
REASONING: tuple[str, ...] = get_args(ReasoningKey)
MAX_WEIGHT = 1e6  # far larger than any sensible weight; sums of losses stay finite in float32
#: The roles of messages, and the names that other data sets use for them.
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "model", "ai", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("function", "ipython", "observation"), "tool"),
}


@dataclass(frozen=True)
class Other:
    """A value that JSON cannot represent, such as a time or an image; `kind` is its Arrow type."""

    kind: str


#: Names of JSON's types, for error messages.
KINDS: dict[type, str] = {
    **{dict: "an object", list: "a list", str: "a string", bool: "true or false"},
    **{int: "a number", float: "a number", type(None): "null or missing"},
}


def kind_of(value: Any) -> str:
    """Returns the type of a value in a row, in words."""
    return f"a {value.kind}" if isinstance(value, Other) else KINDS[type(value)]


def expect(what: str, value: Any, *kinds: type) -> None:
    """Raises InputError unless the type of the value is one of `kinds`. The error message refers to
    the value as `what`."""
    if type(value) not in kinds:
        wanted = " or ".join(dict.fromkeys(KINDS[kind] for kind in kinds))
        raise InputError(f"{what} must be {wanted}, not {kind_of(value)}.")


def checked_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """Checks a list of messages and converts them to a common form. Raises InputError."""
    expect(where, messages, list)
    return [_checked(message, f"{where}[{i}]") for i, message in enumerate(messages)]


def _checked(message: Any, where: str) -> dict[str, Any]:
    expect(where, message, dict)
    role = message.get("role")
    if not isinstance(role, str):
        raise InputError(f'{where} must have a "role" string, such as "user" or "assistant".')
    known = role.strip().lower()
    known = OTHER_ROLES.get(known, known)
    if known not in ROLES:
        raise InputError(f"{where}: the role {shown(role)} is not one of {', '.join(ROLES)}.")
    # In a table, every row has every column, so null means absent.
    empty = [key for key, value in message.items() if value is None and key != "content"]
    message = {key: value for key, value in message.items() if key not in empty} | {"role": known}
    message = _with_calls(message, where)
    train, weight = message.get("train", True), message.get("weight", 1)
    expect(f'{where}: "train"', train, bool)
    expect(f'{where}: "weight"', weight, int, float)
    if not 0 <= weight <= MAX_WEIGHT:  # false for NaN, which Python's json accepts
        raise InputError(f'{where}: "weight" must be from 0 to {MAX_WEIGHT:g}.')
    asked = train and weight > 0 and ("train" in message or "weight" in message)
    if known != "assistant" and asked:
        raise InputError(
            f'{where} sets "train" or "weight", but its role is "{known}" and only "assistant" '
            'messages can be in the loss; remove "train" and "weight".'
        )
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "".join(_part(part, where) for part in content)}
    if content is not None or not message.get("tool_calls"):  # messages with calls may lack content
        expect(f'{where}: "content"', content, str)
    return message


def _with_calls(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Checks the tool calls of a message, and converts the legacy OpenAI key "function_call" to a
    tool call."""
    if "function_call" in message and "tool_calls" not in message:
        call = message.pop("function_call")
        message["tool_calls"] = [{"type": "function", "function": call}]
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f'{where}: "tool_calls" must be a list of objects.')
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(
                f'{where}: every tool call must contain the "name" of a function, as a string.'
            )
    for key in REASONING:
        expect(f'{where}: "{key}"', message.get(key, ""), str)
    return message


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    named = isinstance(part, dict) and "type" in part
    kind = shown(part["type"]) if named else kind_of(part)
    raise InputError(
        f'{where}: "content" has a part of type {kind}; only {{"type": "text", "text": "..."}} '
        "parts are supported."
    )
