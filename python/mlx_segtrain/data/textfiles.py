"""Reads text files as blocks of lines: JSON lines, JSON lists, CSV and TSV."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError
from ..files import open_regular
from . import limits
from .blocks import Block, grouped
from .limits import check_columns, check_growth, check_values, within

PACKED = {".gz": "gzip", ".zst": "zstd"}


class _Unpacked(io.RawIOBase):
    """The decompressed content of a file. Raises InputError if the content is so large that the
    file may be a decompression bomb."""

    def __init__(self, file: BinaryIO, codec: str, size: int, name: str):
        import pyarrow as pa

        self._stream: Any = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec)
        self._unpacked, self._size, self._name = 0, size, name

    def close(self) -> None:
        # Frees the stream's large buffers, since an exception may keep this object alive for some
        # time.
        self._stream = None
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = self._stream.readinto(buffer)  # read() loses data if an error follows
        self._unpacked += got
        check_growth(self._name, self._unpacked, self._size)
        return got


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Opens a file and decompresses it. Yields the content, and a function that returns the number
    of bytes of the file that have been read since the function was last called."""
    with open_regular(path) as raw:
        told = 0

        def read() -> int:
            nonlocal told
            before, told = told, raw.tell()
            return told - before

        codec = PACKED.get(path.suffix.lower())
        if codec is None:
            yield raw, read
        else:
            unpacked = _Unpacked(raw, codec, path.stat().st_size, path.name)
            with io.BufferedReader(unpacked, 1 << 16) as file:
                yield file, read  # type: ignore[misc]


def read_lines(path: Path) -> Iterator[Block]:
    """Yields the blocks of a file of JSON lines."""
    with _opened(path) as (file, read):
        yield from _whole_lines(file, read, path.name)


def _whole_lines(file: BinaryIO, read: Callable[[], int], name: str) -> Iterator[Block]:
    first = 1
    while payload := file.read(limits.BLOCK):
        if not payload.endswith(b"\n"):
            payload += file.readline(limits.MOST_BYTES + 1)
        end = payload.removesuffix(b"\n")
        last = payload.count(b"\n", 0, len(end))
        within(end[end.rfind(b"\n") + 1 :], f"{name}:{first + last}")
        if first == 1:
            payload = payload.removeprefix(codecs.BOM_UTF8)
        yield Block(name, first, read(), payload)
        first += last + 1


def read_json(path: Path) -> Iterator[Block]:
    """Yields the blocks of a .json file. This extension is used for JSON lists and for JSON lines,
    so both are accepted."""
    with _opened(path) as (file, _):
        begin = b" "
        while begin and not begin.strip():
            begin = file.read(1 << 16).removeprefix(codecs.BOM_UTF8)
    with _opened(path) as (file, read):
        if begin.lstrip().startswith(b"["):
            yield from grouped(_items(file, path.name), path.name, read)
        else:
            yield from _whole_lines(file, read, path.name)


SPACE = re.compile(r"[ \t\r\n]*")


def _items(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yields the items of a JSON list, each as one line. Only one item at a time is in memory."""
    decoder, parser = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    text, at, ended, number = "", 0, False, 0

    def more() -> None:
        nonlocal text, at, ended
        try:
            data = file.read(limits.BLOCK)
            ended = not data
            text, at = text[at:] + decoder.decode(data, final=ended), 0
        except UnicodeDecodeError:
            raise InputError(
                f"{name}:{number + 1}: this row or a later one is not valid UTF-8; save the file "
                "as UTF-8."
            ) from None

    def next_one() -> str:
        """Returns the next character that is not whitespace, or "" at the end."""
        nonlocal at
        while True:
            at = SPACE.match(text, at).end()  # type: ignore[union-attr]
            if at < len(text) or ended:
                return text[at : at + 1]
            more()

    next_one()
    at += 1  # skips the opening bracket
    while next_one() != "]" or number:
        number += 1
        source = f"{name}:{number}"
        while True:
            try:
                end = parser.raw_decode(text, at)[1]
                break
            except RecursionError:
                raise InputError(f"{source}: the row is nested too deeply; flatten it.") from None
            except ValueError as error:
                if ended or len(text) - at > limits.MOST_BYTES:
                    reason = getattr(error, "msg", "")
                    most = limits.MOST_BYTES
                    raise InputError(
                        f"{source}: the row is larger than {most >> 20} MiB, or is not valid JSON."
                        if len(text) - at > most
                        else f"{source}: the row is not valid JSON ({reason or error}); the file "
                        "must contain a list of objects."
                    ) from None
                # The row continues beyond the text read so far; it is parsed again after more text
                # has been read.
                check_values(text[at:].encode("utf-8", "surrogatepass"), source)
            more()
        line = text[at:end].replace("\n", " ").replace("\r", " ")
        at = end
        yield within(line.encode("utf-8", "surrogatepass"), source)
        after = next_one()
        if after not in (",", "]"):
            raise InputError(
                f"{source}: the row must be followed by a comma or the end of the list."
            )
        if after == "]":
            break
        at += 1
        next_one()
    at += 1
    if next_one():
        raise InputError(f"{name} has text after the end of its list; remove this text.")


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Block]:
    """Yields the blocks of a CSV file whose first line names the columns. All cells are text."""
    with _opened(path) as (file, read):
        yield from grouped(_cells(file, path.name, delimiter), path.name, read)


def _cells(file: BinaryIO, name: str, delimiter: str) -> Iterator[bytes]:
    number, size = 0, 0

    def lines() -> Iterator[str]:
        nonlocal size
        codec = "utf-8-sig"
        most = limits.MOST_BYTES
        while line := file.readline(most + 1):
            size += len(line)
            if size > most:
                raise InputError(
                    f"{name}:{number}: the row is larger than {most >> 20} MiB; split it into "
                    "several rows, or add the missing closing quote."
                )
            try:
                yield line.decode(codec)
            except UnicodeDecodeError:
                raise InputError(
                    f"{name}:{number}: the row is not valid UTF-8; save the file as UTF-8."
                ) from None
            codec = "utf-8"

    csv.field_size_limit(limits.MOST_BYTES)
    source = lines()
    first = next(source, "")
    # Semicolons are the usual delimiter in countries where the decimal separator is a comma.
    if delimiter == "," and "," not in first and ";" in first:
        delimiter = ";"
    rows = csv.reader(chain([first], source), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        size = 0
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise InputError(f"{name}:{number}: the row is not valid CSV ({error}).") from None
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if not names:
            check_columns(name, len(cells))
            names, number = cells, 1
            if len({*filter(None, names)}) != len([*filter(None, names)]):
                raise InputError(f"{name}: two columns have the same name; rename one of them.")
            continue
        if len(cells) != len(names):
            raise InputError(
                f"{name}:{number}: the row has {len(cells)} cells, but the header has "
                f"{len(names)}; put quotes around cells that contain the delimiter or a line break."
            )
        yield json.dumps(dict(zip(names, cells, strict=True)), ensure_ascii=False).encode()
        number += 1
