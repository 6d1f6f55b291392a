"""Converts Arrow record batches to blocks of rows.

Other modules import this module inside functions, because importing pyarrow is slow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types

from ..errors import InputError
from . import limits
from .blocks import OTHER, Block
from .limits import VALUE, check_columns, check_growth, check_length

ROWS = 1024  #: maximum rows per batch


def table_of(data: Any) -> Any:
    """Converts a table from pandas, polars or another library to Arrow, without the pandas
    index."""
    table = pa.table(data)
    return table.drop_columns([x for x in table.column_names if x.startswith("__index_level_")])


# ---- batches


def blocks_of(
    name: str, batches: Iterable[tuple[Any, int]], size: int | None = None
) -> Iterator[Block]:
    """Groups record batches into blocks of rows, and yields the blocks. `batches` pairs each batch
    with the number of bytes read from the file so far; `size` is the size of the file in bytes, or
    None for a table in memory.

    Raises InputError for an invalid batch or a decompression bomb.
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
        if size is not None:  # even empty rows use memory
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
    """Casts each column to a type that JSON can represent. A column for which there is no such type
    (such as images) is replaced with booleans that indicate whether a row has a value. The values
    themselves are not needed, and their size is unknown."""
    fields, columns = [], []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        leaf, metadata = _other(field.type), None
        if leaf is None:
            column = _cast(column)
        else:
            outer = "list" if _is_list(field.type) else "struct"
            kind = str(leaf) if leaf == field.type else f"{outer} with values of type {leaf}"
            column, metadata = _called("is_valid", column), {OTHER: kind[:60].encode()}
        fields.append(pa.field(field.name, column.type, metadata=metadata))
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields)) if columns else batch


def _cast(column: Any) -> Any:
    """Casts an array so that JSON can represent its values: views become plain strings and lists,
    and decimals, dates and times become text. The type must have no `_other` values."""
    kind = column.type
    if _is_json(kind):
        return column
    if _is_list(kind):
        # Arrow's own cast returns wrong offsets for list views, and casts all values of a slice's
        # parent.
        lengths = _called("list_value_length", column).cast(pa.int64()).fill_null(0)
        offsets = pa.concat_arrays([pa.array([0]), _called("cumulative_sum", lengths)])
        values = _cast(column.flatten())
        return pa.LargeListArray.from_arrays(offsets, values, mask=column.is_null())
    if types.is_struct(kind):
        names = [own.name for own in kind]
        arrays = list(map(_cast, column.flatten()))
        return pa.StructArray.from_arrays(arrays, names, mask=column.is_null())
    if types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(column.indices, _cast(column.dictionary))
    if types.is_timestamp(kind) and kind.tz is not None:
        # The names of time zones are known only if a database is installed.
        column = column.cast(pa.timestamp(kind.unit, "+00:00"))
    return column.cast(pa.large_string())


def _parts(batch: Any, name: str, first: int) -> Iterator[tuple[Any, int]]:
    """Splits a batch into slices of at most limits.BLOCK bytes; a larger row becomes a separate
    slice. Yields each slice with its approximate serialized size in bytes."""
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
    """Returns the approximate serialized size of an array in bytes, with its dictionaries
    expanded."""
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
    return pc.call_function(function, [array])


def _sum(array: Any) -> int:
    return _called("sum", array).as_py() or 0


def _as_stream(parts: list[Any]) -> bytes:
    """Serializes slices as an Arrow stream. Converts dictionary-encoded columns to plain ones."""
    plain = pa.schema([own.with_type(_plain(own.type)) for own in parts[0].schema])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, plain) as writer:
        for part in parts:
            writer.write_batch(part.cast(plain))
    return sink.getvalue().to_pybytes()


def _plain(kind: Any) -> Any:
    """Returns the plain equivalent of a dictionary-encoded type."""
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if _is_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_struct(kind):
        return pa.struct([own.with_type(_plain(own.type)) for own in kind])
    return kind


# ---- types


def _is_json(kind: Any) -> bool:
    """Returns whether JSON can represent values of this type without a cast."""
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        return False
    if _is_list(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(own.type) for own in kind)
    if types.is_dictionary(kind):  # only decompression bombs have dictionaries of lists
        kind = kind.value_type
    plain = (types.is_boolean, types.is_integer, types.is_floating, types.is_null, _is_text)
    return any(own(kind) for own in plain)


def _other(kind: Any) -> Any:
    """Returns the first type within this type whose values JSON cannot represent, even after a
    cast, or None if there is none."""
    if _is_list(kind):
        return _other(kind.value_type)
    if types.is_struct(kind):
        return next(filter(None, (_other(own.type) for own in kind)), None)
    value = kind.value_type if types.is_dictionary(kind) else kind
    dated = (types.is_date, types.is_time, types.is_timestamp)
    cast = (types.is_string_view, types.is_decimal, *dated)
    return None if _is_json(kind) or any(own(value) for own in cast) else kind


def _is_text(kind: Any) -> bool:
    return types.is_string(kind) or types.is_large_string(kind)


def _is_list(kind: Any) -> bool:
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return any(own(kind) for own in (*lists, types.is_list_view, types.is_large_list_view))
