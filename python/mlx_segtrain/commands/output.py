"""Controls how much each command prints, and copies its output to the log file."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from mlx_segtrain.errors import InputError, RunError

#: Escape sequences that colour text on a terminal or move its cursor.
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class Output:
    """The output settings of a command. With `quiet`, only warnings and results are shown. With
    `verbose`, a line is shown for every step and event.

    Raises InputError if `log_file` cannot be opened.
    """

    def __init__(
        self,
        quiet: bool | None = False,
        verbose: bool | None = False,
        log_file: Path | None = None,
    ) -> None:
        self.quiet, self.verbose = bool(quiet), bool(verbose)
        self._log: TextIO | None = None
        if log_file is not None:
            try:
                self._log = open(log_file, "a", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                raise InputError(
                    f"--log-file {log_file} cannot be written: {error.strerror}."
                ) from None

    @property
    def logs(self) -> bool:
        return self._log is not None

    def note(self, text: str) -> None:
        """Appends lines to the log file, each preceded by the time. Skips empty lines."""
        if self._log is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        lines = [line for line in ESCAPES.sub("", text).splitlines() if line.strip()]
        self._log.write("".join(f"{now} {line}\n" for line in lines))
        self._log.flush()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


class Copied:
    """A stream that writes its text and also passes each complete line to `note`."""

    def __init__(self, stream: TextIO, note: Callable[[str], None]) -> None:
        self.stream, self._note, self._line = stream, note, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._note(line)
        return self.stream.write(text)

    def end(self) -> None:
        """Passes the last line to `note` if it does not end with a newline."""
        if self._line:
            self._note(self._line)
        self._line = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


#: The settings of the running command. If no command is running, everything is shown and nothing is
#: logged.
_current = Output()


def current() -> Output:
    """Returns the output settings of the running command."""
    return _current


def uncopied(stream: TextIO) -> TextIO:
    """Returns the original stream, for callers that write to the log file themselves, such as a
    progress bar."""
    return stream.stream if isinstance(stream, Copied) else stream


@contextmanager
def output(args: argparse.Namespace) -> Iterator[None]:
    """Applies --quiet, --verbose and --log-file while a command is running. The log file receives a
    copy of the command's output, and of the error if the command fails."""
    global _current
    given = {name: getattr(args, name, None) for name in ("quiet", "verbose", "log_file")}
    before, own = _current, Output(**given)
    _current = own
    try:
        with copying(own.note) if own.logs else nullcontext():
            yield
    except (InputError, RunError) as error:
        own.note(f"error: {error}")
        raise
    finally:
        _current = before
        own.close()


@contextmanager
def copying(note: Callable[[str], None]) -> Iterator[None]:
    """Also passes each line that is printed to stdout or stderr to `note`."""
    out, err = Copied(sys.stdout, note), Copied(sys.stderr, note)
    try:
        with redirect_stdout(out), redirect_stderr(err):  # pyright: ignore[reportArgumentType]
            yield
    finally:
        out.end()
        err.end()
