"""Checks files below the roots when they are opened.

A path may be replaced by a link after it was checked. Therefore a process that reads paths from
clients replaces Python's `open`, including for the libraries that read templates, configurations
and rows. The replacement opens the file, gets its real path from the system, and raises Outside if
a link led out of the roots. Files that compiled code opens (weights, tokenizer.json) are not
checked in this way.
"""

import builtins
import fcntl
import io
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from .. import files
from .roots import Roots

_open, _os_open = builtins.open, os.open
#: The fcntl command that returns the path of an open file on macOS.
F_GETPATH = 50
_roots: Roots | None = None


def confined() -> list[str]:
    """Returns the store and the roots to which this process is confined, or an empty list if it is
    not confined."""
    return [] if _roots is None else [str(_roots.store or ""), *map(str, _roots.folders)]


def open_too(folders: Iterable[str]) -> None:
    """If this process is confined, adds folders to its roots."""
    if _roots is not None:
        for folder in folders:
            _roots.open(Path(folder))


def confine(roots: Roots) -> None:
    """Replaces `open` in this process, so that links cannot lead out of the roots."""
    global _roots
    _roots = roots
    files.may_follow = roots.allows
    modules = tuple(os.path.join(x, "") for x in sys.path if os.path.isabs(x))

    def verify(named: Any, file: int) -> None:
        path = os.path.abspath(os.fsdecode(named))
        if not roots.holds(Path(path)) or path.startswith(modules):
            return
        found = path_of(file, path)
        if _known(str(found)) != _known(path):  # the path contains a link
            roots.check(Path(path), found)

    def open_number(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None:
            return _os_open(path, flags, mode, dir_fd=dir_fd)
        # A file outside the roots must not be truncated before the check.
        file = _os_open(path, flags & ~os.O_TRUNC, mode)
        try:
            verify(path, file)
            if flags & os.O_TRUNC:
                os.ftruncate(file, 0)
        except BaseException:
            os.close(file)
            raise
        return file

    def open_file(
        file: Any, mode: str = "r", *args: Any, opener: Callable[..., int] | None = None, **how: Any
    ) -> Any:
        if len(args) == 6:  # buffering, encoding, errors, newline, closefd, opener
            args, opener = args[:5], args[5]
        if not isinstance(file, int) and opener is None:  # a given opener calls os.open itself
            opener = partial(open_number, mode=0o666)
        return _open(file, mode, *args, opener=opener, **how)

    builtins.open = io.open = open_file
    os.open = open_number
    if hasattr(pathlib, "_NormalAccessor"):  # Python 3.10's Path.open
        pathlib._NormalAccessor.open = staticmethod(open_file)  # pyright: ignore


def _known(path: str) -> str:
    """Returns a path in a form that can be compared. Paths are case-insensitive on macOS."""
    return path.casefold() if sys.platform == "darwin" else path


def path_of(file: int, named: str) -> Path:
    """Returns the real path of an open file. Raises OSError if the path cannot be determined."""
    if sys.platform == "darwin":
        found = fcntl.fcntl(file, F_GETPATH, bytes(1024))
        return Path(os.fsdecode(found.rstrip(b"\0")))
    if os.path.isdir("/proc/self/fd"):
        return Path(os.readlink(f"/proc/self/fd/{file}"))
    path = os.path.realpath(named)
    if not os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file)):
        raise OSError(f"{named} changed while it was being opened")
    return Path(path)
