"""Where the rows of a data set come from: files of the usual formats, and Python data.

A source gives its rows in blocks of a few MB, which one process reads after the other and any
process can parse. What is read here may be a stranger's: memory is bounded, and whatever is wrong
with a file is an InputError.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from ..config import flag
from ..errors import InputError, shown
from ..events import OnEvent
from ..files import known_sha256, open_regular, read_json
from . import repository
from .messages import KINDS, Other

MOST_BYTES = 16 << 20  # of a row: four million tokens; parsed, it takes up to sixty times as much
BLOCK = 4 << 20  # bytes of rows that go into one block, about
#: What may become of a compressed byte: text comes to ten, and a file of zeros to ten thousand.
MOST_UNPACKED, SLACK = 200, 64 << 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """Rows that one process handles at a time: a few MB, which can be pickled.

    `first` is the number of the first row, or line, in the file `name`; `size` the bytes of the
    file that were read for it. `payload` are lines of JSON, or an Arrow stream.
    """

    name: str
    first: int
    size: int
    payload: bytes
    kind: Literal["lines", "arrow"] = "lines"

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Each row after its name, such as "train.jsonl:17"; InputError for one that is none."""
        return _PARSERS[self.kind](self)


class Source(Protocol):
    """The rows of one split.

    `name` is for people, `size` the bytes of its files (to which the sizes of its blocks add up),
    `files` are those by a name that stays when their folder is moved.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int | None: ...
    @property
    def files(self) -> Mapping[str, Path]: ...

    def fingerprint(self) -> str:
        """A digest of the content, in hexadecimal; InputError if it cannot be read."""
        ...

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Always the same blocks, but for the first `start`; InputError."""
        ...


@dataclass(frozen=True)
class Files:
    """The rows of files, one file after the other."""

    files: Mapping[str, Path]

    @property
    def name(self) -> str:
        first, *others = (path.name for path in self.files.values())
        return f"{first} and {len(others)} more" if others else first

    @property
    def size(self) -> int:
        with _told(self.name):
            return sum(path.stat().st_size for path in self.files.values())

    def fingerprint(self) -> str:
        digests = []
        for path in self.files.values():
            with _told(path):
                open_regular(path).close()
                digests.append(known_sha256(path))
        return digests[0] if len(digests) == 1 else _digest("".join(digests).encode())

    def blocks(self, start: int = 0) -> Iterator[Block]:
        return islice(self._all(), start, None)

    def _all(self) -> Iterator[Block]:
        for path in self.files.values():
            with _told(path):
                for block in READERS[str(format_of(path))](path):
                    yield replace(block, name=path.name)


@dataclass(frozen=True)
class Table:
    """The rows of a table in memory, or of one that `datasets` maps from files.

    `batches(n)` gives record batches of at most n rows, always the same ones.
    """

    name: str
    batches: Callable[[int], Iterable[Any]]
    size: int | None = None
    files: Mapping[str, Path] = field(default_factory=dict)

    def fingerprint(self) -> str:
        return _digest(*(block.payload for block in self.blocks()))

    def blocks(self, start: int = 0) -> Iterator[Block]:
        with _told(self.name):
            batches = ((batch, 0) for batch in self.batches(ROWS))
            yield from islice(_arrow_blocks(self.name, batches), start, None)


@dataclass(frozen=True)
class Lines:
    """Rows of Python, kept as lines of JSON: what becomes of the objects later changes nothing."""

    name: str
    made: tuple[Block, ...]
    files: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Any], name: str) -> Lines:
        """InputError for a row that is no dict of JSON's values."""
        lines = (_line_of(row, f"{name}:{number}") for number, row in enumerate(rows, 1))
        return cls(name, tuple(replace(own, name=name) for own in _grouped(lines)))

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
    """The ending of a file that could hold rows, without that of its compression; or None."""
    name = path.name.lower()
    *_, before, ending = ("", *Path(name).suffixes) if Path(name).suffix else ("", "")
    ending = before if ending in PACKED and before not in ARROW else ending
    return ending if ending in READERS and not path.name.startswith(".") else None


#: What files and folders of a split are called, in the order in which they are taken.
SPLITS = {"train": ("train",), "valid": ("valid", "validation")}
SHARD = re.compile(r"(?P<split>.+?)-(?P<index>\d{1,5})-of-(?P<count>\d{1,5})")


def sources_of(
    data: Any, valid: Any = None, tell: OnEvent | None = None, *, ask: bool = True
) -> tuple[Source, Source | None]:
    """Training rows and, if there are some, validation rows; InputError if there are none.

    `data` is a file, a folder, a name of the Hugging Face hub (repository.py), or rows in Python:
    dicts, an Arrow table, a `datasets.Dataset`, or a mapping of splits to these. `valid` are the
    validation rows where `data` has none. `tell` is told of what is downloaded; without `ask`
    nothing is.
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
            raise InputError(f'The data has no "train": it needs that split, but has {had}.')
        train = _python(named["train"], "train_data")
        own = None if named["valid"] is None else _python(named["valid"], "valid_data")
    else:
        train, own = _python(data, "train_data"), None
    if valid is not None:
        if own is not None:
            raise InputError(f"There are validation rows in {own.name} already: give one of both.")
        found = isinstance(valid, str | Path)
        own = _in_place(valid, tell, ask)[0] if found else _python(valid, "valid_data")
    return train, own


def rows_of(source: Source) -> Iterator[tuple[str, Row]]:
    """All rows, each after its name; InputError."""
    return (row for block in source.blocks() for row in block.rows())


def source_of(path: Path) -> Source:
    """The rows of one file; InputError if there are none to be read."""
    if not path.exists():
        raise InputError(f"The data {path} does not exist: give a file or a folder.")
    if format_of(path) is None:
        raise InputError(f"{path} is not a file of rows that is known: give {ENDINGS}.")
    return Files({path.name: path})


def _in_place(data: str | Path, tell: OnEvent | None, ask: bool) -> tuple[Source, Source | None]:
    """Those of a file or folder, or of a repository of the hub."""
    place = Path(data).expanduser()
    own = None if format_of(place) else repository.named(data)
    if own is not None:
        train, valid = repository.fetch(own, lambda name: format_of(Path(name)), tell, ask=ask)
        return Files(train), Files(valid) if valid else None
    if not place.is_dir():
        return source_of(place), None
    if (place / "state.json").is_file():  # one split of `save_to_disk`
        return Files(_saved(place, "")), None
    for folder in (place, place / "data"):  # as repositories of data sets have it
        if train := split_in(place, folder, "train"):
            valid = split_in(place, folder, "valid")
            return Files(train), Files(valid) if valid else None
    others = [path for path in rows_in(place) if _stem(path) not in SPLITS["valid"]]
    if len(others) == 1:
        valid = split_in(place, place, "valid")
        return Files({others[0].name: others[0]}), Files(valid) if valid else None
    raise InputError(
        f"{place} has no file train.jsonl, nor one of another format; put the training rows there "
        f"({ENDINGS})."
    )


def rows_in(folder: Path) -> list[Path]:
    """Files of a folder that look as if they held rows."""
    with _told(folder):
        return sorted(path for path in folder.iterdir() if format_of(path) and path.is_file())


def _stem(path: Path) -> str:
    """The name of a file without what tells its format."""
    return path.name[: path.name.lower().rindex(str(format_of(path)))]


def split_in(place: Path, folder: Path, split: str) -> dict[str, Path]:
    """The files of a split in a folder, by their names from `place`; InputError if several could be
    it."""
    found: dict[str, list[Path]] = {}
    with _told(folder):
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in entries:
        if (path / "state.json").is_file() and path.name in SPLITS[split]:
            found[path.name] = [path]
        elif format_of(path):
            stem = _stem(path)
            shard = SHARD.fullmatch(stem)
            if (shard["split"] if shard else stem) in SPLITS[split]:
                kind = path.name[len(stem) :]
                form = f"{shard['split']}-*-of-{shard['count']}{kind}" if shard else path.name
                found.setdefault(form, []).append(path)
    if len(found) > 1:
        raise InputError(
            f"{folder} has {' and '.join(sorted(found))}: keep one of them, or name the file."
        )
    for form, paths in found.items():
        shard = SHARD.fullmatch(_stem(paths[0])) if format_of(paths[0]) else None
        if shard and len(paths) != int(shard["count"]):
            raise InputError(
                f"{folder} has {len(paths)} of the files {form}: put all of them there."
            )
        if (paths[0] / "state.json").is_file():
            return _saved(paths[0], f"{paths[0].relative_to(place).as_posix()}/")
        return {path.relative_to(place).as_posix(): path for path in paths}
    return {}


def _saved(folder: Path, before: str) -> dict[str, Path]:
    """The files of a folder that `save_to_disk` made."""
    state = read_json(folder / "state.json")
    listed = state.get("_data_files")
    names = [
        own["filename"]
        for own in (listed if isinstance(listed, list) else [])
        if isinstance(own, dict) and isinstance(own.get("filename"), str)
    ]
    if not names or any(Path(name).name != name or not format_of(Path(name)) for name in names):
        raise InputError(f"{folder / 'state.json'} does not name the files of its rows.")
    return {before + name: folder / name for name in names}


def _python(data: Any, name: str) -> Source:
    """Rows that a program has."""
    if hasattr(data, "with_format") and hasattr(data, "iter"):  # of `datasets`
        table = data.with_format("arrow")
        return Table(name, lambda n: (b for own in table.iter(n) for b in own.to_batches(n)))
    if hasattr(data, "to_batches") and hasattr(data, "schema"):  # a table of Arrow
        return Table(name, data.to_batches, data.nbytes)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        return Lines.of(data, name)
    raise InputError(
        f"{name} is {_kind(data)}: give a list of dicts, an iterator of them, a datasets.Dataset, "
        "or an Arrow table."
    )


def _line_of(row: Any, source: str) -> bytes:
    """A row of Python as a line of JSON."""
    if not isinstance(row, Mapping):
        raise InputError(f"{source}: the row must be a dict, not {_kind(row)}.")
    try:
        line = json.dumps(dict(row), ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: the row cannot be written as JSON: {reason}.") from None
    return _within(line, source)


def _kind(value: Any) -> str:
    return KINDS.get(type(value), f"a {type(value).__name__}")


# ---- reading files


@contextmanager
def _told(path: Path | str) -> Iterator[None]:
    """What fails within is an InputError about the file."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read: {reason}.") from error
    except Exception as error:  # Arrow's own, MemoryError, and what a broken file makes of them
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} cannot be read: {reason}.") from error


class _Unpacked(io.RawIOBase):
    """What a compressed file becomes, as long as it is no bomb."""

    def __init__(self, file: BinaryIO, codec: str, size: int, name: str):
        import pyarrow as pa

        self._stream: Any = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec)
        self._unpacked, self._size, self._name = 0, size, name

    def close(self) -> None:
        self._stream = None  # its buffers are large, and an error may keep us for a while
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = self._stream.readinto(buffer)  # read() would lose its bytes at an error
        self._unpacked += got
        _check_growth(self._name, self._unpacked, self._size)
        return got


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The content of a file, unpacked, and how many of its bytes have been read since one asked."""
    with open_regular(path) as raw:
        told = 0

        def read() -> int:
            nonlocal told
            before, told = told, raw.tell()
            return told - before

        codec = PACKED.get(path.suffix.lower())
        if codec is None:
            yield raw, read
        else:
            unpacked = _Unpacked(raw, codec, path.stat().st_size, path.name)
            with io.BufferedReader(unpacked, 1 << 16) as file:
                yield file, read  # type: ignore[misc]


def _within(line: bytes, source: str) -> bytes:
    """The line of a row; InputError if it is too long."""
    if len(line) > MOST_BYTES:
        raise InputError(
            f"{source}: the row has more than {MOST_BYTES >> 20} MiB; split it into several."
        )
    return line


def _lines(path: Path) -> Iterator[Block]:
    """Blocks of a file whose rows are lines."""
    with _opened(path) as (file, read):
        yield from _whole_lines(file, read, path.name)


def _whole_lines(file: BinaryIO, read: Callable[[], int], name: str) -> Iterator[Block]:
    first = 1
    while payload := file.read(BLOCK):
        if not payload.endswith(b"\n"):
            payload += file.readline(MOST_BYTES + 1)
        end = payload.removesuffix(b"\n")
        last = payload.count(b"\n", 0, len(end))
        _within(end[end.rfind(b"\n") + 1 :], f"{name}:{first + last}")
        if first == 1:
            payload = payload.removeprefix(codecs.BOM_UTF8)
        yield Block(name, first, read(), payload)
        first += last + 1


def _grouped(lines: Iterable[bytes], read: Callable[[], int] | None = None) -> Iterator[Block]:
    """Blocks of lines, each of which is a row; their sizes are those of the lines, or what was
    read."""
    first, size, own = 1, 0, []
    for line in lines:
        if own and size + len(line) > BLOCK:
            yield Block("", first, read() if read else size, b"\n".join(own))
            first, size, own = first + len(own), 0, []
        own.append(line)
        size += len(line) + 1
    if own:
        yield Block("", first, read() if read else size, b"\n".join(own))


def _json(path: Path) -> Iterator[Block]:
    """A list of objects; or lines, which often have this name too."""
    with _opened(path) as (file, _):
        begin = b" "
        while begin and not begin.strip():
            begin = file.read(1 << 16).removeprefix(codecs.BOM_UTF8)
    with _opened(path) as (file, read):
        if begin.lstrip().startswith(b"["):
            yield from _grouped(_items(file, path.name), read)
        else:
            yield from _whole_lines(file, read, path.name)


SPACE = re.compile(r"[ \t\r\n]*")


def _items(file: BinaryIO, name: str) -> Iterator[bytes]:
    """The items of a JSON list, each in one line; no more than an item is kept in memory."""
    decoder, parser = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    text, at, ended, number = "", 0, False, 0

    def more() -> None:
        nonlocal text, at, ended
        try:
            data = file.read(max(BLOCK, len(text) - at))
            ended = not data
            text, at = text[at:] + decoder.decode(data, final=ended), 0
        except UnicodeDecodeError:
            raise InputError(
                f"{name}:{number + 1}: the row or one after it is not UTF-8; save the file as "
                "UTF-8."
            ) from None

    def next_one() -> str:
        """The next character that is no space; "" at the end."""
        nonlocal at
        while True:
            at = SPACE.match(text, at).end()  # type: ignore[union-attr]
            if at < len(text) or ended:
                return text[at : at + 1]
            more()

    next_one()
    at += 1  # the bracket
    while next_one() != "]" or number:
        number += 1
        source = f"{name}:{number}"
        while True:
            try:
                end = parser.raw_decode(text, at)[1]
                break
            except RecursionError:
                raise InputError(f"{source}: the row is nested too deeply; flatten it.") from None
            except ValueError as error:
                if ended or len(text) - at > MOST_BYTES:
                    reason = getattr(error, "msg", "")
                    long = len(text) - at > MOST_BYTES
                    raise InputError(
                        f"{source}: the row has more than {MOST_BYTES >> 20} MiB, or is not JSON."
                        if long
                        else f"{source}: the row is not JSON ({reason or error}); the file must "
                        "hold a list of objects."
                    ) from None
            more()
        line = text[at:end].replace("\n", " ").replace("\r", " ")
        at = end
        yield _within(line.encode("utf-8", "surrogatepass"), source)
        after = next_one()
        if after not in (",", "]"):
            raise InputError(f"{source}: a comma or the end of the list must follow the row.")
        if after == "]":
            break
        at += 1
        next_one()
    at += 1
    if next_one():
        raise InputError(f"{name} goes on after the end of its list; remove what stands there.")


def _table(path: Path) -> Iterator[Block]:
    """CSV or TSV: the first line has the names of the columns, and every cell is text."""
    with _opened(path) as (file, read):
        delimiter = "\t" if format_of(path) == ".tsv" else ","
        yield from _grouped(_cells(file, path.name, delimiter), read)


def _cells(file: BinaryIO, name: str, delimiter: str) -> Iterator[bytes]:
    number, size = 0, 0

    def lines() -> Iterator[str]:
        nonlocal size
        codec = "utf-8-sig"
        while line := file.readline(MOST_BYTES + 1):
            size += len(line)
            if size > MOST_BYTES:
                raise InputError(
                    f"{name}:{number}: the row has more than {MOST_BYTES >> 20} MiB; split it into "
                    "several, or close its quotes."
                )
            try:
                yield line.decode(codec)
            except UnicodeDecodeError:
                raise InputError(
                    f"{name}:{number}: the row is not UTF-8; save the file as UTF-8."
                ) from None
            codec = "utf-8"

    csv.field_size_limit(MOST_BYTES)
    source = lines()
    first = next(source, "")
    if delimiter == "," and "," not in first and ";" in first:  # where a comma is a decimal point
        delimiter = ";"
    rows = csv.reader(_chained(first, source), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        size = 0
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise InputError(f"{name}:{number}: the row is not CSV ({error}).") from None
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if not names:
            names, number = cells, 1
            if len({*filter(None, names)}) != len([*filter(None, names)]):
                raise InputError(f"{name}: two columns have the same name; rename one of them.")
            continue
        if len(cells) != len(names):
            raise InputError(
                f"{name}:{number}: the row has {len(cells)} cells, and the header {len(names)}; "
                "put quotes around a cell that holds the delimiter or a line end."
            )
        yield json.dumps(dict(zip(names, cells, strict=True)), ensure_ascii=False).encode()
        number += 1


def _chained(first: str, others: Iterable[str]) -> Iterator[str]:
    yield first
    yield from others


# ---- Arrow

ROWS, FEW = 1024, 16  # of a batch
#: What a value takes besides text, about: in Python, and as JSON.
VALUE = 8


def _parquet(path: Path) -> Iterator[Block]:
    """A few rows at a time: a long text may stand in a million rows, and once in the file."""
    import pyarrow.parquet as pq

    open_regular(path).close()
    how: dict[str, Any] = {"memory_map": True, "pre_buffer": False, "buffer_size": 1 << 20}
    how |= {"thrift_string_size_limit": 64 << 20, "thrift_container_size_limit": 1 << 20}
    with pq.ParquetFile(path, **how) as file:
        size, total = path.stat().st_size, file.metadata.num_rows
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        counts = [group.num_rows for group in groups]
        # Arrow makes room for as many rows as it is told of, and ends the process if it cannot.
        if (
            min(counts, default=0) < 0
            or sum(counts) != total
            or (total and not file.metadata.num_columns)
        ):
            raise InputError(f"{path} cannot be read: its numbers of rows are wrong.")
        _check_growth(path.name, VALUE * total, size)
        _check_growth(path.name, sum(group.total_byte_size for group in groups), size)
        rows = 0

        def batches() -> Iterator[tuple[Any, int]]:
            nonlocal rows
            for batch in file.iter_batches(FEW, use_threads=False):
                rows += batch.num_rows
                yield batch, size * rows // max(total, rows)

        yield from _arrow_blocks(path.name, batches(), size)


def _arrow(path: Path) -> Iterator[Block]:
    """An Arrow file or stream, mapped."""
    import pyarrow as pa

    open_regular(path).close()
    size = path.stat().st_size
    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            n = reader.num_record_batches
            batches = ((reader.get_batch(i), size * (i + 1) // n) for i in range(n))
        else:
            file.seek(0)
            batches = ((batch, file.tell()) for batch in pa.ipc.open_stream(file))
        yield from _arrow_blocks(path.name, batches, size)


def _arrow_blocks(
    name: str, batches: Iterable[tuple[Any, int]], size: int | None = None
) -> Iterator[Block]:
    """Blocks of record batches, each with the bytes of the file that have been read with it.

    InputError for a batch that is not well formed, and for a bomb.
    """
    first, rows, weighed, told, read = 1, 0, 0, 0, 0
    parts: list[Any] = []

    def block() -> Block:
        own = sum(weight for _, weight in parts) if size is None else read - told
        return Block(name, first, own, _as_stream([part for part, _ in parts]), "arrow")

    for batch, read in batches:
        batch.validate(full=True)
        names = batch.schema.names
        if len({*names}) != len(names):
            raise InputError(f"{name}: two columns have the same name; rename one of them.")
        for part, weight in _parts(batch, name, first + rows):
            weighed += weight
            if size is not None:
                _check_growth(name, weighed, size)
            if parts and sum(own for _, own in parts) + weight > BLOCK:
                yield block()
                first, rows, told, parts = first + rows, 0, read, []
            parts.append((part, weight))
            rows += part.num_rows
    if parts:
        yield block()


def _check_growth(name: str, unpacked: int, size: int) -> None:
    """InputError if so many bytes come of a file of this size."""
    if unpacked > SLACK + MOST_UNPACKED * size:
        raise InputError(
            f"{name} unpacks to more than {MOST_UNPACKED} times its size; write it in another "
            "format if that is right."
        )


def _parts(batch: Any, name: str, first: int) -> Iterator[tuple[Any, int]]:
    """Slices of a batch that are small when they are written out, and how large."""
    for at in range(0, batch.num_rows, ROWS):
        waiting = [batch.slice(at, ROWS)]
        while waiting:
            part = waiting.pop()
            weight, n = _weight(part.to_struct_array()), part.num_rows
            if weight > BLOCK and n > 1:
                waiting += [part.slice(n // 2), part.slice(0, n // 2)]
                continue
            if weight > MOST_BYTES:
                raise InputError(
                    f"{name}:{first}: the row has more than {MOST_BYTES >> 20} MiB; split it into "
                    "several."
                )
            first += n
            yield part, weight


def _weight(column: Any) -> int:
    """Bytes of the texts and values of an array, written out."""
    import pyarrow.types as types

    kind, own = column.type, VALUE * len(column)
    if types.is_dictionary(kind) and _is_text(kind.value_type):
        return own + _sum(_called("binary_length", column.dictionary).take(column.indices))
    if _is_text(kind):
        return own + _sum(_called("binary_length", column))
    if _is_list(kind):
        return own + _weight(column.flatten())
    if types.is_struct(kind):
        return own + sum(map(_weight, column.flatten()))
    return own


def _called(function: str, array: Any) -> Any:
    import pyarrow.compute as pc

    return pc.call_function(function, [array])


def _sum(array: Any) -> int:
    return _called("sum", array).as_py() or 0


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind)


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _as_stream(parts: list[Any]) -> bytes:
    """Slices as an Arrow stream, without dictionaries."""
    import pyarrow as pa

    plain = pa.schema([own.with_type(_plain(own.type)) for own in parts[0].schema])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, plain) as writer:
        for part in parts:
            writer.write_batch(part.cast(plain))
    return sink.getvalue().to_pybytes()


def _plain(kind: Any) -> Any:
    """A type without dictionaries."""
    import pyarrow as pa
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if _is_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_struct(kind):
        return pa.struct([own.with_type(_plain(own.type)) for own in kind])
    return kind


# ---- parsing


def _parse_lines(block: Block) -> Iterator[tuple[str, Row]]:
    lines = block.payload.split(b"\n") if block.payload.strip() else ()
    for number, line in enumerate(lines, block.first):
        if line.strip():
            source = f"{block.name}:{number}"
            yield source, _parse(_within(line, source), source)


def _parse(line: bytes, source: str) -> Row:
    try:
        row = json.loads(line.decode())
        # JSON may spell half of a surrogate pair, which no tokenizer takes.
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8."
        ) from error
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: the row holds a lone surrogate (\\ud800 to \\udfff), not a character; "
            "remove it."
        ) from error
    except RecursionError as error:
        raise InputError(f"{source}: the row is nested too deeply; flatten it.") from error
    except ValueError as error:
        raise InputError(
            f"{source}: the line is not JSON ({error}); each line must hold one object."
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{source}: the row must be a JSON object, not {KINDS[type(row)]}.")
    return row


def _parse_arrow(block: Block) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa

    with _told(block.name):
        number = block.first
        for batch in pa.ipc.open_stream(block.payload):
            names = batch.schema.names
            columns = [_readable(column) for column in batch.columns]
            for i in range(batch.num_rows):
                values = zip(names, columns, strict=True)
                yield f"{block.name}:{number}", {name: own(i) for name, own in values}
                number += 1


def _readable(column: Any) -> Callable[[int], Any]:
    """The values of a column by row."""
    if _is_json(column.type):
        return lambda i: column[i].as_py()
    other = Other(str(column.type)[:60])
    return lambda i: other if column[i].is_valid else None


def _is_json(kind: Any) -> bool:
    """Whether the values of a type are those of JSON."""
    import pyarrow.types as types

    if _is_list(kind) or types.is_dictionary(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(kind.field(i).type) for i in range(kind.num_fields))
    plain = (types.is_boolean, types.is_integer, types.is_floating, types.is_null, _is_text)
    return any(own(kind) for own in plain)


_PARSERS: dict[str, Callable[[Block], Iterator[tuple[str, Row]]]] = {
    "lines": _parse_lines,
    "arrow": _parse_arrow,
}
#: How files are read, by their ending.
READERS: dict[str, Callable[[Path], Iterator[Block]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}
ARROW = (".parquet", ".arrow", ".feather")  # compress their content themselves
PACKED = {".gz": "gzip", ".zst": "zstd"}
ENDINGS = ", ".join(READERS)
