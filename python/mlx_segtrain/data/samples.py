"""Stores the samples of a source in Arrow record batches, one for each block of rows.

A batch contains whole samples: their tokens, and their weights as runs of equal weights. Values
that depend on max_seq_length are computed on access, for all samples at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import ROWS
from ..errors import InputError, either
from .columns import Columns
from .encoding import Encoder, Options, Pair, Row, sequences
from .formats import FORMATS, SIDES, Record, checked, encode, quoted
from .messages import Other
from .notes import FINDINGS, MOST_NAMED, Notes
from .template import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

    from .blocks import Block
    from .sources import Source

#: The number of rows to tokenize in one call: enough to keep the tokenizer's threads busy without
#: using much memory.
ROWS_PER_CALL = 512
#: The findings, in the order of the bits that represent them.
BITS = tuple(FINDINGS)
ABOUT = b"about"
#: The only key of the JSON object that represents an Other.
OTHER = "\0other"


def records_of(block: Block, options: Options, first: dict[str, str]) -> Iterator[Record]:
    """Yields the records of a block. Adds the first row of each new format to `first`.

    Raises InputError for a row that cannot be read or that the method does not accept, and for
    pairs that are mixed with other rows.
    """
    for source, row in block.rows():
        record = checked(row, source, options.format, options.columns)
        if record.format not in first:
            check_method({record.format: record.source}, options.method)
            check_mixed({**first, record.format: record.source})
            first[record.format] = record.source
        yield record


def count(source: Source, options: Options) -> Counter[str]:
    """Counts the rows of a source by format, without tokenizing. Raises InputError."""
    first: dict[str, str] = {}
    records = (own for block in source.blocks() for own in records_of(block, options, first))
    found = Counter(record.format for record in records)
    if not found:
        raise InputError(f"{source.name} has no rows; add some.")
    return found


def format_of(formats: Collection[str]) -> str:
    """Returns the format if there is only one, and "mixed" otherwise."""
    return next(iter(formats)) if len(formats) == 1 else "mixed"


def check_method(first: dict[str, str], method: str | None) -> None:
    """Raises InputError if the method does not accept one of these formats."""
    for name, source in first.items():
        own = FORMATS[name]
        if method is None or ROWS[method] in own.rows:
            continue
        wanted = [other for other in FORMATS.values() if other.rows[0] == ROWS[method]]
        if ROWS[method] != "single":
            keys = quoted(wanted[0].keys)
            raise InputError(f"{source}: the row must have the keys {keys} for method {method}.")
        methods = either([name for name, rows in ROWS.items() if rows in own.rows])
        raise InputError(
            f"{source}: the row has {quoted(own.marks)}, which method {method} does not accept: "
            f"use method {methods}, or set data_format to another format."
        )


def check_mixed(first: dict[str, str]) -> None:
    """Raises InputError if pairs are mixed with other rows."""
    kinds = {FORMATS[name].rows[0] == "pair" for name in first}
    if len(kinds) > 1:
        *_, last = first.values()
        raise InputError(
            f"{last}: preference pairs and other rows cannot be mixed; put them into separate "
            "files."
        )


def batch_of(
    block: Block, tokenizer: Tokenizer, options: Options, first: dict[str, str]
) -> pa.RecordBatch:
    """Returns the samples of a block as a batch, with the block's notes and formats as metadata.
    The result depends only on this block. Raises InputError."""
    encoder = Encoder(tokenizer, options)
    records = records_of(block, options, first)
    rows: list[Row | Pair] = []
    owner, contents = [], []  # the record of each sample; the hash of each record
    while chunk := list(islice(records, ROWS_PER_CALL)):
        encoded = encode(encoder, chunk)
        at = -1
        for row in encoded:
            while at < 0 or chunk[at].source != row.source:
                at += 1
            owner.append(len(contents) + at)
        rows += encoded
        contents += map(_content, chunk)
    about = {"notes": encoder.notes.of_rows(), "formats": first, "size": block.size}
    return _batch(rows, np.array(owner, np.int64), np.array(contents, np.uint64), about)


def _content(record: Record) -> int:
    """Returns a hash of the values that are read from a row. Equal rows have equal hashes."""
    own = FORMATS[record.format]
    keys = record.row if own.reads_all else (*own.keys, *own.means, *own.more)
    named = {key: record.row.get(key) for key in keys}
    used = {key: value for key, value in named.items() if value is not None}
    text = json.dumps([record.format, used], sort_keys=True, separators=(",", ":"), default=str)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _batch(
    rows: Sequence[Row | Pair], owner: np.ndarray, contents: np.ndarray, about: dict[str, Any]
) -> pa.RecordBatch:
    import pyarrow as pa

    columns: dict[str, Any] = {
        "record": _column(owner.astype(np.int32)),
        "content": _column(contents[owner]),
        "source": _texts([row.source for row in rows]),
    }
    if rows and isinstance(rows[0], Pair):
        columns["shared"] = _column(np.array([getattr(row, "shared", 0) for row in rows], np.int32))
    if rows and isinstance(rows[0], Row) and rows[0].given is not None:
        given = [json.dumps(getattr(row, "given", None), default=_marked) for row in rows]
        columns["given"] = _texts(given)
    for side, own in enumerate(zip(*map(sequences, rows), strict=True)):
        columns |= {f"{name}{side}": column for name, column in _side(own).items()}
    schema = {name: column.type for name, column in columns.items()}
    metadata = {ABOUT: json.dumps({**about, "sides": len(sequences(rows[0])) if rows else 1})}
    return pa.RecordBatch.from_arrays(
        list(columns.values()), schema=pa.schema(schema, metadata=metadata)
    )


def _marked(value: Other) -> dict[str, str]:
    return {OTHER: value.kind}


def _unmarked(found: dict[str, Any]) -> Any:
    return Other(found[OTHER]) if found.keys() == {OTHER} else found


def _side(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the columns that store one sequence per sample. `ends` contains the end of each run
    of equal weights, counted from the start of the row."""
    lengths = np.array([len(row) for row in rows], np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([np.zeros(0, np.int32), *(row.ids for row in rows)])
    weights = np.concatenate([np.zeros(0, np.float32), *(row.weights for row in rows)])
    change = np.zeros(len(ids), bool)
    change[1:] = weights[1:] != weights[:-1]
    change[bounds[:-1][lengths > 0]] = True
    starts = np.flatnonzero(change)
    ends = np.append(starts[1:], len(ids))[: len(starts)]
    of = np.searchsorted(bounds, starts, side="right") - 1  # the row of each run
    runs = np.searchsorted(starts, bounds)
    top = np.zeros(len(rows), np.int32)
    if len(ids):
        top[lengths > 0] = np.maximum.reduceat(ids, bounds[:-1][lengths > 0])
    small = np.uint16 if top.max(initial=0) < 1 << 16 else np.int32
    found = [sum(1 << BITS.index(name) for name in row.findings) for row in rows]
    return {
        "ids": _lists(bounds, _column(ids.astype(small))),
        "ends": _lists(runs, _column((ends - bounds[of]).astype(np.int32))),
        "weights": _lists(runs, _column(weights[starts])),
        "top": _column(top),
        "turns": _column(np.array([row.turns for row in rows], np.int32)),
        "findings": _column(np.array(found, np.uint32)),
    }


def _lists(bounds: np.ndarray, values: Any) -> Any:
    import pyarrow as pa

    return pa.ListArray.from_arrays(_column(bounds.astype(np.int32)), values)


# The functions below replace Arrow's own conversions, which would import pandas if it is installed.
# That import takes half a second.


def _column(array: np.ndarray) -> Any:
    """Returns an Arrow column that shares its memory with an array."""
    import pyarrow as pa

    values = pa.py_buffer(np.ascontiguousarray(array))
    return pa.Array.from_buffers(pa.from_numpy_dtype(array.dtype), len(array), [None, values])


def _texts(texts: Sequence[str]) -> Any:
    """Returns an Arrow column of strings."""
    import pyarrow as pa

    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)])
    offsets = pa.py_buffer(ends.astype(np.int32))
    return pa.StringArray.from_buffers(len(texts), offsets, pa.py_buffer(b"".join(encoded)))


def _numbers(array: Any) -> np.ndarray:
    """Returns an array that shares its memory with a column without nulls."""
    return np.from_dlpack(array)


def beginnings(ascending: np.ndarray) -> np.ndarray:
    """Returns the index of the first element of each run of equal numbers, int64. The numbers must
    be ascending and non-negative."""
    return np.flatnonzero(np.diff(ascending, prepend=-1))


class _Side:
    """The columns of a batch that store one sequence per sample, in memory or in a mapped file."""

    def __init__(self, batch: pa.RecordBatch, side: int):
        def lists(name: str) -> tuple[np.ndarray, np.ndarray]:
            column = batch.column(f"{name}{side}")
            return _numbers(column.offsets), _numbers(column.values)

        self.bounds, self.ids = lists("ids")
        self.runs, self.ends = lists("ends")
        _, self.weights = lists("weights")
        self.top, self.turns, self.findings = (
            _numbers(batch.column(f"{name}{side}")) for name in ("top", "turns", "findings")
        )

    def row(self, j: int, source: str) -> Row:
        run = slice(*self.runs[j : j + 2])
        weights = np.repeat(self.weights[run], np.diff(self.ends[run], prepend=0))
        found = self.findings[j]
        return Row(
            self.ids[slice(*self.bounds[j : j + 2])].astype(np.int32),
            weights,
            source,
            tuple(name for bit, name in enumerate(BITS) if found >> bit & 1) if found else (),
            turns=int(self.turns[j]),
        )

    @property
    def sign(self) -> np.ndarray:
        """−1 for sequences with weights below 0, and 1 for all others; int64."""
        below = np.concatenate([[0], np.cumsum(self.weights < 0)])
        return np.where(below[self.runs[1:]] > below[self.runs[:-1]], -1, 1)

    def numbers(self, most: int) -> tuple[np.ndarray, ...]:
        """Returns `length`, `first`, `trained` and `top` of each sequence after truncation to
        `most` tokens."""
        whole = np.diff(self.bounds)
        length = np.minimum(whole, most)
        starts = np.zeros_like(self.ends)
        starts[1:] = self.ends[:-1]
        starts[self.runs[:-1][np.diff(self.runs) > 0]] = 0
        own = np.minimum(self.ends, most) - np.minimum(starts, most)
        counted = np.concatenate([[0], np.cumsum(np.where(self.weights != 0, own, 0))])
        trained = counted[self.runs[1:]] - counted[self.runs[:-1]]
        at = np.flatnonzero(self.weights)  # the runs in the loss
        first = np.append(starts[at], 0)[np.searchsorted(at, self.runs[:-1])]
        return length, np.where(trained > 0, first, length), trained, self.top


class _Shard:
    """A batch and the content of its metadata."""

    def __init__(self, batch: pa.RecordBatch):
        about = json.loads(batch.schema.metadata[ABOUT])
        self.formats: dict[str, str] = about["formats"]
        self.notes = Notes.read(about["notes"])
        self.size: int = about["size"]
        self.n = batch.num_rows
        self.batch = batch
        self.sides = [_Side(batch, side) for side in range(about["sides"])] if self.n else []

    def row(self, j: int) -> Row | Pair:
        source = self.batch.column("source")[j].as_py()
        if len(self.sides) == 1:
            row = self.sides[0].row(j, source)
            if "given" not in self.batch.schema.names:
                return row
            given = self.batch.column("given")[j].as_py()
            return replace(row, given=json.loads(given, object_hook=_unmarked))
        chosen, rejected = (
            side.row(j, f"{source} {name}") for side, name in zip(self.sides, SIDES, strict=True)
        )
        return Pair(chosen, rejected, self.batch.column("shared")[j].as_py(), source)


class Samples:
    """All samples of a source, accessible by index and not truncated."""

    def __init__(self, batches: Sequence[pa.RecordBatch]):
        self._shards = [_Shard(batch) for batch in batches]
        self._starts = np.cumsum([0, *(own.n for own in self._shards)])
        self.formats: dict[str, str] = {}
        for own in self._shards:
            self.formats = {**own.formats, **self.formats}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, i: int) -> Row | Pair:
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._shards[shard].row(i - int(self._starts[shard]))

    def _column(self, name: str) -> np.ndarray:
        own = [_numbers(x.batch.column(name)) for x in self._shards if x.n]
        return np.concatenate(own) if own else np.zeros(0, np.int64)

    @cached_property
    def content(self) -> np.ndarray:
        """The hash of each sample's row (_content), uint64 [n]."""
        return self._column("content")

    @cached_property
    def record(self) -> np.ndarray:
        """For each sample, the index of its row among all rows read; ascending, int64 [n]."""
        before = np.cumsum([0, *(own.notes.rows for own in self._shards)])[:-1]
        return self._column("record").astype(np.int64) + np.repeat(before, np.diff(self._starts))

    @property
    def n_rows(self) -> int:
        """The number of rows that were read."""
        return sum(own.notes.rows for own in self._shards)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each sample's sequences, int64 [n, s]."""
        own = [np.stack([np.diff(side.bounds) for side in x.sides], 1) for x in self._shards if x.n]
        return np.concatenate(own or [np.zeros((0, 1))]).astype(np.int64)

    @cached_property
    def shared(self) -> np.ndarray:
        """The number of shared tokens of each pair (Pair.shared), and 0 for other samples; int64
        [n]."""
        if any(len(own.sides) == 2 for own in self._shards):
            return self._column("shared").astype(np.int64)
        return np.zeros(len(self), np.int64)

    @property
    def size(self) -> int:
        """The size, in bytes, of the data from which the samples were read."""
        return sum(own.size for own in self._shards)

    @property
    def format(self) -> str:
        """The format of the rows, or mixed if there are several formats."""
        return format_of(self.formats)

    def columns(self, most: int) -> Columns:
        """Returns the columns of all samples after truncation on the right to `most` tokens.
        However, `shared` and `top` always cover all tokens. Because pairs are also truncated on the
        left, their columns are correct only if both sequences have at most `most` tokens."""
        parts = [[side.numbers(most) for side in own.sides] for own in self._shards if own.n]
        if not parts:
            return Columns.of([])
        table = np.concatenate([np.array(part, np.int64) for part in parts], axis=2)
        length, first, trained, top = table.transpose(1, 2, 0)
        signs = np.concatenate([own.sides[0].sign for own in self._shards if own.n])
        return Columns(length, first, trained, top, self.shared.copy(), signs)

    def notes(self, chosen: np.ndarray | None = None) -> Notes:
        """Returns the findings and counts for the `chosen` samples (ascending indices), or for all
        samples. `ignored`, `repeated`, `unwanted` and `formats` always count all rows."""
        notes = Notes()
        for own in self._shards:
            notes.add(own.notes)
        if chosen is not None:
            notes.rows = len(beginnings(self.record[chosen]))
        sides = [own.sides for own in self._shards if own.n]
        turns, findings = (
            np.concatenate([np.stack([getattr(x, name) for x in own], 1) for own in sides])
            if sides
            else np.zeros((0, 1), np.uint32)
            for name in ("turns", "findings")
        )
        if chosen is not None:
            turns, findings = turns[chosen], findings[chosen]
        notes.samples, notes.turns = int(np.count_nonzero(turns)), int(turns.sum())
        for bit, name in enumerate(BITS):
            places = np.argwhere(findings >> np.uint32(bit) & np.uint32(1))
            named = notes.where.setdefault(name, []) if len(places) else []
            notes.findings.update({name: len(places)} if len(places) else {})
            for i, side in places:
                if len(named) == MOST_NAMED:
                    break
                row = self.row(int(i if chosen is None else chosen[i]))
                source = sequences(row)[side].source
                named += [source] if source not in named[-1:] else []
        return notes
