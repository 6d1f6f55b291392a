"""Writes files atomically, by renaming temporary files. Also reads, hashes and locks files.

Writes reach the disk in order: the content of a file before its name, and its name before anything
that depends on it. So after a power failure, a path has either its old or its new content.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from .errors import InputError, reason

if TYPE_CHECKING:
    import mlx.core as mx


#: Minimum size, in bytes, of the files whose hashes known_sha256 caches on disk.
REMEMBERED = 64 << 20


def cache_dir() -> Path:
    """Returns the folder for cached data and cached check results: $MLX_SEGTRAIN_CACHE, or a folder
    in ~/.cache."""
    return Path(os.environ.get("MLX_SEGTRAIN_CACHE") or Path.home() / ".cache" / "mlx-segtrain")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`. On success, the temporary file is fsynced and renamed
    to `path`.

    After an exception, the temporary file is removed, and `path` remains unchanged.
    """
    aside = _aside(path)
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder next to `path`. On success, the folder is fsynced and renamed to
    `path`, replacing any existing folder."""
    aside = _aside(path)
    old = path.with_name(aside.name + OLD)
    make_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        for file in aside.iterdir():
            sync(file)
        sync(aside)
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for folder in (aside, old):
            shutil.rmtree(folder, ignore_errors=True)


#: The suffix of a folder that is being replaced.
OLD = ".old"
#: Matches the names of temporary files. These names contain a process id, so other files do not
#: match.
ASIDE = re.compile(r"\..+\.\d+\.tmp(\.old)?")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def clean(folder: Path) -> None:
    """Removes the temporary files of killed processes from this folder. Restores folders that were
    moved aside but not replaced."""
    asides = [path for path in folder.glob(".*.tmp*") if ASIDE.fullmatch(path.name)]
    for path in asides:
        place = path.with_name(path.name.removeprefix(".").rsplit(".", 3)[0])
        if path.name.endswith(OLD) and not place.exists():
            os.replace(path, place)
    for path in asides:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Removes a folder with its content, if it exists. The folder is renamed first, so its name is
    free immediately."""
    if path.exists():
        aside = _aside(path)
        os.replace(path, aside)
        shutil.rmtree(aside)


def make_folder(path: Path) -> None:
    """Creates the folder and its parents if they do not exist, and waits until they are on disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def may_follow(path: Path) -> bool:
    """Returns whether a folder whose path was read from a file may be opened. A server replaces
    this function with one that allows only folders below the server's roots."""
    return True


def free(place: Path) -> int:
    """Returns the number of free bytes on the disk that contains a path, which need not exist
    yet."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def make_private(path: Path) -> None:
    """Makes a folder accessible only to the current user, and creates it if it does not exist.
    Raises InputError if other users can write to the folder, since they could replace its
    content."""
    make_folder(path)
    with suppress(OSError):  # the file system may not support owners
        path.chmod(0o700)
    if path.stat().st_mode & 0o022:
        raise InputError(
            f"other users can write to {path}: choose a folder that only you can write to."
        )


def private(path: str, flags: int) -> int:
    """An opener for `open` that creates files which only the current user can read and write."""
    return os.open(path, flags, 0o600)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading. Raises OSError if it is not a regular file, since reading a pipe
    could block forever."""

    def at_once(name: str, flags: int) -> int:  # otherwise, opening a pipe would block
        return os.open(name, flags | os.O_NONBLOCK)

    file = open(path, "rb", opener=at_once)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def read_at_most(path: Path, most: int) -> str:
    """Returns the text of a UTF-8 file. Raises OSError if the file cannot be read, and ValueError
    if it is not text or has more than `most` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most >> 20} MiB")
    return content.decode("utf-8")


def read_json(file: Path, most: int = 4 << 20) -> dict[str, Any]:
    """Returns the object in a JSON file of at most `most` bytes. Raises InputError if the file does
    not contain an object or cannot be read."""
    try:
        values = json.loads(read_at_most(file, most))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {reason(error)}.") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a configuration: expected a JSON object.")
    return values


def sync(path: Path) -> None:
    """Waits until the content of a file, or the list of names in a folder, is on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        sync_open(file)
    except OSError as error:
        # Some network and FUSE file systems do not support fsync for folders.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)


def sync_open(file: int) -> None:
    """Waits until the data of an open file is on disk. On macOS, fsync alone may leave the data in
    the drive's write cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # the file system may not support F_FULLFSYNC
            fcntl.fcntl(file, full)
            return
    os.fsync(file)


def lock(file: IO[Any] | int) -> bool:
    """Locks `file` until it is closed, and returns True. If the file is already locked, returns
    False.

    The operating system releases the locks of a killed process, so a lock is never stale.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_text(path: Path, text: str, opener: Callable[[str, int], int] | None = None) -> None:
    """Writes `text` as UTF-8, atomically. `opener` is passed to `open`."""
    with atomic(path) as aside, open(aside, "w", encoding="utf-8", opener=opener) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None, *, ascii: bool = False) -> str:
    """Converts a value to JSON. Infinity and NaN become null. With `ascii`, non-ASCII characters
    are escaped."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(
    path: Path, tensors: "Mapping[str, mx.array]", metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, not atomically. If writing fails, raises OSError with the reason,
    which MLX's error does not include."""
    import mlx.core as mx

    with open(path, "wb") as file:
        mx.save_safetensors(file, dict(tensors), dict(metadata))


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content in hexadecimal. A process reads the file again only
    if it has changed."""
    return _sha256(path, *_identity(path))


def known_sha256(path: Path) -> str:
    """Returns the SHA-256 of an input file in hexadecimal. If the file has at least REMEMBERED
    bytes, its hash is also cached on disk, so later processes read the file again only if it has
    changed.

    To verify that a file is intact, which requires reading it, use `sha256`.
    """
    own = _identity(path)
    if own[2] < REMEMBERED:
        return _sha256(path, *own)
    # Each path has a single entry, which is overwritten when the content changes.
    note = cache_dir() / "hashes" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    with suppress(OSError, InputError, KeyError, TypeError):
        known = read_json(note)
        if known["file"] == list(own) and re.fullmatch("[0-9a-f]{64}", known["sha256"]):
            return known["sha256"]
    found = _sha256(path, *own)
    # If a file changes twice within one tick of the file system's clock, its timestamps do not
    # reflect the second change. So the hash of a file that has just changed is not cached.
    if _identity(path) == own and time.time_ns() - own[4] > 2 * 10**9:
        with suppress(OSError):
            make_folder(note.parent)
            write_json(note, {"file": own, "sha256": found})
    return found


def hashes(files: Mapping[str, Path], digest: Callable[[Path], str] = sha256) -> dict[str, str]:
    """Returns the SHA-256 of each file in hexadecimal, keyed by name. Raises OSError if a file
    cannot be read."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(files, pool.map(digest, files.values()), strict=True))


def _identity(path: Path) -> tuple[int, ...]:
    """Returns a tuple that changes whenever the file changes. The tuple includes the change time,
    because programs can set the modification time but not the change time."""
    own = os.stat(path)
    return own.st_dev, own.st_ino, own.st_size, own.st_mtime_ns, own.st_ctime_ns


@lru_cache(4096)
def _sha256(path: Path, *_: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
    return digest.hexdigest()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder that is renamed to `out` once it is complete. Raises InputError if `out` is a
    file or a non-empty folder, or cannot be written."""
    place = out.resolve()
    try:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise InputError(f"{out} already exists: choose another folder.")
        with atomic_folder(place) as aside:
            yield aside
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}.") from error
