"""Which folders clients may name."""

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError
from ..files import ASIDE

#: Beginnings of names that nobody may name below a root.
CLOSED = (".", "datasets--", "spaces--")
#: Bytes of a path, as on Linux.
LONGEST_PATH = 4096
#: Files and folders below one that is named, at most: each may be a link.
MOST_BELOW = 20_000
#: Links among these, and links that lead to one another: following takes a while.
MOST_LINKS, MOST_STEPS = 1000, 8


class Outside(InputError):
    """A path that does not lie under the roots."""

    status = 403


class Roots:
    """The folders below which a client may name paths.

    Nothing hidden below them may be named (`.ssh`, `.git`, `.env`), nor a cache's repositories that
    are no models, nor the jobs of our store, which may lie below a root, too.
    """

    def __init__(self, roots: Iterable[Path], store: Path | None = None):
        self.folders = [*dict.fromkeys(Path(root).expanduser().resolve() for root in roots)]
        self.store = None if store is None else store.expanduser().resolve()

    def resolve(self, text: str | Path) -> Path:
        """The path without links; Outside if it is elsewhere, or what is below it is a link to
        elsewhere, at any depth."""
        try:
            if "\0" in str(text):
                raise ValueError("it holds a null character")
            if len(os.fsencode(str(text))) > LONGEST_PATH:  # resolving takes long
                raise ValueError(f"it has more than {LONGEST_PATH} bytes")
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
        """From here on a folder below the roots that was closed may be named, too: a data set of
        the hub that a client may have."""
        folder = folder.resolve()
        if folder not in self.folders:
            self.folders.append(folder)

    def holds(self, path: Path) -> bool:
        """Whether a path, as it is written, lies below one of the folders."""
        return any(path.is_relative_to(root) for root in self.folders)

    def check(self, named: Path, path: Path) -> None:
        """Outside if a path without links, by whatever name, is elsewhere."""
        if self._is_of_jobs(path):
            raise Outside(f"{named} lies outside of what clients may use: jobs are the server's.")
        if not any(_is_open(root, path) for root in self.folders):
            where = ", ".join(map(str, self.folders))
            raise Outside(
                f"{named} lies outside of what this server may use ({where}, and nothing hidden "
                "there): see --root."
            )

    def allows(self, path: Path) -> bool:
        """Whether what a file names may be looked at."""
        try:
            self.check(path, path.resolve())
        except (Outside, OSError, RuntimeError):
            return False
        return True

    def _is_of_jobs(self, path: Path) -> bool:
        if self.store is None or not path.is_relative_to(self.store) or path == self.store:
            return False
        # On macOS other capitals are the same name.
        return path.relative_to(self.store).parts[0].casefold().startswith("jobs")

    def _check_links(self, path: Path) -> None:
        """Of all that is not hidden below a path, within folders that links lead to, too."""
        waiting, seen, count, links = [path], {path}, 0, 0
        while waiting:
            try:
                entries = list(os.scandir(waiting.pop()))
            except (NotADirectoryError, FileNotFoundError, PermissionError):
                continue  # a file, what is to be made, what nobody here can read
            count += len(entries)
            if count > MOST_BELOW:
                raise InputError(
                    f"{path} holds more than {MOST_BELOW:,} files: name the folder of one thing."
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
        """Where a link leads to; InputError if it is one of very many, or leads to many others."""
        if count > MOST_LINKS:
            raise InputError(
                f"more than {MOST_LINKS:,} links lie in the folder of {link}: copy the files."
            )
        step = link
        for _ in range(MOST_STEPS):
            step = step.parent / os.readlink(step)
            if not step.is_symlink():
                break
        else:
            raise InputError(f"{link} leads to a link, and so on: make it lead to a file.")
        target = link.resolve()
        self.check(link, target)
        return target


def _is_open(root: Path, path: Path) -> bool:
    """Whether a path is the root, or below it and neither hidden nor what is no model's."""
    if not path.is_relative_to(root):
        return False
    parts = path.relative_to(root).parts
    return not any(part.startswith(CLOSED) and not ASIDE.fullmatch(part) for part in parts)
