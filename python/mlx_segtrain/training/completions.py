"""Writes and reads completions.jsonl, which contains the completions that each step generated, with
their scores, one per line."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import InputError
from ..files import sync_open, to_json

NAME = "completions.jsonl"
#: The maximum length, in bytes, of a line that is read back.
MOST_LINE = 16 << 20


class CompletionLog:
    """The completions.jsonl of a run. Only the first failed write causes a warning."""

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        self.path, self._warn, self._failed = folder / NAME, warn, False

    def begin(self, step: int) -> None:
        """Removes the lines of steps after `step`, or the whole file if `step` is 0. Raises
        InputError if the file was not written by a run, and OSError if it cannot be changed."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            first = file.readline()
        if first.endswith(b"\n") and not first.startswith(b'{"step":'):
            raise InputError(f"{self.path} was not written by a run: move it to another folder.")
        if not step:
            self.path.unlink()
            return
        end = 0
        with open(self.path, "r+b") as file:
            for line in file:
                try:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                        break
                except (ValueError, KeyError, TypeError):
                    break
                end += len(line)
            file.truncate(end)

    def write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Appends either all lines or none, because `begin` would remove a partial line and all
        lines after it."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                file.write(b"".join(to_json(line).encode() + b"\n" for line in lines))
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)
            if not self._failed:
                self._failed = True
                self._warn(f"{self.path} cannot be written ({error.strerror or error})")

    def sync(self) -> None:
        """Waits until all lines are on disk."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                sync_open(file.fileno())


def read_step(path: Path, step: int | None, most: int) -> tuple[int, list[dict[str, Any]]]:
    """Returns the last step in a file and up to `most` lines of `step` (by default the last step),
    or (0, []) if the file has no complete line. The lines are found by binary search, since steps
    are in ascending order. Raises OSError if the file cannot be read."""
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        last = 0
        back = 1 << 16
        while not last and end:  # the last line may be long
            start = max(0, end - back)
            last = max((own["step"] for own in _lines(file, start)), default=0)
            if not start or back >= MOST_LINE:
                break
            back *= 4
        wanted = last if step is None else step
        found: list[dict[str, Any]] = []
        low, high = 0, end
        while high - low > 1 << 16:  # the step begins between low and high
            middle = (low + high) // 2
            first = next(_lines(file, middle), None)
            if first is None or first["step"] >= wanted:
                high = middle
            else:
                low = middle
        for own in _lines(file, low):
            if own["step"] > wanted or len(found) == most:
                break
            if own["step"] == wanted:
                found.append(own)
    return last, found


def _lines(file: IO[bytes], start: int) -> Iterator[dict[str, Any]]:
    """Yields the complete lines that start at or after byte `start`."""
    file.seek(max(0, start - 1))
    if start:
        while (part := file.readline(MOST_LINE)) and not part.endswith(b"\n"):
            pass
    while (line := file.readline(MOST_LINE)).endswith(b"\n"):
        with suppress(ValueError, KeyError, TypeError):
            own = json.loads(line)
            if isinstance(own["step"], int):
                yield own
