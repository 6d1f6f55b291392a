"""Files are written aside and renamed, so that a reader never sees half of one; and locked."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def cache_dir() -> Path:
    """Where downloads and results of checks are kept: $MLX_SEGTRAIN_CACHE, else ~/.cache."""
    return Path(os.environ.get("MLX_SEGTRAIN_CACHE") or Path.home() / ".cache" / "mlx-segtrain")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is fsynced and takes `path`'s name.

    The temporary keeps the suffix, since `mx.save_safetensors` appends one that is missing. After
    an exception the temporary is removed and whatever stood at `path` is untouched.
    """
    path = Path(path)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def lock(file: IO[Any]) -> bool:
    """Whether nobody else has locked `file`, which then is ours until it is closed.

    The system gives up what a process held that was killed: a lock is never stale.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    with atomic(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
