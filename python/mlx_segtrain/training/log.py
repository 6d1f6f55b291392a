"""Writes metrics.jsonl, which contains the events of a run, one per line. The file stays locked
during the run."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import events
from ..errors import InputError, RunError
from ..files import lock, make_folder, sync, sync_open, to_json

NAME = "metrics.jsonl"


def check_free(folder: Path) -> None:
    """Raises InputError if a run is using this folder, or if this cannot be determined."""
    try:
        # Opened for writing, because some network file systems lock only files that are open for
        # writing.
        with open(folder / NAME, "r+b") as file:
            _claim(file, folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(_cannot(folder, error)) from None


def _cannot(folder: Path, error: OSError) -> str:
    reason = error.strerror or error
    return f"adapter_path {folder} cannot be written ({reason}): choose another folder."


def _claim(file: Any, folder: Path) -> None:
    if lock(file):
        return
    metas = [line for line in (folder / NAME).read_bytes().splitlines(True) if b'"meta"' in line]
    owner = ""
    if metas and metas[-1].endswith(b"\n"):
        owner = f" (process {json.loads(metas[-1])['pid']})"
    raise InputError(
        f"adapter_path {folder} is in use by another run{owner}: choose another folder, or "
        "wait until it ends."
    )


class NoLog:
    """The log of a rank that writes no files."""

    def write(self, event: events.Event) -> None:
        pass

    def close(self) -> None:
        pass


class RunLog:
    """The log of a run, which stays open and locked until the end of the run.

    Lines that cannot be written stay in memory and are written with the next event. `warn` is
    called once per series of failed writes.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        self.folder, self.warn = folder, warn
        self.waiting = bytearray()
        self.warned = False
        try:
            make_folder(folder)
            self.file = self._open()
        except OSError as error:
            raise InputError(_cannot(folder, error)) from None

    def _open(self, flags: int = 0) -> Any:
        # O_APPEND is not used, because some network file systems do not implement it reliably.
        number = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT | flags, 0o644)
        file = os.fdopen(number, "r+b", 0)
        try:
            _claim(file, self.folder)  # another run may have started in the meantime
        except InputError:
            file.close()
            raise
        return file

    def begin(self, keep: int) -> None:
        """Truncates the file after the last complete line of its first `keep` bytes."""
        head = self.file.read(keep)
        self.file.truncate(head.rfind(b"\n") + 1)
        self.file.seek(0, os.SEEK_END)

    def write(self, event: events.Event) -> None:
        self.waiting += to_json(event).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            while self.waiting:
                del self.waiting[: self.file.write(bytes(self.waiting))]
            self.warned = False
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if not self.warned:
            self.warned = True
            self.warn(f"{self.folder / NAME} cannot be written ({error.strerror}); trying again")

    def sync(self) -> int:
        """Waits until the lines are on disk. Returns the size of the log in bytes, including lines
        that could not be written yet."""
        self._flush()
        try:
            sync_open(self.file.fileno())
        except OSError as error:
            self._failed(error)
        return self.file.tell() + len(self.waiting)

    def ensure(self) -> None:
        """Checks that the folder still exists and belongs to this run. Called before each write to
        the folder.

        If the folder was deleted, recreates it with the whole log. Raises OSError if that fails,
        and RunError if another run is now using a folder with this name.
        """
        with suppress(FileNotFoundError):
            there = os.stat(self.folder / NAME)
            if os.path.samestat(there, os.fstat(self.file.fileno())):
                return
        make_folder(self.folder)
        try:
            new = self._open(os.O_EXCL)
        except (FileExistsError, InputError):
            raise RunError(
                f"adapter_path {self.folder} was removed and has since been used by another run, "
                "so this run will not write to it again."
            ) from None
        self.warn(f"{self.folder} was deleted during the run and has been recreated")
        self.file.seek(0)
        self.waiting[:0] = self.file.read()
        self.file.close()
        self.file = new
        sync(self.folder)

    def close(self) -> None:
        self.file.close()
