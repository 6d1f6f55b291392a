"""Limits the memory used to read a file of rows, and raises errors for files that exceed the
limits.

A file may be untrusted, and a small file may decompress to a huge one. Therefore, rows are read in
pieces, and the constants below limit the size of a row and the amount of data that a file may
decompress to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, reason

MOST_BYTES = 16 << 20  # maximum bytes of a row: about four million tokens
#: The approximate overhead of a value in JSON and in Arrow, in bytes, in addition to its text.
#: Because it is counted for every value, the number of empty values is limited, too.
VALUE = 8
MOST_COLUMNS = 10_000
BLOCK = 4 << 20  # approximate bytes of rows in one block
#: A file may decompress to MOST_UNPACKED times its size plus SLACK bytes. Text usually compresses
#: to a tenth of its size, whereas zeros compress to a ten-thousandth.
MOST_UNPACKED, SLACK = 200, 64 << 20
#: The process that reads a table (tables.py) may use HELD bytes of memory, or HELD_TIMES times the
#: file's size if that is more, since a valid file may store all rows in one batch.
HELD, HELD_TIMES = 256 << 20, 10


@contextmanager
def told(path: Path | str) -> Iterator[None]:
    """Converts any exception in the context to an InputError about the file."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or reason(error)}.") from error
    except Exception as error:  # damaged files can cause any error
        raise InputError(f"{path} cannot be read: {reason(error).rstrip('.')}.") from error


def within(line: bytes, source: str) -> bytes:
    """Returns `line`, which contains a row. Raises InputError if the line is too long."""
    check_length(len(line), source)
    return line


def check_length(length: int, source: str) -> None:
    """Raises InputError if a row has too many bytes."""
    if length > MOST_BYTES:
        raise InputError(
            f"{source}: the row is larger than {MOST_BYTES >> 20} MiB; split it into several rows."
        )


def check_values(line: bytes, source: str) -> None:
    """Raises InputError if a line of JSON has so many values that parsing it would use too much
    memory: an empty object is 3 bytes of text, but 64 bytes in memory."""
    most = MOST_BYTES // VALUE
    if len(line) <= most or _values(line) <= most:
        return
    bare = line.replace(b"\\\\", b"").replace(b'\\"', b"")
    if sum(_values(part) for part in bare.split(b'"')[::2]) > most:  # outside strings
        raise InputError(
            f"{source}: the row has more than {most:,} values; split it into several rows."
        )


def _values(line: bytes) -> int:
    """Returns an upper bound on the number of values in a line of JSON."""
    return line.count(b",") + line.count(b"[") + line.count(b"{") + 1


def check_columns(name: str, count: int) -> None:
    if count > MOST_COLUMNS:
        raise InputError(
            f"{name} has more than {MOST_COLUMNS:,} columns; remove the unneeded columns."
        )


def check_growth(name: str, unpacked: int, size: int) -> None:
    """Raises InputError if a file of `size` bytes has decompressed to too many bytes."""
    if unpacked > SLACK + MOST_UNPACKED * size:
        raise InputError(
            f"{name} decompresses to more than {MOST_UNPACKED} times its size; if the file is "
            "valid, write it in another format."
        )
