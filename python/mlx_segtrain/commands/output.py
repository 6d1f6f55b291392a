"""How much a command says, and the log file that gets a copy of it: the same for every command."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from mlx_segtrain.errors import InputError, RunError

#: Sequences by which a program colours and moves text on a terminal.
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class Output:
    """`quiet`: warnings and results only. `verbose`: every step and event, on a line each. Raises
    InputError if `log_file` cannot be opened."""

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
        """Appends lines to the log file, each with the time; empty ones are left out."""
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
    """A stream whose whole lines are noted, too; everything else is as the stream has it."""

    def __init__(self, stream: TextIO, note: Callable[[str], None]) -> None:
        self.stream, self._note, self._line = stream, note, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._note(line)
        return self.stream.write(text)

    def end(self) -> None:
        """Logs a last line that has no newline."""
        if self._line:
            self._note(self._line)
        self._line = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


#: The settings of the running command; outside of one everything is shown, and nothing is logged.
_current = Output()


def current() -> Output:
    """Returns the output settings of the command that is running."""
    return _current


def uncopied(stream: TextIO) -> TextIO:
    """Returns the original stream, for callers that log their lines themselves, such as a progress
    bar."""
    return stream.stream if isinstance(stream, Copied) else stream


@contextmanager
def output(args: argparse.Namespace) -> Iterator[None]:
    """While a command runs, it says as much as --quiet and --verbose want; --log-file gets a copy
    of what it prints, and the error with which it ends."""
    global _current
    given = {name: getattr(args, name, None) for name in ("quiet", "verbose", "log_file")}
    before, own = _current, Output(**given)
    _current = own
    try:
        if own.logs:
            with copying(own.note):
                yield
        else:
            yield
    except (InputError, RunError) as error:
        own.note(f"error: {error}")
        raise
    finally:
        _current = before
        own.close()


@contextmanager
def copying(note: Callable[[str], None]) -> Iterator[None]:
    """Notes what is printed to standard output and standard error."""
    out, err = Copied(sys.stdout, note), Copied(sys.stderr, note)
    try:
        with redirect_stdout(out), redirect_stderr(err):  # pyright: ignore[reportArgumentType]
            yield
    finally:
        out.end()
        err.end()
