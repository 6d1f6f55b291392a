"""The sources of a data set's rows: files in the usual formats, and Python data.

A source yields its rows in blocks of a few MB (blocks.py): one process reads the blocks in order,
and any process can parse a block. textfiles.py and tables.py read files. Because a file may be
untrusted, the memory used to read it is limited (limits.py), and any error in the file raises
InputError.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..config import flag
from ..errors import InputError, reason, shown
from ..events import OnEvent
from ..files import known_sha256, open_regular, read_json
from . import repository, tables, textfiles
from .blocks import Block, Row, grouped
from .limits import told, within
from .messages import KINDS


class Source(Protocol):
    """The rows of one split.

    `name` is used in messages. `size` is the size of the files in bytes, which is also the sum of
    the blocks' sizes. `files` maps names to the files; the names do not change if the folder is
    moved.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int | None: ...
    @property
    def files(self) -> Mapping[str, Path]: ...

    def fingerprint(self) -> str:
        """Returns a hexadecimal digest of the content. Raises InputError if the source cannot be
        read."""
        ...

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Yields the blocks, beginning with block number `start`. Every call yields the same
        blocks. Raises InputError."""
        ...


@dataclass(frozen=True)
class Files:
    """The rows of one or more files, in the order of the files."""

    files: Mapping[str, Path]

    @property
    def name(self) -> str:
        first, *others = (path.name for path in self.files.values())
        return f"{first} and {len(others)} more" if others else first

    @property
    def size(self) -> int:
        with told(self.name):
            return sum(path.stat().st_size for path in self.files.values())

    def fingerprint(self) -> str:
        digests = []
        for path in self.files.values():
            with told(path):
                open_regular(path).close()
                digests.append(known_sha256(path))
        return digests[0] if len(digests) == 1 else _digest("".join(digests).encode())

    def blocks(self, start: int = 0) -> Iterator[Block]:
        return islice(self._all(), start, None)

    def _all(self) -> Iterator[Block]:
        for path in self.files.values():
            with told(path):
                yield from READERS[str(format_of(path))](path)


@dataclass(frozen=True)
class Table:
    """The rows of a table in memory, or of a table that `datasets` maps from files.

    `batches(n)` returns record batches of at most n rows. Every call with the same n returns the
    same batches.
    """

    name: str
    batches: Callable[[int], Iterable[Any]]
    size: int | None = None
    files: Mapping[str, Path] = field(default_factory=dict)

    def fingerprint(self) -> str:
        return _digest(*(block.payload for block in self.blocks()))

    def blocks(self, start: int = 0) -> Iterator[Block]:
        from . import arrow

        with told(self.name):
            batches = ((batch, 0) for batch in self.batches(arrow.ROWS))
            yield from islice(arrow.blocks_of(self.name, batches), start, None)


@dataclass(frozen=True)
class Lines:
    """Rows from Python. They are stored as lines of JSON, so later changes to the objects have no
    effect."""

    name: str
    made: tuple[Block, ...]
    files: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Any], name: str) -> Lines:
        """Creates a source from rows. Raises InputError for a row that is not a dict of JSON
        values."""
        lines = (_line_of(row, f"{name}:{number}") for number, row in enumerate(rows, 1))
        return cls(name, tuple(grouped(lines, name)))

    @property
    def size(self) -> int:
        return sum(block.size for block in self.made)

    def fingerprint(self) -> str:
        return _digest(*(block.payload for block in self.made))

    def blocks(self, start: int = 0) -> Iterator[Block]:
        return iter(self.made[start:])


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# ---- which files


def format_of(path: Path) -> str | None:
    """Returns a file's extension without a compression suffix (such as .gz), or None if the file
    cannot contain rows."""
    *_, before, ending = ("", "", *Path(path.name.lower()).suffixes)
    ending = before if ending in textfiles.PACKED and before not in TABLES else ending
    return ending if ending in READERS and not path.name.startswith(".") else None


#: The names of files and folders of a split, in order of preference.
SPLITS = {"train": ("train",), "valid": ("valid", "validation")}
SHARD = re.compile(r"(?P<split>.+?)-(?P<index>\d{1,5})-of-(?P<count>\d{1,5})")


def sources_of(
    data: Any, valid: Any = None, tell: OnEvent | None = None, *, ask: bool = True
) -> tuple[Source, Source | None]:
    """Returns the training rows and, if there are any, the validation rows. Raises InputError if
    there are no training rows.

    `data` is a file, a folder, a name on the Hugging Face hub (repository.py), or rows in Python:
    dicts, an Arrow table, a `datasets.Dataset`, or a mapping from split names to any of these. If
    `data` has no validation rows, `valid` may contain them. `tell` receives the progress of
    downloads. If `ask` is false, nothing is downloaded.
    """
    if data is None:
        raise InputError(
            f"data_dir is missing: set it in the YAML file or with {flag('data_dir')}",
            field="data_dir",
        )
    if isinstance(data, str | Path):
        train, own = _in_place(data, tell, ask)
    elif isinstance(data, Mapping):
        named = {
            split: next((data[name] for name in names if name in data), None)
            for split, names in SPLITS.items()
        }
        if named["train"] is None:
            had = ", ".join(map(shown, data)) or "nothing"
            raise InputError(
                f'the data has no split "train" (it has {had}): add this split, or pass the rows '
                "of a single split."
            )
        train = _python(named["train"], "train_data")
        own = None if named["valid"] is None else _python(named["valid"], "valid_data")
    else:
        train, own = _python(data, "train_data"), None
    if valid is not None:
        if own is not None:
            raise InputError(
                f"the data already has validation rows ({own.name}): remove them, or leave "
                "valid_data out."
            )
        found = isinstance(valid, str | Path)
        own = _in_place(valid, tell, ask)[0] if found else _python(valid, "valid_data")
    return train, own


def rows_of(source: Source) -> Iterator[tuple[str, Row]]:
    """Yields each row of a source together with its name. Raises InputError."""
    return (row for block in source.blocks() for row in block.rows())


def source_of(path: Path) -> Source:
    """Returns the rows of one file. Raises InputError if its format is not supported."""
    if not path.exists():
        raise InputError(f"the data path {path} does not exist: pass an existing file or folder.")
    if format_of(path) is None:
        raise InputError(f"{path} is not a data file in a supported format: use {ENDINGS}.")
    return Files({path.name: path})


def _in_place(data: str | Path, tell: OnEvent | None, ask: bool) -> tuple[Source, Source | None]:
    """Returns the sources for a file, a folder or a repository on the hub."""
    place = Path(data).expanduser()
    own = None if format_of(place) else repository.named(data)
    if own is not None:
        train, valid = repository.fetch(own, lambda name: format_of(Path(name)), tell, ask=ask)
        return Files(train), Files(valid) if valid else None
    if not place.is_dir():
        return source_of(place), None
    if (place / "state.json").is_file():  # one split of `save_to_disk`
        return Files(_saved(place, "")), None
    for folder in (place, place / "data"):  # the usual layouts of data set repositories
        if train := split_in(place, folder, "train"):
            valid = split_in(place, folder, "valid")
            return Files(train), Files(valid) if valid else None
    others = [path for path in rows_in(place) if stem_of(path) not in SPLITS["valid"]]
    if len(others) == 1:
        valid = split_in(place, place, "valid")
        return Files({others[0].name: others[0]}), Files(valid) if valid else None
    raise InputError(
        f"{place} contains no training file: add train.jsonl, or a file named train with another "
        f"supported ending ({ENDINGS})."
    )


def rows_in(folder: Path) -> list[Path]:
    """Returns the files of a folder that have the extension of a supported format."""
    with told(folder):
        return sorted(path for path in folder.iterdir() if format_of(path) and path.is_file())


def stem_of(path: Path) -> str:
    """Returns the name of a file of rows without its extensions."""
    return path.name[: path.name.lower().rindex(str(format_of(path)))]


def split_in(place: Path, folder: Path, split: str) -> dict[str, Path]:
    """Returns the files of a split in a folder, keyed by path relative to `place`. Raises
    InputError if there are several candidates."""
    found: dict[str, list[Path]] = {}
    with told(folder):
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in entries:
        if (path / "state.json").is_file() and path.name in SPLITS[split]:
            found[path.name] = [path]
        elif format_of(path):
            stem = stem_of(path)
            shard = SHARD.fullmatch(stem)
            if (shard["split"] if shard else stem) in SPLITS[split]:
                kind = path.name[len(stem) :]
                form = f"{shard['split']}-*-of-{shard['count']}{kind}" if shard else path.name
                found.setdefault(form, []).append(path)
    if len(found) > 1:
        raise InputError(
            f"{folder} has {' and '.join(sorted(found))}: keep only one of them, or pass the path "
            "of the one to use."
        )
    for form, paths in found.items():
        shard = SHARD.fullmatch(stem_of(paths[0])) if format_of(paths[0]) else None
        if shard and len(paths) != int(shard["count"]):
            raise InputError(
                f"{folder} has only {len(paths)} of the {int(shard['count'])} files named {form}: "
                "add the missing files."
            )
        if (paths[0] / "state.json").is_file():
            return _saved(paths[0], f"{paths[0].relative_to(place).as_posix()}/")
        return {path.relative_to(place).as_posix(): path for path in paths}
    return {}


def _saved(folder: Path, before: str) -> dict[str, Path]:
    """Returns the data files of a folder that was written by `save_to_disk`."""
    state = read_json(folder / "state.json")
    listed = state.get("_data_files")
    names = [
        own["filename"]
        for own in (listed if isinstance(listed, list) else [])
        if isinstance(own, dict) and isinstance(own.get("filename"), str)
    ]
    if not names or any(Path(name).name != name or not format_of(Path(name)) for name in names):
        raise InputError(
            f"{folder / 'state.json'} does not list valid data files: save the data set again "
            "with save_to_disk."
        )
    return {before + name: folder / name for name in names}


def _python(data: Any, name: str) -> Source:
    """Returns a source for rows that were passed from Python."""
    if hasattr(data, "with_format") and hasattr(data, "iter"):  # a Dataset of `datasets`
        table = data.with_format("arrow")
        return Table(name, lambda n: (b for own in table.iter(n) for b in own.to_batches(n)))
    if hasattr(data, "__arrow_c_stream__"):  # a table of pandas, polars or another library
        from . import arrow

        data = arrow.table_of(data)
    if hasattr(data, "to_batches") and hasattr(data, "schema"):  # a pyarrow table
        return Table(name, data.to_batches, data.nbytes)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        return Lines.of(data, name)
    raise InputError(
        f"{name} is {_kind(data)}: pass a list or an iterator of dicts, a datasets.Dataset, or an "
        "Arrow, pandas or polars table."
    )


def _line_of(row: Any, source: str) -> bytes:
    """Converts a row from Python to a line of JSON."""
    if not isinstance(row, Mapping):
        raise InputError(f"{source}: the row must be a dict, not {_kind(row)}.")
    try:
        line = json.dumps(dict(row), ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise InputError(f"{source}: the row cannot be written as JSON: {reason(error)}.") from None
    return within(line, source)


def _kind(value: Any) -> str:
    return KINDS.get(type(value), f"a {type(value).__name__}")


#: Formats with built-in compression.
TABLES = (".parquet", ".arrow", ".feather")
#: The functions that read files, by extension.
READERS: dict[str, Callable[[Path], Iterator[Block]]] = {
    ".jsonl": textfiles.read_lines,
    ".ndjson": textfiles.read_lines,
    ".json": textfiles.read_json,
    ".csv": textfiles.read_csv,
    ".tsv": partial(textfiles.read_csv, delimiter="\t"),
    **dict.fromkeys(TABLES, tables.read),
}
ENDINGS = ", ".join(READERS)
