"""Files below the roots are checked where they are opened: after it, by the open file itself.

A path that was looked at and is opened later may be a link by then. So in a process that reads what
clients name, `open` of Python (for libraries, too: templates, configurations, rows) opens first,
asks the system which file that is, and refuses one to which a link has led out of the roots. Files
that compiled code opens by itself (weights, tokenizer.json) are not seen here.
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
#: Of macOS: the path of an open file.
F_GETPATH = 50
_roots: Roots | None = None


def confined() -> list[str]:
    """The store and the roots of this process; nothing if it is not confined."""
    return [] if _roots is None else [str(_roots.store or ""), *map(str, _roots.folders)]


def open_too(folders: Iterable[str]) -> None:
    """Folders that were opened after this process was confined."""
    if _roots is not None:
        for folder in folders:
            _roots.open(Path(folder))


def confine(roots: Roots) -> None:
    """From here on, for the whole process."""
    global _roots
    _roots = roots
    files.may_follow = roots.allows
    modules = tuple(os.path.join(x, "") for x in sys.path if os.path.isabs(x))

    def verify(named: Any, file: int) -> None:
        path = os.path.abspath(os.fsdecode(named))
        if not roots.holds(Path(path)) or path.startswith(modules):
            return
        found = path_of(file, path)
        if _known(str(found)) != _known(path):  # by a link
            roots.check(Path(path), found)

    def open_number(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is not None:
            return _os_open(path, flags, mode, dir_fd=dir_fd)
        # What lies elsewhere must not have been emptied.
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
    """By which two paths are compared: on macOS other capitals are the same name."""
    return path.casefold() if sys.platform == "darwin" else path


def path_of(file: int, named: str) -> Path:
    """Where the file is that is open; OSError if the system does not say."""
    if sys.platform == "darwin":
        found = fcntl.fcntl(file, F_GETPATH, bytes(1024))
        return Path(os.fsdecode(found.rstrip(b"\0")))
    if os.path.isdir("/proc/self/fd"):
        return Path(os.readlink(f"/proc/self/fd/{file}"))
    path = os.path.realpath(named)
    if not os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file)):
        raise OSError(f"{named} changes while it is opened")
    return Path(path)
