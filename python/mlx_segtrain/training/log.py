"""metrics.jsonl: every event of a run as a line; its lock says whose the folder is."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import events
from ..errors import InputError, RunError
from ..files import lock, make_folder, sync, sync_open

NAME = "metrics.jsonl"


def check_free(folder: Path) -> None:
    """InputError if a run that goes on has this folder."""
    if (folder / NAME).exists():
        with open(folder / NAME, "rb") as file:
            _claim(file, folder)


def _claim(file: Any, folder: Path) -> None:
    if lock(file):
        return
    metas = [line for line in (folder / NAME).read_bytes().splitlines(True) if b'"meta"' in line]
    owner = ""
    if metas and metas[-1].endswith(b"\n"):
        owner = f" (process {json.loads(metas[-1])['pid']})"
    raise InputError(
        f"adapter_path {folder} is in use by a run that goes on{owner}: choose another folder, or "
        "wait for its end."
    )


class RunLog:
    """Open, and the folder's lock, from the first line of a run to its end.

    What cannot be written waits in memory for the next event, and `warn` is told once.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        self.folder, self.warn = folder, warn
        self.waiting = b""
        self.warned = False
        try:
            make_folder(folder)
            self.file = self._open()
        except OSError as error:
            raise InputError(
                f"adapter_path {folder} cannot be written: {error.strerror}: choose another folder."
            ) from None

    def _open(self) -> Any:
        # Not O_APPEND: some network file systems have none that holds.
        file = os.fdopen(os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT, 0o644), "r+b", 0)
        try:
            _claim(file, self.folder)  # once more: another may have begun while this one loaded
        except InputError:
            file.close()
            raise
        return file

    def begin(self, keep: int) -> None:
        """Cuts the file behind its first `keep` bytes, and behind their last whole line."""
        head = self.file.read(keep)
        self.file.truncate(head.rfind(b"\n") + 1)
        self.file.seek(0, os.SEEK_END)

    def write(self, event: events.Event) -> None:
        self.waiting += json.dumps(event, ensure_ascii=False).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
            self.warned = False
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if not self.warned:
            self.warned = True
            self.warn(f"{self.folder / NAME} cannot be written ({error.strerror}): its lines wait")

    def sync(self) -> int:
        """Waits until the disk has all lines; the bytes they are, with those that still wait.

        If the folder has vanished it is made anew, with what was in the file. OSError if that
        fails, RunError if another run has a folder of this name by now.
        """
        if not self._in_place():
            self._move()
        self._flush()
        try:
            sync_open(self.file.fileno())
        except OSError as error:
            self._failed(error)
        return self.file.tell() + len(self.waiting)

    def _in_place(self) -> bool:
        try:
            there = os.stat(self.folder / NAME)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self.file.fileno()))

    def _move(self) -> None:
        make_folder(self.folder)
        try:
            new = self._open()
        except InputError as error:
            raise RunError(
                f"the folder of this run was removed, and made by another: {error}"
            ) from None
        self.warn(f"{self.folder} had vanished: it is made anew")
        self.file.seek(0)
        text = self.file.read()
        self.file.close()
        self.file, self.waiting = new, text + self.waiting
        self.file.truncate(0)
        sync(self.folder)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
