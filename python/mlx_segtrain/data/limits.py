"""Limits on the memory that a file of rows may take, and the errors for files beyond them.

A file may be untrusted, and a small one may unpack to a huge one. Memory is bounded by
constants: rows are read in pieces, a row has a limit, and so has what a format unpacks in one go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, reason

MOST_BYTES = 16 << 20  # of a row: four million tokens
#: What a value takes besides text, about, as JSON and in Arrow: a row of empty objects has a limit.
VALUE = 8
MOST_COLUMNS = 10_000
BLOCK = 4 << 20  # bytes of rows that go into one block, about
#: What may become of a byte of a file: compressed text comes to ten, zeros to ten thousand.
MOST_UNPACKED, SLACK = 200, 64 << 20
#: Memory of the process that reads a table (tables.py): bytes, or times the file's size if that
#: is more, since an honest file may have all of its rows in one batch.
HELD, HELD_TIMES = 256 << 20, 10


@contextmanager
def told(path: Path | str) -> Iterator[None]:
    """Turns a failure in the context into an InputError about the file."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or reason(error)}.") from error
    except Exception as error:  # Arrow's own, MemoryError, and what a broken file makes of them
        raise InputError(f"{path} cannot be read: {reason(error).rstrip('.')}.") from error


def within(line: bytes, source: str) -> bytes:
    """Returns the line of a row. Raises InputError if it is too long."""
    check_length(len(line), source)
    return line


def check_length(length: int, source: str) -> int:
    """Returns the bytes of a row. Raises InputError if there are too many."""
    if length > MOST_BYTES:
        raise InputError(
            f"{source}: the row has more than {MOST_BYTES >> 20} MiB; split it into several."
        )
    return length


def check_values(line: bytes, source: str) -> None:
    """Raises InputError if a line of JSON has so many values that parsing them would take much
    memory: an empty object has three bytes, and takes 64."""
    most = MOST_BYTES // VALUE
    if len(line) <= most or _values(line) <= most:
        return
    bare = line.replace(b"\\\\", b"").replace(b'\\"', b"")
    if sum(_values(part) for part in bare.split(b'"')[::2]) > most:  # outside of strings
        raise InputError(f"{source}: the row has more than {most:,} values; split it into several.")


def _values(line: bytes) -> int:
    """Counts the values of a line of JSON, as an upper bound."""
    return line.count(b",") + line.count(b"[") + line.count(b"{") + 1


def check_columns(name: str, count: int) -> None:
    if count > MOST_COLUMNS:
        raise InputError(
            f"{name} has more than {MOST_COLUMNS:,} columns; leave out the unneeded ones."
        )


def check_growth(name: str, unpacked: int, size: int) -> None:
    """Raises InputError if a file of this size unpacks to too many bytes."""
    if unpacked > SLACK + MOST_UNPACKED * size:
        raise InputError(
            f"{name} unpacks to more than {MOST_UNPACKED} times its size; write it in another "
            "format if that is right."
        )
