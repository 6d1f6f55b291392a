"""Reading JSONL rows and checking their shape, so that later code can rely on it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_segtrain.errors import InputError
from mlx_segtrain.files import open_regular

PAIR_KEYS = '"prompt", "chosen" and "rejected"'
KEYS = f'"messages", "prompt" and "completion", "text", or {PAIR_KEYS}'
MOST_BYTES = 16 << 20  # of a row: four million tokens; parsed, it takes up to sixty times as much
MAX_WEIGHT = 1e6  # far above any use, and sums of losses stay finite in float32


@dataclass(frozen=True)
class Record:
    """One checked row; `source` is "file:line".

    `format` is messages | prompt-completion | text | preference. Of the last, prompt, chosen and
    rejected are all strings, or all lists of messages.
    """

    source: str
    format: str
    row: dict[str, Any]


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
                    yield Record(source, *_check(row, source))
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


def _check(row: dict[str, Any], source: str) -> tuple[str, dict[str, Any]]:
    if "chosen" in row and "rejected" in row:
        return "preference", _check_pair(row, source)
    if "messages" in row:
        _check_tools(row, source)
        return "messages", {**row, "messages": _check_messages(row, "messages", source)}
    if "prompt" in row and "completion" in row:
        _check_strings(row, ("prompt", "completion"), source)
        return "prompt-completion", row
    if "text" in row:
        _check_strings(row, ("text",), source)
        return "text", row
    found = ", ".join(map(repr, row)) or "no keys"
    raise InputError(f"{source}: the row needs the keys {KEYS}, but has {found}.")


def _check_pair(row: dict[str, Any], source: str) -> dict[str, Any]:
    if isinstance(row.get("prompt"), str):
        for key in ("chosen", "rejected"):
            if not isinstance(row[key], str):
                raise InputError(
                    f'{source}: "{key}" must be a string as "prompt" is, not {_kind(row[key])}; '
                    f'if "{key}" holds the prompt too, remove "prompt".'
                )
        return row
    _check_tools(row, source)
    sides = {
        # A string behind messages is what the assistant says.
        key: [{"role": "assistant", "content": row[key]}]
        if isinstance(row[key], str)
        else _check_messages(row, key, source, "a string or a list")
        for key in ("chosen", "rejected")
    }
    if "prompt" in row:
        prompt = _check_messages(row, "prompt", source, "a string or a list")
    else:  # what both begin with
        alike = [a == b for a, b in zip(*sides.values(), strict=False)]
        n = [*alike, False].index(False)
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
    return {**row, "prompt": prompt, **sides}


def _check_tools(row: dict[str, Any], source: str) -> None:
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise InputError(f'{source}: "tools" must be a list, not {_kind(tools)}.')


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


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = f'"{part["type"]}"' if isinstance(part, dict) and "type" in part else _kind(part)
    raise InputError(
        f'{where}: "content" has a part of type {kind}; only {{"type": "text", "text": "..."}} '
        "parts are read."
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null or missing" if value is None else names.get(type(value), "a number")
