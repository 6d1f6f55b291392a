"""The formats of rows: their keys, their checks, and their conversion to samples.

Each format is an entry in FORMATS. No other module depends on the content of a format's rows.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from typing import Any

from ..config import Rows
from ..errors import InputError, shown
from ..fields import fault_of_variables
from .chat import Sample
from .encoding import Encoder, Pair, Row
from .messages import checked_messages, expect, kind_of

#: Keys that every format reads in addition to its own.
ROW_KEYS = ("tools", "functions", "chat_template_kwargs")
PROMPT_KEYS = ("system", *ROW_KEYS)
SIDES = ("chosen", "rejected")
NOTHING: Mapping[str, str] = {}
#: The keys listed in the error message for a row of unknown format.
MAIN = (
    'of a supported format ("messages"; "prompt" and "completion"; "text"; "chosen" and '
    '"rejected"; see docs/data.md for others) or a mapping to such keys (option columns)'
)


@dataclass(frozen=True)
class Record:
    """A checked row of a format; `source` is "file:line".

    `row` is the result of the format's check. Its prompt and responses are either all strings, with
    an optional `system` string, or all lists of messages. `ignored` lists the keys that are not
    used.
    """

    source: str
    format: str
    row: dict[str, Any]
    ignored: tuple[str, ...] = ()


def checked(
    row: dict[str, Any],
    source: str,
    format: str = "auto",
    columns: Mapping[str, str] = NOTHING,
) -> Record:
    """Checks a row and returns its record. Raises InputError.

    If `format` (config.data_format) is auto, the row's format is the first format whose marks
    (Format.marks) the row contains. `columns` maps our names to the names of columns in the file
    (config.columns). A null value counts as absent, because every row of a table has every column.
    """
    row = _renamed(row, source, columns)
    there = {key for key, value in row.items() if value is not None}
    name = format if format != "auto" else _format_of(there) or _format_of(row.keys())
    if name is None or not set(FORMATS[name].marks) <= row.keys():
        needed = MAIN if name is None else quoted(FORMATS[name].marks)
        had = ", ".join(map(shown, [*row][:10])) + (", …" if len(row) > 10 else "") or "no keys"
        hint = _columns_for(row) if name is None and not columns else ""
        raise InputError(f"{source}: the row needs the keys {needed}, but has {had}.{hint}")
    found = FORMATS[name]
    read = row if found.reads_all else (*found.keys, *found.more)
    ignored = tuple(key for key in row if key in there and key not in read)
    # A check uses our names for the keys, but its error messages should use the names in the file.
    names = dict(zip(found.means, found.keys, strict=False))
    row = {**row, **{ours: row[key] for ours, key in names.items() if key in row}}
    try:
        if found.more:
            row = {**row, **_template_keys(row, source)}
        return Record(source, name, found.check(row, source), ignored)
    except InputError as error:
        said = str(error)
        for ours, theirs in (*names.items(), *columns.items()):
            said = said.replace(f'"{ours}"', f'"{theirs}"')
        raise InputError(said) from error


def _columns_for(row: Mapping[str, Any]) -> str:
    """Returns a hint for a row that has exactly two columns, both with text, and "" for other
    rows."""
    if len(row) != 2 or not all(isinstance(text, str) for text in row.values()):
        return ""
    own = json.dumps(dict(zip(("prompt", "completion"), row, strict=True)), ensure_ascii=False)
    own = shlex.quote(own)
    return f" To use them as prompt and completion: --columns {own}." if len(own) <= 200 else ""


def _renamed(row: dict[str, Any], source: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """Renames the columns of a row to our names. Raises InputError if a column is missing."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise InputError(
                f'{source}: the row has no column "{theirs}", but the option `columns` maps this '
                f'column to "{ours}".'
            )
    if not columns:
        return row
    rest = {key: row[key] for key in row if key not in columns.values()}
    return {**rest, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _format_of(keys: Set[str]) -> str | None:
    """Returns the first format whose marks are among the keys. The format "prompt" is never
    returned, because other formats have its keys too (see Options.format)."""
    known = ((name, own) for name, own in FORMATS.items() if "prompt" not in own.rows)
    return next((name for name, own in known if set(own.marks) <= keys), None)


def quoted(keys: Sequence[str]) -> str:
    """Joins keys, in quotes, for use in a sentence."""
    *others, last = (f'"{key}"' for key in keys)
    return f"{', '.join(others)} and {last}" if others else last


def _template_keys(row: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns the tools and template variables of a row. JSON text is decoded."""
    found = {}
    for key, kind in (("tools", list), ("functions", list), ("chat_template_kwargs", dict)):
        value = _listed(row.get(key))
        value = None if value == "" else value  # an empty cell
        if value is not None:
            expect(f'{source}: "{key}"', value, kind)
        found[key] = value
    if fault := fault_of_variables(found["chat_template_kwargs"] or {}):
        raise InputError(f'{source}: "chat_template_kwargs": {fault}.')
    if functions := found.pop("functions"):  # OpenAI's former name for "tools"
        own = [{"type": "function", "function": function} for function in functions]
        found["tools"] = [*(found["tools"] or ()), *own]
    return found


def _listed(value: Any) -> Any:
    """Returns a list or an object, decoded if it is JSON text."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            json.dumps(found, ensure_ascii=False).encode()  # rejects unpaired surrogates
            return found
    return value


def _decoded(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Decodes values that are JSON text with a list of messages, as in the cells of a table. Other
    text is not changed, even if it is JSON."""
    found = {key: value for key in keys if _is_turns(value := _listed(row.get(key)))}
    return {**row, **found}


def _is_turns(value: Any) -> bool:
    """Returns whether a value looks like a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(own, dict) and ("role" in own or {"from", "value"} <= own.keys())
            for own in value
        )
    )


def _check_text(row: dict[str, Any], source: str) -> dict[str, Any]:
    expect(f'{source}: "text"', row["text"], str)
    return row


def _check_chat(row: dict[str, Any], source: str) -> dict[str, Any]:
    messages = _messages(_listed(row["messages"]), f'{source}: "messages"')
    return {**row, "messages": _begun(row, messages, "messages", source)}


def _messages(given: Any, where: str) -> list[dict[str, Any]]:
    """Checks a list of messages, which may have "from" and "value" instead of "role" and
    "content"."""
    if isinstance(given, list):
        given = [_openai(own) if isinstance(own, dict) else own for own in given]
    return checked_messages(given, where)


def _openai(message: dict[str, Any]) -> dict[str, Any]:
    """Converts a message with "from" and "value" to one with "role" and "content"."""
    named = any(message.get(key) is not None for key in ("role", "content"))
    if named or not {"from", "value"} <= message.keys():
        return message
    rest = {key: x for key, x in message.items() if key not in ("from", "value")}
    return {**rest, "role": message["from"], "content": message["value"]}


def _check_instruction(row: dict[str, Any], source: str) -> dict[str, Any]:
    """Checks a row with an instruction and an optional input, which together form the prompt."""
    for key in ("prompt", "completion"):
        expect(f'{source}: "{key}"', row[key], str)
    about = [row[key] for key in ("input", "context") if row.get(key) is not None]
    for own in about:
        expect(f"{source}: the input of the instruction", own, str)
    prompt = "\n\n".join([row["prompt"], *filter(None, about)])
    return _with_system({**row, "prompt": prompt}, source)


#: The accepted labels, both as JSON values and as text in tables.
LABELS: dict[Any, bool] = {True: True, False: False, "true": True, "false": False}
LABELS |= {"1": True, "0": False}


def _check_labelled(row: dict[str, Any], source: str) -> dict[str, Any]:
    return {**_check_completion(row, source), "label": _label(row, source, "prompt-completion")}


def _check_labelled_chat(row: dict[str, Any], source: str) -> dict[str, Any]:
    """Checks a chat with a label for its last turn, and splits it into prompt and completion."""
    label = _label(row, source, "messages")
    row = _check_chat(row, source)
    *prompt, last = row["messages"]
    if last["role"] != "assistant" or all(own["role"] == "system" for own in prompt):
        raise InputError(
            f'{source}: "messages" must end with a user message and the assistant message that '
            '"label" rates.'
        )
    return {**row, "prompt": prompt, "completion": [last], "label": label}


def _label(row: dict[str, Any], source: str, plain: str) -> bool:
    """Returns the label of a row. If the label is invalid, the error suggests the format `plain`,
    which ignores labels."""
    label = row["label"]
    if isinstance(label, str):
        label = label.strip().lower()
    if not isinstance(label, str | bool | int) or label not in LABELS:
        raise InputError(
            f'{source}: "label" must be true for a desirable response and false for an undesirable '
            f"one; if this column means something else, set data_format to {plain}."
        )
    return LABELS[label]


def _check_prompt(row: dict[str, Any], source: str) -> dict[str, Any]:
    """Checks a row whose prompt is used to generate completions. The other keys are passed to
    reward functions."""
    row = _decoded(row, "prompt")
    if not isinstance(row["prompt"], str):
        messages = _turns(row, "prompt", source)
        if not messages or messages[-1]["role"] == "assistant":
            raise InputError(
                f'{source}: "prompt" must end with a message for the assistant to answer, such as '
                "a user message."
            )
        row = {**row, "prompt": messages}
    return _with_system(row, source)


def _check_completion(row: dict[str, Any], source: str) -> dict[str, Any]:
    row = _decoded(row, *PLAIN)
    if not (isinstance(row["prompt"], str) and isinstance(row["completion"], str)):
        row = {**row, **{key: _turns(row, key, source) for key in ("prompt", "completion")}}
        if not _answers(row["completion"]):
            raise InputError(
                f'{source}: "completion" has no assistant message, so there is nothing to train on.'
            )
    return _with_system(row, source)


def _check_pair(row: dict[str, Any], source: str) -> dict[str, Any]:
    row = _decoded(row, "prompt", *SIDES)
    if isinstance(row.get("prompt"), str):
        for key in SIDES:
            if not isinstance(row[key], str):
                kind = kind_of(row[key])
                raise InputError(
                    f'{source}: "prompt" is a string, so "{key}" must be a string too, not {kind}; '
                    f'if "{key}" also contains the prompt, remove "prompt".'
                )
    else:
        row = {**row, **_dialogues(row, source)}
    return _once(_with_system(row, source), source)


def _dialogues(row: dict[str, Any], source: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the prompt, the chosen response and the rejected response of a pair as messages."""
    sides = {key: _turns(row, key, source) for key in SIDES}
    if row.get("prompt") is not None:
        prompt = _turns(row, "prompt", source)
    else:  # the prompt is the common beginning of both sides
        n = _alike(*sides.values())
        prompt = sides["chosen"][:n]
        sides = {key: messages[n:] for key, messages in sides.items()}
    if not prompt:
        raise InputError(
            f'{source}: the pair has no prompt; add "prompt", or begin "chosen" and "rejected" '
            "with the same messages."
        )
    for key, messages in sides.items():
        if not _answers(messages):
            raise InputError(
                f'{source}: "{key}" adds no assistant message to the prompt; add a response.'
            )
    _check_whole([*prompt, *sides["chosen"], *sides["rejected"]], source)
    return {"prompt": prompt, **sides}


def _check_whole(messages: Sequence[dict[str, Any]], source: str) -> None:
    """Raises InputError if a message has "train" or "weight"."""
    if any("train" in message or "weight" in message for message in messages):
        raise InputError(
            f'{source}: "train" and "weight" have no effect on responses, which are compared as a '
            "whole; remove them."
        )


def _alike(a: list[Any], b: list[Any]) -> int:
    """Returns the length of the common prefix."""
    return [*(x == y for x, y in zip(a, b, strict=False)), False].index(False)


def _once(row: dict[str, Any], source: str) -> dict[str, Any]:
    """Removes the prompt from both responses if both repeat it. In the result, the key "repeated"
    is true if they did. Raises InputError if the responses are lists of messages and only one of
    them repeats the prompt, or if both responses are the same."""
    n, sides = len(row["prompt"]), {key: row[key] for key in SIDES}
    repeats = [n > 0 and own[:n] == row["prompt"] for own in sides.values()]
    messages = not isinstance(row["prompt"], str)
    if messages and any(repeats) and not all(repeats):
        raise InputError(
            f'{source}: "{"chosen" if repeats[0] else "rejected"}" repeats the prompt, but the '
            "other response does not; remove the repeated prompt."
        )
    if all(repeats):
        sides = {key: own[n:] for key, own in sides.items()}
    if sides["chosen"] == sides["rejected"]:
        raise InputError(
            f'{source}: "chosen" and "rejected" are identical, so there is nothing to prefer; '
            "remove the row."
        )
    return {**row, **sides, "repeated": all(repeats)}


def _turns(row: dict[str, Any], key: str, source: str) -> list[dict[str, Any]]:
    """Returns a prompt or a response as messages; a string becomes one message."""
    given, what = row[key], f'{source}: "{key}"'
    expect(what, given, str, list)
    if isinstance(given, str):
        return [{"role": "user" if key == "prompt" else "assistant", "content": given}]
    return _messages(given, what)


def _answers(messages: list[dict[str, Any]]) -> bool:
    """Returns whether any message is from the assistant."""
    return any(message["role"] == "assistant" for message in messages)


def _with_system(row: dict[str, Any], source: str) -> dict[str, Any]:
    """If the prompt is a list of messages, moves the text of "system" into it."""
    if isinstance(row["prompt"], str):
        if row.get("system") is not None:
            expect(f'{source}: "system"', row["system"], str)
        return {**row, "system": row.get("system") or None}  # "" is an empty cell
    return {**row, "prompt": _begun(row, row["prompt"], "prompt", source)}


def _begun(
    row: dict[str, Any], messages: list[dict[str, Any]], key: str, source: str
) -> list[dict[str, Any]]:
    """Returns the messages, preceded by a system message if the row has the key "system"."""
    system = row.get("system")
    if system is not None:
        expect(f'{source}: "system"', system, str)
    own = [message for message in messages if message["role"] in ("system", "developer")]
    if not system or (own and own[0] is messages[0] and own[0]["content"] == system):
        return messages
    if own:
        raise InputError(
            f'{source}: the row has "system" and a system message in "{key}"; remove one of them.'
        )
    return [{"role": "system", "content": system}, *messages]


def encode(encoder: Encoder, records: list[Record]) -> list[Row] | list[Pair]:
    """Tokenizes records without truncation. Pairs must not be mixed with other records. Raises
    InputError."""
    encoder.notes.rows += len(records)
    encoder.notes.formats.update(record.format for record in records)
    for record in records:
        encoder.notes.ignored.update(record.ignored)
    return FORMATS[records[0].format].encode(encoder, records)


def _rows(encoder: Encoder, records: list[Record]) -> list[Row]:
    return encoder.rows(
        [sample for own in records for sample in FORMATS[own.format].samples(encoder, own)]
    )


def _pairs(encoder: Encoder, records: list[Record]) -> list[Row] | list[Pair]:
    """Tokenizes pairs. For a method that learns from labels, each response becomes a row."""
    rows = _rows(encoder, [_side(record, key) for record in records for key in SIDES])
    for row, after in pairwise(rows):
        if row.source == after.source:
            raise _several(row.source)
    encoder.notes.repeated += sum(record.row["repeated"] for record in records)
    if encoder.options.labelled:
        sources = (record.source for record in records for _ in SIDES)
        signed = zip(rows, sources, cycle((1, -1)), strict=False)
        return [replace(own, weights=sign * own.weights, source=of) for own, of, sign in signed]
    pairs = zip(records, rows[::2], rows[1::2], strict=True)
    return [Pair.of(chosen, rejected, record.source) for record, chosen, rejected in pairs]


def _several(source: str) -> InputError:
    """Returns the error for a response that would become several samples."""
    return InputError(
        f"{source}: the chat template renders a turn of the response differently when other turns "
        "follow it; use responses that consist of a single assistant message."
    )


def _prompts(encoder: Encoder, records: list[Record]) -> list[Row]:
    return [encoder.prompt(record.source, record.row) for record in records]


def _side(record: Record, key: str) -> Record:
    """Returns a record whose completion is one of the two responses of a pair."""
    row = {**record.row, "completion": record.row[key]}
    return replace(record, source=f"{record.source} {key}", format="prompt-completion", row=row)


def _text_samples(encoder: Encoder, record: Record) -> list[Sample]:
    return [Sample(record.source, [(record.row["text"], 1.0)])]


def _chat_samples(encoder: Encoder, record: Record) -> list[Sample]:
    return encoder.chats.samples(record.source, record.row)


def _completion_samples(encoder: Encoder, record: Record) -> list[Sample]:
    """Returns the samples of a prompt and a completion; only the completion is in the loss."""
    row, notes = record.row, encoder.notes
    prompt, completion, system = row["prompt"], row["completion"], row.get("system")
    if isinstance(prompt, str):
        notes.prompt_format = "raw" if encoder.raw else "chat"
        if encoder.raw:
            if system:
                notes.ignored["system"] += 1
            return [Sample(record.source, [(prompt, 0.0), (completion, 1.0)])]
        before = [{"role": "system", "content": system}] if system else []
        prompt = [*before, {"role": "user", "content": prompt}]
        completion = [{"role": "assistant", "content": completion}]
    messages = [*({**message, "train": False} for message in prompt), *completion]
    return encoder.responses.samples(record.source, {**row, "messages": messages})


def _judged(plain: Callable[[Encoder, Record], list[Sample]]) -> Any:
    """Returns a function that creates the samples of a row with a label. If the method does not
    learn from labels, only rows with desirable responses yield samples, which `plain` creates.
    Otherwise, all rows yield samples, and the weights of an undesirable response are below 0."""

    def samples(encoder: Encoder, record: Record) -> list[Sample]:
        wanted = record.row["label"]
        if not encoder.options.labelled:
            encoder.notes.unwanted += not wanted
            return plain(encoder, record) if wanted else []
        own = [record.row[key] for key in PLAIN]
        _check_whole([x for given in own if isinstance(given, list) for x in given], record.source)
        found = _completion_samples(encoder, record)
        if len(found) > 1:
            raise _several(record.source)
        signed = [[(text, w if wanted else -w) for text, w in sample.pieces] for sample in found]
        return [replace(own, pieces=x) for own, x in zip(found, signed, strict=True)]

    return samples


@dataclass(frozen=True)
class Format:
    """A format of rows, recognized by the keys `marks` (default: all of its keys).

    `means` lists the names that `check` uses for the keys, if they differ from `keys`. `more` lists
    the other keys that are read. `check` returns the row in the form that `encode` expects, or
    raises InputError. `encode` tokenizes records of this format and of other formats with the same
    `encode`. By default, it tokenizes the samples that each record's format creates with `samples`.
    `rows` lists the kinds of rows (config.ROWS) for which the format can be used; rows of the first
    kind use all keys of the format. With `reads_all`, all other keys are stored with the row.
    """

    check: Callable[[dict[str, Any], str], dict[str, Any]]
    keys: tuple[str, ...]
    more: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    means: tuple[str, ...] = ()
    rows: tuple[Rows, ...] = ("single",)
    encode: Callable[[Encoder, list[Record]], list[Row] | list[Pair]] = _rows
    samples: Callable[[Encoder, Record], list[Sample]] = _completion_samples
    reads_all: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "marks", self.marks or self.keys)


def _plain(prompt: str, completion: str) -> Format:
    """Returns a format that reads the prompt and the completion from these keys."""
    return Format(_check_completion, (prompt, completion), PROMPT_KEYS, means=PLAIN)


def _labelled_chat(key: str) -> Format:
    """Returns a format that reads messages from this key, and a label for the last message."""
    return Format(
        _check_labelled_chat,
        (key, "label"),
        PROMPT_KEYS,
        means=("messages", "label"),
        rows=("labelled", "single"),
        samples=_judged(_chat_samples),
    )


PLAIN = ("prompt", "completion")
#: Every format by name, in the order in which formats are tried.
FORMATS: dict[str, Format] = {
    "preference": Format(
        _check_pair,
        ("prompt", *SIDES),
        PROMPT_KEYS,
        marks=SIDES,
        rows=("pair", "labelled"),
        encode=_pairs,
    ),
    "kto": Format(
        _check_labelled,
        (*PLAIN, "label"),
        PROMPT_KEYS,
        rows=("labelled", "single"),
        samples=_judged(_completion_samples),
    ),
    "kto-messages": _labelled_chat("messages"),
    "kto-sharegpt": _labelled_chat("conversations"),
    "messages": Format(_check_chat, ("messages",), PROMPT_KEYS, samples=_chat_samples),
    "sharegpt": Format(
        _check_chat, ("conversations",), PROMPT_KEYS, means=("messages",), samples=_chat_samples
    ),
    "prompt-completion": _plain(*PLAIN),
    "alpaca": Format(
        _check_instruction, ("instruction", "output"), ("input", *PROMPT_KEYS), means=PLAIN
    ),
    "instruction-response": Format(
        _check_instruction,
        ("instruction", "response"),
        ("input", "context", *PROMPT_KEYS),
        means=PLAIN,
    ),
    "question-answer": _plain("question", "answer"),
    "prompt-response": _plain("prompt", "response"),
    "input-output": _plain("input", "output"),
    "text": Format(_check_text, ("text",), samples=_text_samples),
    "prompt": Format(
        _check_prompt, ("prompt",), PROMPT_KEYS, rows=("prompt",), encode=_prompts, reads_all=True
    ),
}
