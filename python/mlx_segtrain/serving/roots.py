"""Checks that paths from clients are below the allowed folders."""

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError
from ..files import ASIDE

#: Names with these prefixes are not allowed below a root.
CLOSED = (".", "datasets--", "spaces--")
#: Maximum length of a path in bytes, as on Linux.
LONGEST_PATH = 4096
#: Maximum number of files and folders below a folder that a client names. Each of them may be a
#: link, so all are checked.
MOST_BELOW = 20_000
#: Maximum number of links below a folder that a client names, and maximum length of a chain of
#: links. Following links takes time, so both are limited.
MOST_LINKS, MOST_STEPS = 1000, 8


class Outside(InputError):
    """The path is not below the roots."""

    status = 403


class Roots:
    """The folders that clients may access.

    The following are excluded: hidden files and folders (`.ssh`, `.git`, `.env`), repositories of a
    hub cache that are not models, and the files of jobs in the server's store.
    """

    def __init__(self, roots: Iterable[Path], store: Path | None = None):
        self.folders = [*dict.fromkeys(Path(root).expanduser().resolve() for root in roots)]
        self.store = None if store is None else store.expanduser().resolve()

    def resolve(self, text: str | Path) -> Path:
        """Returns the path with its links resolved. Raises Outside if the path, or a link at any
        depth below it, leads out of the roots."""
        try:
            if "\0" in str(text):
                raise ValueError("it contains a null character")
            if len(os.fsencode(str(text))) > LONGEST_PATH:  # resolving it would be slow
                raise ValueError(f"it is longer than {LONGEST_PATH} bytes")
            if not str(text):
                raise ValueError("it is empty")
            path = Path(text).expanduser().resolve()
            self.check(path, path)
            self._check_links(path)
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"the path {str(text)[:200]!r} cannot be used: {reason}.") from None
        return path

    def open(self, folder: Path) -> None:
        """Adds a folder to the roots, so that clients can use a data set from the hub."""
        folder = folder.resolve()
        if folder not in self.folders:
            self.folders.append(folder)

    def holds(self, path: Path) -> bool:
        """Returns whether a path is below one of the folders. Links are not resolved."""
        return any(path.is_relative_to(root) for root in self.folders)

    def check(self, named: Path, path: Path) -> None:
        """Raises Outside if a resolved path is not below the roots. The message contains `named`
        instead of that path."""
        if self._is_of_jobs(path):
            raise Outside(
                f"{named} is not accessible to clients, because it belongs to the server's jobs."
            )
        if not any(_is_open(root, path) for root in self.folders):
            where = ", ".join(map(str, self.folders))
            raise Outside(
                f"{named} is not below a directory that this server may use ({where}; hidden files "
                "are excluded): see --root."
            )

    def allows(self, path: Path) -> bool:
        """Returns whether a path that is named in a file may be read."""
        try:
            self.check(path, path.resolve())
        except (Outside, OSError, RuntimeError):
            return False
        return True

    def _is_of_jobs(self, path: Path) -> bool:
        if self.store is None or not path.is_relative_to(self.store) or path == self.store:
            return False
        # Paths are case-insensitive on macOS.
        return path.relative_to(self.store).parts[0].casefold().startswith("jobs")

    def _check_links(self, path: Path) -> None:
        """Checks all links below a path, except hidden ones, and all links in the folders to which
        these links lead."""
        waiting, seen, count, links = [path], {path}, 0, 0
        while waiting:
            try:
                entries = list(os.scandir(waiting.pop()))
            except (NotADirectoryError, FileNotFoundError, PermissionError):
                continue  # a file, a folder that does not exist yet, or an unreadable one
            count += len(entries)
            if count > MOST_BELOW:
                raise InputError(
                    f"{path} contains more than {MOST_BELOW:,} files: specify a smaller folder."
                )
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                own = Path(entry.path)
                if entry.is_symlink():
                    links += 1
                    own = self._follow(own, links)
                elif not entry.is_dir():
                    continue
                if own not in seen:
                    seen.add(own)
                    waiting.append(own)

    def _follow(self, link: Path, count: int) -> Path:
        """Returns the target of a link. Raises InputError if there are too many links, or if a
        chain of links is too long."""
        if count > MOST_LINKS:
            raise InputError(
                f"the folder of {link} contains more than {MOST_LINKS:,} links: copy the files "
                "instead."
            )
        step = link
        for _ in range(MOST_STEPS):
            step = step.parent / os.readlink(step)
            if not step.is_symlink():
                break
        else:
            raise InputError(
                f"{link} leads through a chain of more than {MOST_STEPS} links: link to the file "
                "directly."
            )
        target = link.resolve()
        self.check(link, target)
        return target


def _is_open(root: Path, path: Path) -> bool:
    """Returns whether a path is `root` or is below it. Each part below `root` must be an allowed
    name."""
    if not path.is_relative_to(root):
        return False
    parts = path.relative_to(root).parts
    return not any(part.startswith(CLOSED) and not ASIDE.fullmatch(part) for part in parts)
