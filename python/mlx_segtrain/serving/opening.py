"""Checks files below the roots after they were opened, by the open file itself.

A path that was checked may be a link by the time it is opened. So in a process that reads what
clients name, Python's `open` (also for libraries: templates, configurations, rows) opens first,
asks the system which file that is, and refuses a file outside of the roots that a link led to.
Files that compiled code opens by itself (weights, tokenizer.json) are not covered here.
"""

import builtins
import fcntl
import io
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .. import files
from .roots import Roots

_open, _os_open = builtins.open, os.open
#: On macOS: the command that gives the path of an open file.
F_GETPATH = 50
_roots: Roots | None = None


def confined() -> list[str]:
    """Returns the store and the roots of this process; empty if it is not confined."""
    return [] if _roots is None else [str(_roots.store or ""), *map(str, _roots.folders)]


def open_too(folders: Iterable[str]) -> None:
    """Adds folders after this process was confined."""
    if _roots is not None:
        for folder in folders:
            _roots.open(Path(folder))


def confine(roots: Roots) -> None:
    """Confines the whole process from here on."""
    global _roots
    _roots = roots
    files.may_follow = roots.allows
    modules = tuple(os.path.join(x, "") for x in sys.path if os.path.isabs(x))

    def verify(named: Any, file: int) -> None:
        path = os.path.abspath(os.fsdecode(named))
        if not roots.holds(Path(path)) or path.startswith(modules):
            return
        found = path_of(file, path)
        if _known(str(found)) != _known(path):  # through a link
            roots.check(Path(path), found)

    def open_number(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None:
            return _os_open(path, flags, mode, dir_fd=dir_fd)
        # A file elsewhere must not be truncated before the check.
        file = _os_open(path, flags & ~os.O_TRUNC, mode)
        try:
            verify(path, file)
            if flags & os.O_TRUNC:
                os.ftruncate(file, 0)
        except BaseException:
            os.close(file)
            raise
        return file

    def as_opener(path: Any, flags: int) -> int:
        return open_number(path, flags, 0o666)

    def open_file(
        file: Any, mode: str = "r", *args: Any, opener: Callable[..., int] | None = None, **how: Any
    ) -> Any:
        if len(args) == 6:  # buffering, encoding, errors, newline, closefd, opener
            args, opener = args[:5], args[5]
        if isinstance(file, int) or opener is not None:  # which calls os.open
            return _open(file, mode, *args, opener=opener, **how)
        return _open(file, mode, *args, opener=as_opener, **how)

    builtins.open = io.open = open_file
    os.open = open_number
    if hasattr(pathlib, "_NormalAccessor"):  # Python 3.10's Path.open
        pathlib._NormalAccessor.open = staticmethod(open_file)  # pyright: ignore


def _known(path: str) -> str:
    """Returns the form in which paths are compared: on macOS case does not matter."""
    return path.casefold() if sys.platform == "darwin" else path


def path_of(file: int, named: str) -> Path:
    """Returns the path of an open file. Raises OSError if the system does not give it."""
    if sys.platform == "darwin":
        found = fcntl.fcntl(file, F_GETPATH, bytes(1024))
        return Path(os.fsdecode(found.rstrip(b"\0")))
    if os.path.isdir("/proc/self/fd"):
        return Path(os.readlink(f"/proc/self/fd/{file}"))
    path = os.path.realpath(named)
    if not os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file)):
        raise OSError(f"{named} changed while it was opened")
    return Path(path)
