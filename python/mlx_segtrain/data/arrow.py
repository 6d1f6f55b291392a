"""Record batches as blocks of rows, and the batches of Arrow files and streams."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import open_regular
from . import limits
from .blocks import OTHER, Block
from .limits import VALUE, check_columns, check_growth, check_held, check_length

ROWS = 1024  # of a batch


def table_of(data: Any) -> Any:
    """A table of pandas, polars or others as one of Arrow, without the index of pandas."""
    import pyarrow as pa

    table = pa.table(data)
    return table.drop_columns([x for x in table.column_names if x.startswith("__index_level_")])


# ---- files and streams

MAGIC = b"ARROW1"
# The kinds of a message.
SCHEMA, DICTIONARY, BATCH = 1, 2, 3


def read(path: Path) -> Iterator[Block]:
    """The blocks of an Arrow file or stream, which is mapped."""
    import pyarrow as pa

    open_regular(path).close()
    size = path.stat().st_size
    with pa.memory_map(str(path)) as file:
        yield from blocks_of(path.name, _batches(file, path.name, size), size)


def _batches(file: Any, name: str, size: int) -> Iterator[tuple[Any, int]]:
    """Each batch, with the bytes of the file that have been read with it.

    A file is a stream between two magic words, and is read as one, so that each message that Arrow
    reads has been looked at: the buffers of one are unpacked together.
    """
    import pyarrow as pa

    count = _batches_of_file(file, size) if file.read(len(MAGIC)) == MAGIC else None
    start = 0 if count is None else 8
    file.seek(start)
    if (schema := _next(file)) and schema.kind == SCHEMA:
        check_columns(name, _fields(schema.header.tables(1), limits.MOST_COLUMNS))
    file.seek(start)
    reader = pa.ipc.open_stream(file)
    total, n, dictionaries = 0, 0, dict[int, int]()
    while count is None or n < count:
        at = file.tell()
        while message := _next(file):
            unpacked = message.unpacked()
            total += unpacked
            check_growth(name, total, size)
            if message.kind == DICTIONARY:
                key, more = message.header.integer(0, "<q"), message.header.integer(2, "<b")
                # A dictionary that grows is copied, even if it is not compressed.
                unpacked += dictionaries.get(key, 0) + len(message.body) if more else 0
                dictionaries[key], unpacked = unpacked, 0
            check_held(name, sum(dictionaries.values()) + unpacked, size)
            if message.kind == BATCH:
                break
        file.seek(at)
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            break
        n += 1
        yield batch, file.tell() if count is None else size * n // count
    if count is not None and n < count:
        raise ValueError("batches are missing")


def _batches_of_file(file: Any, size: int) -> int:
    """How many record batches the end of a file tells of."""
    file.seek(max(size - 10, 0))
    end = file.read(10)
    length = struct.unpack("<i", end[:4])[0] if end[4:] == MAGIC else -1
    if not 0 < length <= size - 18:
        raise ValueError("its end is missing")
    file.seek(size - 10 - length)
    return _Flat.root(file.read(length)).vector(3)[0]


class _Flat(NamedTuple):
    """A table of a flatbuffer, in which Arrow keeps what it tells of its buffers."""

    data: Any
    at: int

    @classmethod
    def root(cls, data: Any) -> _Flat:
        return cls(data, struct.unpack_from("<I", data)[0])

    def field(self, i: int) -> int | None:
        """Where field i is, if there is one."""
        vtable = self.at - self._read("<i", self.at)
        entry = 4 + 2 * i
        offset = self._read("<H", vtable + entry) if entry < self._read("<H", vtable) else 0
        return self.at + offset if offset else None

    def integer(self, i: int, form: str) -> int:
        at = self.field(i)
        return 0 if at is None else self._read(form, at)

    def table(self, i: int) -> _Flat | None:
        at = self.field(i)
        return None if at is None else _Flat(self.data, at + self._read("<I", at))

    def vector(self, i: int) -> tuple[int, int]:
        """The length of a vector, and where its items begin."""
        at = self.field(i)
        if at is None:
            return 0, 0
        start = at + self._read("<I", at)
        return self._read("<I", start), start + 4

    def tables(self, i: int) -> Iterator[_Flat]:
        count, start = self.vector(i)
        for at in range(start, start + 4 * count, 4):
            yield _Flat(self.data, at + self._read("<I", at))

    def _read(self, form: str, at: int) -> int:
        return struct.unpack_from(form, self.data, at)[0]


def _fields(fields: Iterator[_Flat], most: int) -> int:
    """Columns and those within them, counted to just above `most`: they may be shared, so that a
    small schema tells of many."""
    count = 0
    for field in fields:
        count += 1 + _fields(field.tables(5), most - count)
        if count > most:
            break
    return count


class _Message(NamedTuple):
    kind: int
    header: _Flat
    body: memoryview

    def unpacked(self) -> int:
        """The bytes of its buffers that are compressed, as each says before it begins."""
        batch = self.header.table(1) if self.kind == DICTIONARY else self.header
        if self.kind == SCHEMA or batch is None or batch.field(3) is None:
            return 0
        count, start = batch.vector(2)
        buffers = struct.iter_unpack("<qq", memoryview(batch.data)[start : start + 16 * count])
        sizes = (struct.unpack_from("<q", self.body, at)[0] for at, length in buffers if length)
        return sum(max(size, 0) for size in sizes)  # -1: this one is not compressed


def _next(file: Any) -> _Message | None:
    """The next message; None at the end."""
    import pyarrow as pa

    try:
        message = pa.ipc.read_message(file)
    except EOFError:
        return None
    own = _Flat.root(message.metadata)
    header = own.table(2)
    if header is None:
        raise ValueError("a message of it has no header")
    return _Message(own.integer(1, "<B"), header, memoryview(message.body))


# ---- batches


def blocks_of(
    name: str, batches: Iterable[tuple[Any, int]], size: int | None = None
) -> Iterator[Block]:
    """Blocks of record batches, each with the bytes of the file that have been read with it.

    InputError for a batch that is not well formed, and for a bomb.
    """
    first, rows, weighed, before, read = 1, 0, 0, 0, 0
    parts: list[Any] = []

    def block() -> Block:
        own = sum(weight for _, weight in parts) if size is None else read - before
        return Block(name, first, own, _as_stream([part for part, _ in parts]), "arrow")

    for batch, read in batches:
        batch.validate(full=True)
        names = batch.schema.names
        check_columns(name, len(names))
        if len({*names}) != len(names):
            raise InputError(f"{name}: two columns have the same name; rename one of them.")
        if size is not None:  # rows that take nothing are many, too
            check_growth(name, weighed + VALUE * batch.num_rows, size)
        for part, weight in _parts(batch, name, first + rows):
            weighed += weight
            if size is not None:
                check_growth(name, weighed, size)
            if parts and sum(own for _, own in parts) + weight > limits.BLOCK:
                yield block()
                first, rows, before, parts = first + rows, 0, read, []
            parts.append((part, weight))
            rows += part.num_rows
    if parts:
        yield block()


def _of_json(batch: Any) -> Any:
    """A batch whose columns of other values than JSON's, such as images, are whether there is one:
    nothing reads them, and their size is not known."""
    import pyarrow as pa

    fields, columns = [], []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if is_json(field.type):
            fields.append(pa.field(field.name, field.type))
            columns.append(column)
        else:
            kind = {OTHER: str(field.type)[:60].encode()}
            fields.append(pa.field(field.name, pa.bool_(), metadata=kind))
            columns.append(_called("is_valid", column))
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields)) if columns else batch


def _parts(batch: Any, name: str, first: int) -> Iterator[tuple[Any, int]]:
    """Slices of a batch that are small when they are written out, and how large."""
    for at in range(0, batch.num_rows, ROWS):
        waiting = [_of_json(batch.slice(at, ROWS))]
        while waiting:
            part = waiting.pop()
            weight, n = _weight(part.to_struct_array()), part.num_rows
            if weight > limits.BLOCK and n > 1:
                waiting += [part.slice(n // 2), part.slice(0, n // 2)]
                continue
            check_length(weight, f"{name}:{first}")
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


# ---- types


def is_json(kind: Any) -> bool:
    """Whether the values of a type are those of JSON."""
    import pyarrow.types as types

    if _is_list(kind):
        return is_json(kind.value_type)
    if types.is_dictionary(kind):  # of lists there are none but bombs
        return _is_scalar(kind.value_type)
    if types.is_struct(kind):
        return all(is_json(kind.field(i).type) for i in range(kind.num_fields))
    return _is_scalar(kind)


def _is_scalar(kind: Any) -> bool:
    import pyarrow.types as types

    plain = (types.is_boolean, types.is_integer, types.is_floating, types.is_null, _is_text)
    return any(own(kind) for own in plain)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind)


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
