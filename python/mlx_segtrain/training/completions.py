"""completions.jsonl: what each step generated and how it was scored, one completion per line."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import sync_open, to_json

NAME = "completions.jsonl"


class CompletionLog:
    """The file of a run; a failed write gives one warning."""

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        self.path, self._warn, self._failed = folder / NAME, warn, False

    def begin(self, step: int) -> None:
        """Keeps lines up to this step, or removes the file if a run is new. Raises InputError for a
        file that no run has written, and OSError."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            first = file.readline()
        if first.endswith(b"\n") and not first.startswith(b'{"step":'):
            raise InputError(f"{self.path} was not written by a run: move it away.")
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
        """Writes all of the lines or none: `begin` would take part of a step as its end and remove
        what follows."""
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
