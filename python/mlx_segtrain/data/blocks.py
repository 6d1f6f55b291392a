"""Defines blocks of rows, the units of data that processes exchange, and parses the rows of a
block."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from . import limits
from .limits import check_values, told, within
from .messages import KINDS, Other

Row = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A group of rows that a process handles as a unit: a few MB, in a form that can be pickled.

    `first` is the number of the block's first row or line in the file `name`; `size` is the number
    of bytes that were read for the block; `payload` contains lines of JSON, or an Arrow stream
    (arrow.py).
    """

    name: str
    first: int
    size: int
    payload: bytes
    kind: Literal["lines", "arrow"] = "lines"

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yields each row together with its name, such as "train.jsonl:17". Raises InputError."""
        return _parse_lines(self) if self.kind == "lines" else _parse_arrow(self)


def grouped(
    lines: Iterable[bytes], name: str, read: Callable[[], int] | None = None
) -> Iterator[Block]:
    """Groups lines into blocks. Each line is a row. `read` returns the number of bytes read since
    it was last called. Without `read`, the size of a block is the size of its lines."""
    first, size, own = 1, 0, []

    def block() -> Block:
        return Block(name, first, read() if read else size, b"\n".join(own))

    for line in lines:
        if own and size + len(line) > limits.BLOCK:
            yield block()
            first, size, own = first + len(own), 0, []
        own.append(line)
        size += len(line) + 1
    if own:
        yield block()


def _parse_lines(block: Block) -> Iterator[tuple[str, Row]]:
    lines = block.payload.split(b"\n") if block.payload.strip() else ()
    for number, line in enumerate(lines, block.first):
        if line.strip():
            source = f"{block.name}:{number}"
            check_values(within(line, source), source)
            yield source, _parse(line, source)


def _parse(line: bytes, source: str) -> Row:
    try:
        row = json.loads(line.decode())
        # JSON may contain an unpaired surrogate, which no tokenizer accepts.
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: byte {error.start + 1} of the line is not valid UTF-8; save the file as "
            "UTF-8."
        ) from error
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: the row contains a lone surrogate (\\ud800 to \\udfff), which is not a "
            "valid character; remove it."
        ) from error
    except RecursionError as error:
        raise InputError(f"{source}: the row is nested too deeply; flatten it.") from error
    except ValueError as error:
        raise InputError(
            f"{source}: the line is not valid JSON ({error}); each line must be one JSON object."
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{source}: the row must be a JSON object, not {KINDS[type(row)]}.")
    return row


#: The key under which a field's metadata stores the original type of its column, if arrow.py
#: replaced the column with booleans because JSON cannot represent its values.
OTHER = b"other"


def _parse_arrow(block: Block) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa

    with told(block.name):
        number = block.first
        for batch in pa.ipc.open_stream(block.payload):
            names = batch.schema.names
            columns = [
                _readable(column, (field.metadata or {}).get(OTHER))
                for column, field in zip(batch.columns, batch.schema, strict=True)
            ]
            for i in range(batch.num_rows):
                values = zip(names, columns, strict=True)
                yield f"{block.name}:{number}", {name: own(i) for name, own in values}
                number += 1


def _readable(column: Any, other: bytes | None) -> Callable[[int], Any]:
    """Returns a function that maps the index of a row to its value in this column. If the column
    was replaced with booleans, `other` is its original type."""
    if other is None:
        return lambda i: column[i].as_py()
    value = Other(other.decode())
    return lambda i: value if column[i].as_py() else None
