"""A job's log. The job's process writes one event per line, and readers can start at any offset.

The id of an event is the offset of the end of its line. While the writing process runs, it holds a
lock on a file next to the log.
"""

import json
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from ...events import Event
from ...files import lock, private, to_json

#: The number of bytes that are read at a time.
BLOCK = 1 << 16
#: A line that is not an event is truncated to this many bytes.
LONGEST = 1 << 16
#: Maximum size in bytes of a line that is cached for other readers.
SHORT = 1 << 11
#: The types of events that end an attempt at a job.
LAST = ("done", "failed", "cancelled")


def _frame(line: bytes) -> str:
    """Converts a line of the log to the JSON of an event. A line that is not an event becomes the
    text of a log event."""
    return _known(line) if len(line) < SHORT else _parsed(line)


def _parsed(line: bytes) -> str:
    try:
        event = json.loads(line)
        if isinstance(event, dict) and isinstance(event.get("type"), str):
            return to_json(event)
    except (ValueError, RecursionError):
        pass
    return to_json({"type": "log", "line": line[:LONGEST].decode("utf-8", "replace").rstrip("\r")})


_known = lru_cache(maxsize=4096)(_parsed)  # many clients follow one job


def read(path: Path, after: int, *, ended: bool) -> tuple[list[tuple[int, str]], int]:
    """Returns some of the events after an offset, as (id, JSON) pairs, and the offset at which they
    end.

    If `ended` is set, nothing more will be written, so an incomplete last line is returned as well.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            after = _line_start(file, after if 0 < after <= size else 0)
            block = file.read(BLOCK)
            if block and b"\n" not in block:  # a line that is longer than a block
                block += file.readline()
    except FileNotFoundError:
        return [], after
    *lines, rest = block.split(b"\n")
    found = []
    for line in lines:
        after += len(line) + 1
        if line.strip():
            found.append((after, _frame(line)))
    if rest and ended and after + len(rest) >= size:
        after += len(rest)
        found.append((after, _frame(rest)))
    return found, after


def _line_start(file: BinaryIO, after: int) -> int:
    """Seeks to an offset or, if the offset is inside a line, to the end of that line. Returns the
    new position."""
    file.seek(max(after - 1, 0))
    if after and file.read(1) != b"\n":
        file.readline()
    return file.tell()


def events(path: Path, after: int = 0) -> list[Event]:
    """Returns all events after an offset."""
    found: list[Event] = []
    while True:
        some, end = read(path, after, ended=True)
        found += [json.loads(frame) for _, frame in some]
        if end == after:
            return found
        after = end


def last(path: Path, begins: int) -> Event | None:
    """Returns the event that ended the attempt whose events start at the offset `begins`, or None
    if the attempt has no such event."""
    # Reading only the end of the log suffices, because a process prints little after its last
    # event.
    with suppress(FileNotFoundError):
        begins = max(begins, path.stat().st_size - BLOCK)
    ends = [event for event in events(path, begins) if event["type"] in LAST]
    return ends[-1] if ends else None


def append(path: Path, event: Event) -> None:
    """Appends an event as a line."""
    with open(path, "ab+", opener=private) as file:
        _end_line(file.fileno())
        file.write((to_json(event) + "\n").encode())


def claim(path: Path) -> int | None:
    """Locks a log and returns the descriptor of the lock, or None if another process holds the
    lock. All processes that inherit the descriptor hold the lock until they close it."""
    file = os.open(lock_of(path), os.O_RDWR | os.O_CREAT, 0o600)
    if lock(file):
        return file
    os.close(file)
    return None


def open_end(path: Path) -> int:
    """Opens the log for appending, and ends an incomplete last line."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    _end_line(file)
    return file


def _end_line(file: int) -> None:
    """Adds a line break to an incomplete last line, which a killed process may have left."""
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")


def is_written(path: Path) -> bool:
    """Returns whether the process that writes the log is running."""
    try:
        with open(lock_of(path), "rb") as file:
            return not lock(file)
    except FileNotFoundError:
        return False


def lock_of(path: Path) -> Path:
    return path.with_suffix(".lock")
