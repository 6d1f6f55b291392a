"""Reading JSONL rows and checking their shape, so that later code can rely on it."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_segtrain.config import Rows
from mlx_segtrain.errors import InputError, shown
from mlx_segtrain.fields import fault_of_variables
from mlx_segtrain.files import open_regular

#: The keys by which messages carry reasoning.
REASONING = ("reasoning_content", "reasoning", "thinking")

MOST_BYTES = 16 << 20  # of a row: four million tokens; parsed, it takes up to sixty times as much
MAX_WEIGHT = 1e6  # far above any use, and sums of losses stay finite in float32
#: The roles that messages have, and names for them in other data sets.
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "model", "ai", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("function", "ipython", "observation"), "tool"),
}
#: What a format reads besides its own keys.
ROW_KEYS = ("tools", "functions", "chat_template_kwargs")
PROMPT_KEYS = ("system", *ROW_KEYS)


@dataclass(frozen=True)
class Record:
    """One checked row; `source` is "file:line".

    `format` is messages | prompt-completion | text | preference. Prompt and responses of the second
    and the last are all strings, beside which there may be a `system` string, or all lists of
    messages. `ignored` are the row's keys that nothing reads; `repeated` tells that both sides of a
    pair began with the prompt once more, which `row` has once.
    """

    source: str
    format: str
    row: dict[str, Any]
    ignored: tuple[str, ...] = ()
    repeated: bool = False


def read_records(path: Path) -> Iterator[Record]:
    """Yields the rows of a JSONL file in order; raises InputError with file and line."""
    try:
        # Bytes, split at \n alone: decoding the file as one text would lose the line of an error.
        with open_regular(path) as file:
            # Not `for line in file`, which reads a line whatever its length.
            for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES + 1), b""), 1):
                if len(line) > MOST_BYTES:
                    raise InputError(
                        f"{path.name}:{number}: the row has more than {MOST_BYTES >> 20} MiB; "
                        "split it into several."
                    )
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    source = f"{path.name}:{number}"
                    row = _parse(line, source)
                    yield checked(row, source)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _parse(line: bytes, source: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
        # JSON may spell half of a surrogate pair, which no tokenizer takes.
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8."
        ) from error
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: the row holds a lone surrogate (\\ud800 to \\udfff), not a character; "
            "remove it."
        ) from error
    except RecursionError as error:
        raise InputError(f"{source}: the row is nested too deeply; flatten it.") from error
    except ValueError as error:
        raise InputError(
            f"{source}: the line is not JSON ({error}); each line must hold one object."
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{source}: the row must be a JSON object, not {_kind(row)}.")
    return row


def checked(row: dict[str, Any], source: str) -> Record:
    """A row as a record; raises InputError."""
    found = next((own for own in FORMATS.values() if set(own.marks) <= row.keys()), None)
    if found is None:
        had = ", ".join(map(repr, row)) or "no keys"
        first, *others = (quoted(own.keys) for own in FORMATS.values())
        keys = ", ".join((*others, f"or {first}"))
        raise InputError(f"{source}: the row needs the keys {keys}, but has {had}.")
    ignored = tuple(key for key in row if key not in (*found.keys, *found.more))
    if found.more:
        row = {**row, **_template_keys(row, source)}
    own, repeated = found.check(row, source), False
    if found.rows == "pair":
        own, repeated = _once(own, source)
    return Record(source, found.name, own, ignored, repeated)


def _template_keys(row: dict[str, Any], source: str) -> dict[str, Any]:
    """Tools and template variables of a row, decoded where they are JSON text."""
    found = {}
    for key, kind, wanted in (
        ("tools", list, "a list"),
        ("functions", list, "a list"),
        ("chat_template_kwargs", dict, "an object"),
    ):
        value = row.get(key)
        if isinstance(value, str):
            with suppress(ValueError):
                value = json.loads(value)
        if value is not None and not isinstance(value, kind):
            raise InputError(f'{source}: "{key}" must be {wanted}, not {_kind(value)}.')
        found[key] = value
    if fault := fault_of_variables(found["chat_template_kwargs"] or {}):
        raise InputError(f'{source}: "chat_template_kwargs": {fault}.')
    if functions := found.pop("functions"):  # OpenAI's name before "tools"
        own = [{"type": "function", "function": function} for function in functions]
        found["tools"] = [*(found["tools"] or ()), *own]
    return found


def _check_text(row: dict[str, Any], source: str) -> dict[str, Any]:
    _check_strings(row, ("text",), source)
    return row


def _check_chat(row: dict[str, Any], source: str) -> dict[str, Any]:
    return {**row, "messages": _check_messages(row, "messages", source)}


def _check_completion(row: dict[str, Any], source: str) -> dict[str, Any]:
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        _check_system(row, source)
        return row
    sides = {key: _check_turns(row, key, source) for key in ("prompt", "completion")}
    if all(message["role"] != "assistant" for message in sides["completion"]):
        raise InputError(f'{source}: "completion" has no assistant message, so nothing to train.')
    return _with_system({**row, **sides}, source)


def _check_turns(row: dict[str, Any], key: str, source: str) -> list[dict[str, Any]]:
    """A prompt or a response as messages: a string is what the user or the assistant says."""
    if isinstance(row[key], str):
        role = "user" if key == "prompt" else "assistant"
        return [{"role": role, "content": row[key]}]
    return _check_messages(row, key, source, "a string or a list")


def _check_system(row: dict[str, Any], source: str) -> None:
    if row.get("system") is not None:
        _check_strings(row, ("system",), source)


def _with_system(row: dict[str, Any], source: str) -> dict[str, Any]:
    """A row whose prompt is a list of messages, with the text of "system" as the first of them."""
    _check_system(row, source)
    system = row.pop("system", None)
    if not system:
        return row
    if any(message["role"] in ("system", "developer") for message in row["prompt"]):
        raise InputError(
            f'{source}: the row has "system" and a system message in "prompt"; remove one of them.'
        )
    return {**row, "prompt": [{"role": "system", "content": system}, *row["prompt"]]}


def _check_pair(row: dict[str, Any], source: str) -> dict[str, Any]:
    if isinstance(row.get("prompt"), str):
        for key in ("chosen", "rejected"):
            if not isinstance(row[key], str):
                raise InputError(
                    f'{source}: "{key}" must be a string as "prompt" is, not {_kind(row[key])}; '
                    f'if "{key}" holds the prompt too, remove "prompt".'
                )
        _check_system(row, source)
        return row
    sides = {key: _check_turns(row, key, source) for key in ("chosen", "rejected")}
    if "prompt" in row:
        prompt = _check_messages(row, "prompt", source, "a string or a list")
    else:  # what both begin with
        n = _alike(*sides.values())
        prompt = sides["chosen"][:n]
        sides = {key: messages[n:] for key, messages in sides.items()}
    if not prompt:
        raise InputError(
            f'{source}: the pair has no prompt; give "prompt", or begin "chosen" and "rejected" '
            "with the same messages."
        )
    for key, messages in sides.items():
        if all(message["role"] != "assistant" for message in messages):
            raise InputError(
                f'{source}: "{key}" has no assistant message of its own; let a response follow '
                "the prompt."
            )
    for message in (*prompt, *sides["chosen"], *sides["rejected"]):
        if "train" in message or "weight" in message:
            raise InputError(
                f'{source}: "train" and "weight" have no effect in a pair, whose responses are '
                "compared as a whole; remove them."
            )
    return _with_system({**row, "prompt": prompt, **sides}, source)


def _alike(a: list[Any], b: list[Any]) -> int:
    """How many items both begin with."""
    return [*(x == y for x, y in zip(a, b, strict=False)), False].index(False)


def _once(row: dict[str, Any], source: str) -> tuple[dict[str, Any], bool]:
    """A pair whose prompt stands once, and whether both sides repeated it; InputError if only one
    side does, or both sides are the same."""
    n, sides = len(row["prompt"]), {key: row[key] for key in ("chosen", "rejected")}
    repeats = [n > 0 and own[:n] == row["prompt"] for own in sides.values()]
    messages = not isinstance(row["prompt"], str)
    if messages and any(repeats) and not all(repeats):
        raise InputError(
            f'{source}: "{"chosen" if repeats[0] else "rejected"}" repeats the prompt, and the '
            "other side does not; remove the prompt from it."
        )
    if all(repeats):
        sides = {key: own[n:] for key, own in sides.items()}
    if sides["chosen"] == sides["rejected"]:
        raise InputError(
            f'{source}: "chosen" and "rejected" are the same, so there is nothing to prefer; '
            "remove the row."
        )
    return {**row, **sides}, all(repeats)


def _check_messages(
    row: dict[str, Any], key: str, source: str, wanted: str = "a list"
) -> list[dict[str, Any]]:
    messages = row[key]
    if not isinstance(messages, list):
        raise InputError(f'{source}: "{key}" must be {wanted}, not {_kind(messages)}.')
    return [
        _check_message(message, f'{source}: "{key}"[{i}]') for i, message in enumerate(messages)
    ]


def _check_strings(row: dict[str, Any], keys: tuple[str, ...], source: str) -> None:
    for key in keys:
        if not isinstance(row[key], str):
            raise InputError(f'{source}: "{key}" must be a string, not {_kind(row[key])}.')


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InputError(f"{where} must be an object, not {_kind(message)}.")
    role = message.get("role")
    if not isinstance(role, str):
        raise InputError(f'{where} needs "role", a string such as "user" or "assistant".')
    known = role.strip().lower()
    known = OTHER_ROLES.get(known, known)
    if known not in ROLES:
        raise InputError(f"{where}: the role {shown(role)} is not one of {', '.join(ROLES)}.")
    # Tables have every column in every row: null is what is not there.
    empty = [key for key, value in message.items() if value is None and key != "content"]
    message = {key: value for key, value in message.items() if key not in empty} | {"role": known}
    role, message = known, _with_calls(message, where)
    train = message.get("train", True)
    if not isinstance(train, bool):
        raise InputError(f'{where}: "train" must be true or false, not {_kind(train)}.')
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise InputError(f'{where}: "weight" must be a number, not {_kind(weight)}.')
    if not 0 <= weight <= MAX_WEIGHT:  # false for NaN, which Python's json reads
        raise InputError(f'{where}: "weight" must be from 0 to {MAX_WEIGHT:g}.')
    asked = train and weight > 0 and ("train" in message or "weight" in message)
    if role != "assistant" and asked:
        raise InputError(
            f'{where} asks to be trained, but its role is "{role}" and only "assistant" messages '
            'are trained; remove "train" and "weight".'
        )
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "".join(_part(part, where) for part in content)}
    # A message that only calls tools has no content.
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise InputError(f'{where}: "content" must be a string, not {_kind(content)}.')
    return message


def _with_calls(message: dict[str, Any], where: str) -> dict[str, Any]:
    """With tool calls that are well formed; OpenAI's earlier "function_call" as one of them."""
    if "function_call" in message and "tool_calls" not in message:
        call = message.pop("function_call")
        message["tool_calls"] = [{"type": "function", "function": call}]
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f'{where}: "tool_calls" must be a list of objects.')
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f'{where}: a tool call needs the "name" of a function.')
    for key in REASONING:
        if not isinstance(message.get(key, ""), str):
            raise InputError(f'{where}: "{key}" must be a string, not {_kind(message[key])}.')
    return message


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = shown(part["type"]) if isinstance(part, dict) and "type" in part else _kind(part)
    raise InputError(
        f'{where}: "content" has a part of type {kind}; only {{"type": "text", "text": "..."}} '
        "parts are read."
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null or missing" if value is None else names.get(type(value), "a number")


@dataclass(frozen=True)
class Format:
    """A form of rows, by its keys; those that have the keys `marks` (default: all) are of it.

    `more` are the other keys that are read; `check` gives the row as the encoder takes it, or
    raises InputError; `rows` is what a method calls such a row (config.ROWS).
    """

    name: str
    check: Callable[[dict[str, Any], str], dict[str, Any]]
    keys: tuple[str, ...]
    more: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    rows: Rows = "single"

    def __post_init__(self) -> None:
        object.__setattr__(self, "marks", self.marks or self.keys)


def quoted(keys: Sequence[str]) -> str:
    """Keys in a sentence."""
    *others, last = (f'"{key}"' for key in keys)
    return f"{', '.join(others)} and {last}" if others else last


#: Every form, by name; a row is of the first whose marks it has.
FORMATS = {
    own.name: own
    for own in (
        Format(
            "preference",
            _check_pair,
            ("prompt", "chosen", "rejected"),
            PROMPT_KEYS,
            marks=("chosen", "rejected"),
            rows="pair",
        ),
        Format("messages", _check_chat, ("messages",), ROW_KEYS),
        Format("prompt-completion", _check_completion, ("prompt", "completion"), PROMPT_KEYS),
        Format("text", _check_text, ("text",)),
    )
}
