"""The rows of Parquet files, a few at a time: a long text may stand in a million rows, and once in
the file.

What a row group takes is read off its page headers, since Arrow believes them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import open_regular
from . import arrow
from .blocks import Block
from .limits import VALUE, check_columns, check_growth, check_held, check_length, held

FEW = 16  # rows of a batch
#: Bytes that Arrow makes of a byte of the footer, at most: a column takes a thousand.
FOOTER = 320
#: Bytes of a dictionary that is looked at; writers make none of more than one MiB.
LOOKED = 2 << 20


def read(path: Path) -> Iterator[Block]:
    """The blocks of a Parquet file, which is mapped."""
    with (
        open_regular(path) as raw,
        mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        footer = int.from_bytes(data[-8:-4], "little") if data[-4:] == b"PAR1" else 0
        if footer <= len(data) and FOOTER * footer > held(len(data)):
            raise InputError(
                f"{path.name} has too many columns and row groups for its size; write it with "
                "fewer, or as JSON lines."
            )
        yield from arrow.blocks_of(path.name, _batches(path, data), len(data))


def _batches(path: Path, data: mmap.mmap) -> Iterator[tuple[Any, int]]:
    """Each batch, with the bytes of the file that have been read with it, about."""
    name, size = path.name, len(data)
    with _open(path) as file:
        metadata, total = file.metadata, file.metadata.num_rows
        check_columns(name, metadata.num_columns)
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        # Arrow makes room for as many rows as it is told of, and ends the process if it cannot.
        empty = total and not metadata.num_columns
        if min(counts, default=0) < 0 or sum(counts) != total or empty:
            raise ValueError("its numbers of rows are wrong")
        check_growth(name, VALUE * total, size)
        schema, rows, unpacked, packed = _Schema.of(file, name), 0, 0, 0
        for i, chunks in enumerate(_row_groups(data)):
            if not counts[i]:
                continue
            packed += sum(chunk.packed for chunk in chunks)
            if packed > size:  # to look at the same page again and again would take for ever
                raise ValueError("its columns overlap")
            own = _Group.of(chunks, schema, data, name, unpacked)
            unpacked = own.unpacked
            how: Any = {"row_groups": [i], "use_threads": False}
            spelled = {"metadata": metadata, "read_dictionary": own.spelled}
            with _open(path, **spelled) if own.spelled else nullcontext(file) as reader:
                for batch in reader.iter_batches(own.few, **how):
                    rows += batch.num_rows
                    yield batch, size * rows // max(total, rows)


def _open(path: Path, **how: Any) -> Any:
    import pyarrow.parquet as pq

    how |= {"memory_map": True, "pre_buffer": False, "buffer_size": 1 << 20}
    how |= {"thrift_string_size_limit": 64 << 20, "thrift_container_size_limit": 1 << 20}
    return pq.ParquetFile(path, **how)


class _Schema(NamedTuple):
    """The columns in the file, and what Arrow's types for them mean, of which the file may tell as
    it likes.

    Of lists of a fixed size null takes as much: `longest` bytes in a row, and `inner` values for
    each item of a list. `dictionaries` tells whether there are some.
    """

    leaves: list[Any]
    longest: int
    inner: int
    dictionaries: bool

    @classmethod
    def of(cls, file: Any, name: str) -> _Schema:
        """InputError for longer lists than a row may have."""
        kinds, count = file.schema_arrow.types, len(file.schema)
        leaves = [file.schema.column(i) for i in range(count)]
        fixed = [_fixed(kind) for kind in kinds]
        longest = check_length(VALUE * sum(own for own, _ in fixed), name)
        inner = max((items for _, items in fixed), default=0)
        return cls(leaves, longest, inner, any(map(_has_dictionary, kinds)))


def _fixed(kind: Any) -> tuple[int, int]:
    """The values that a type has in a row whatever they are, and for each item of its lists."""
    import pyarrow.types as types

    fields = [_fixed(kind.field(i).type) for i in range(kind.num_fields)]
    own, items = sum(n for n, _ in fields), max((m for _, m in fields), default=0)
    if types.is_fixed_size_list(kind):
        return kind.list_size * max(own, 1), items
    return (own, items) if types.is_struct(kind) else (0, max(own, items))


def _has_dictionary(kind: Any) -> bool:
    import pyarrow.types as types

    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return types.is_dictionary(kind) or any(map(_has_dictionary, inner))


class _Group(NamedTuple):
    """How a row group is read: `few` rows at a time, and `spelled` columns as dictionaries.

    `unpacked` are the bytes of all pages up to its end, with their values.
    """

    few: int
    spelled: list[str]
    unpacked: int

    @classmethod
    def of(
        cls, chunks: list[_Chunk], schema: _Schema, data: mmap.mmap, name: str, unpacked: int
    ) -> _Group:
        """InputError if it cannot be read in small parts."""
        size, spelled = len(data), list[str]()
        # Bytes that all columns take together: at once; for a value of each row; for the values of
        # lists, all of which one row may have.
        taken, longest, listed = 0, schema.longest, 0
        if len(chunks) != len(schema.leaves):
            raise ValueError("columns of it are missing")
        for chunk, leaf in zip(chunks, schema.leaves, strict=True):
            own = _Column.of(chunk, leaf, data, name)
            unpacked += own.unpacked
            taken += own.taken + (VALUE * own.values * schema.inner if own.is_list else 0)
            if not own.is_list:
                longest += own.once
            elif own.can_spell and listed + own.once > held(size) // 4:
                spelled.append(own.path)
            else:
                listed += own.once
            if (
                schema.dictionaries or own.path in spelled
            ):  # it then keeps all texts of the row group
                taken += own.texts
            check_growth(name, unpacked, size)
            check_held(name, taken + longest + listed, size)
        return cls(min(max(held(size) // 4 // max(longest, 1), 1), FEW), spelled, unpacked)


class _Column(NamedTuple):
    """What a column of a row group takes: `taken` bytes at once, `unpacked` in all.

    A long text may stand in the file once for many values. So a value of it may have `once` bytes;
    those of lists, all of which one row may have, together. `texts` are the bytes of those that are
    there in full. `can_spell` tells whether Arrow can give the column as a dictionary.
    """

    path: str
    is_list: bool
    can_spell: bool
    once: int
    texts: int
    values: int
    taken: int
    unpacked: int

    @classmethod
    def of(cls, chunk: _Chunk, leaf: Any, data: mmap.mmap, name: str) -> _Column:
        """InputError if a page of it is too large."""
        is_text, is_list = leaf.physical_type == "BYTE_ARRAY", leaf.max_repetition_level > 0
        can_spell, longest = is_text, 0
        values = repeated = texts = shared = prefixed = largest = dictionary = unpacked = 0
        for page in _pages(data, chunk):
            lengths = VALUE * page.count if page.encoding in Page.LENGTHS else 0
            check_held(name, page.unpacked + lengths, len(data))
            unpacked, values = unpacked + page.unpacked, values + page.count
            if page.kind == Page.DICTIONARY:
                dictionary += page.unpacked
                longest = max(longest, _longest(page, chunk, data) if is_text else 0)
                continue
            if page.encoding in Page.LENGTHS:
                shared += _shared(page, chunk, leaf, data)
            largest = max(largest, page.unpacked + lengths)
            if page.encoding in Page.BY_DICTIONARY:
                repeated += page.count
            else:
                texts += page.unpacked if is_text else 0
                can_spell &= page.encoding == Page.PLAIN
            if page.encoding == Page.PREFIXES:
                prefixed = max(prefixed, page.unpacked)
        if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY":  # of which null takes as much
            longest, repeated = check_length(leaf.length, name), values
        # Arrow has a page at once, a dictionary twice, and of a list where its values are.
        taken = largest + 2 * dictionary + (VALUE * values if is_list else 0)
        once = repeated * longest + shared if is_list else max(longest, prefixed)
        path, unpacked = leaf.path, unpacked + VALUE * values
        return cls(path, is_list, can_spell, once, texts, values, taken, unpacked)


# ---- pages


class Page(NamedTuple):
    """A page as its header tells of it: `count` values, and so many bytes, in the file from `start`
    to `end`; the first `levels` of version 2 are not compressed."""

    kind: int
    count: int
    encoding: int
    unpacked: int
    start: int
    end: int
    levels: int = 0
    is_compressed: bool = True

    # What they are called in the format's description: kinds,
    DATA, DICTIONARY, DATA_2 = 0, 2, 3
    # and encodings. RLE_DICTIONARY has an older name, too; DELTA_LENGTH_BYTE_ARRAY has all lengths
    # before the texts, and so has DELTA_BYTE_ARRAY, whose texts share their beginnings.
    PLAIN, BY_DICTIONARY, PREFIXES, LENGTHS = 0, (2, 8), 7, (6, 7)


#: Arrow's names of codecs, by the format's numbers.
CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


class _Chunk(NamedTuple):
    """Where a column of a row group is in the file, and what is told of it."""

    codec: int
    values: int
    start: int
    packed: int

    @classmethod
    def of(cls, header: Struct) -> _Chunk:
        own = header[STRUCT, 3]
        first, start, packed = own.get((I64, 11), 0), own[I64, 9], own[I64, 7]
        if min(start, packed) < 0:
            raise ValueError("a column of it lies outside")
        return cls(own[I32, 4], own[I64, 5], first if 0 < first < start else start, packed)


def _row_groups(data: mmap.mmap) -> list[list[_Chunk]]:
    """The columns of each row group. What Arrow gives of them may end the process."""
    try:
        size = int.from_bytes(data[-8:-4], "little")
        footer, _ = _struct(data[-8 - size : -8], 0)
        return [[_Chunk.of(own) for own in group[LIST, 1]] for group in footer[LIST, 4]]
    except (LookupError, RecursionError, TypeError):
        raise ValueError("its footer is not well formed") from None


def _pages(data: mmap.mmap, chunk: _Chunk) -> Iterator[Page]:
    """The pages of a column, as Arrow comes to them; ValueError."""
    # It reads a little further where the writer is old.
    at, end, seen = chunk.start, min(chunk.start + chunk.packed + 100, len(data)), 0
    while at < end and seen < chunk.values:
        page = _page(data, at)
        if page.kind in (Page.DATA, Page.DATA_2):
            seen += page.count
        if page.kind in (Page.DATA, Page.DATA_2, Page.DICTIONARY):
            yield page
        at = page.end


def _page(data: mmap.mmap, at: int) -> Page:
    try:
        header, start = _struct(data, at, flat=True)
        kind, unpacked, packed = header[I32, 1], header[I32, 2], header[I32, 3]
        place = {Page.DATA: 5, Page.DICTIONARY: 7, Page.DATA_2: 8}.get(kind, 0)
        own = header.get((STRUCT, place), {})
        count, encoding = 0, 0
        if kind in (Page.DATA, Page.DICTIONARY):
            count, encoding = own[I32, 1], own[I32, 2]
        levels, is_compressed = 0, True
        if kind == Page.DATA_2:
            count, encoding, levels = own[I32, 1], own[I32, 4], own[I32, 5] + own[I32, 6]
            is_compressed = own.get((FALSE, 7), True)
    except LookupError:
        raise ValueError("a page of it has no header") from None
    if min(unpacked, packed, count, levels) < 0 or levels > min(unpacked, packed):
        raise ValueError("a page of it has a wrong size")
    return Page(kind, count, encoding, unpacked, start, start + packed, levels, is_compressed)


def _content(page: Page, chunk: _Chunk, data: mmap.mmap) -> bytes:
    """What a page holds besides the levels that are not compressed."""
    import pyarrow as pa

    content = data[page.start + page.levels : page.end]
    if not chunk.codec or not page.is_compressed:
        return content
    if chunk.codec not in CODECS:
        raise ValueError("its codec is not known")
    codec, size = CODECS[chunk.codec], page.unpacked - page.levels
    return pa.decompress(content, decompressed_size=size, codec=codec, asbytes=True)


def _longest(page: Page, chunk: _Chunk, data: mmap.mmap) -> int:
    """The longest text of a dictionary, or what none of them is longer than."""
    if page.unpacked > LOOKED:
        return page.unpacked
    at, longest = 0, 0
    try:
        content = _content(page, chunk, data)
        while at < len(content):
            length = int.from_bytes(content[at : at + 4], "little")
            at, longest = at + 4 + length, max(longest, length)
    except Exception:  # Arrow may know more of the codec, and will say what is wrong
        return page.unpacked
    return longest


def _shared(page: Page, chunk: _Chunk, leaf: Any, data: mmap.mmap) -> int:
    """The bytes of a page's texts that stand in it once for several; 0 unless it is PREFIXES.

    ValueError if its lengths are more than its values, since Arrow makes room for all of them.
    """
    content, at = _content(page, chunk, data), 0
    if page.kind == Page.DATA:
        for level in (leaf.max_repetition_level, leaf.max_definition_level):
            at += 4 + int.from_bytes(content[at : at + 4], "little") if level else 0
    shared = 0
    if page.encoding == Page.PREFIXES:
        shared, at = _sum(content, at, page.count)
    _head(content, at, page.count)
    return shared


def _head(content: bytes, at: int, most: int) -> tuple[int, int, int, int]:
    """How many numbers in DELTA_BINARY_PACKED begin there, in parts of how many, and how many of
    these are in a block; and where the first is. ValueError if they are more than `most`."""
    if at >= len(content):  # there is no value but null
        return 0, 32, 4, at
    try:
        block, at = _varint(content, at)
        parts, at = _varint(content, at)
        count, at = _varint(content, at)
    except IndexError:
        raise ValueError("a page of it is cut off") from None
    n = block // parts if parts else 0
    if count > most or max(block, parts) >> 32 or block % 128 or not n or n % 32:
        raise ValueError("the texts of a page have wrong lengths")
    return count, n, parts, at


def _sum(content: bytes, at: int, most: int) -> tuple[int, int]:
    """The sum of numbers in DELTA_BINARY_PACKED, and where they end; ValueError."""
    count, n, parts, at = _head(content, at, most)
    if at >= len(content):
        return 0, at
    try:
        value, at = _signed(content, at)
        left, total = count - 1, value if count else 0
        while left > 0:
            least, at = _signed(content, at)
            widths, at = content[at : at + parts], at + parts
            for width in widths[: -(-left // n)]:
                packed, at = content[at : at + width * n // 8], at + width * n // 8
                for i in range(min(n, left)):
                    value = (value + least + _bits(packed, i * width, width)) % (1 << 32)
                    total += value
                left -= n
    except IndexError:
        raise ValueError("a page of it is cut off") from None
    return total, at


def _bits(packed: bytes, at: int, width: int) -> int:
    """The number of so many bits that begins at a bit."""
    number = int.from_bytes(packed[at // 8 : (at + width + 7) // 8], "little")
    return number >> at % 8 & (1 << width) - 1


# ---- the compact protocol of Thrift

TRUE, FALSE, BYTE, I32, I64, DOUBLE, BINARY, LIST, STRUCT = 1, 2, 3, 5, 6, 7, 8, 9, 12

Struct = dict[tuple[int, int], Any]


def _struct(data: Any, at: int, *, flat: bool = False, depth: int = 0) -> tuple[Struct, int]:
    """The fields of a struct by type (FALSE is that of booleans) and number, and where it ends.

    LookupError for what Parquet has not: a map, a field twice; and lists, if it is `flat`.
    """
    fields: Struct = {}
    last = 0
    while (head := data[at]) & 15:
        kind, at = head & 15, at + 1
        if head >> 4:
            last += head >> 4
        else:
            last, at = _signed(data, at)
        if kind in (TRUE, FALSE):
            kind, value = FALSE, kind == TRUE
        else:
            value, at = _value(data, at, kind, flat, depth)
        if (kind, last) in fields or not 0 <= last < 1 << 15:
            raise LookupError
        fields[kind, last] = value
    return fields, at + 1


def _value(data: Any, at: int, kind: int, flat: bool, depth: int) -> tuple[Any, int]:
    if BYTE < kind < DOUBLE:
        value, at = _signed(data, at)
        if kind == I32 and not -(1 << 31) <= value < 1 << 31:
            raise LookupError
        return value, at
    if kind == BINARY:
        length, at = _varint(data, at)
        return None, at + length
    if kind == STRUCT and depth < 16:
        return _struct(data, at, flat=flat, depth=depth + 1)
    if kind == LIST and depth < 16 and not flat:
        head, at = data[at], at + 1
        count, inner = head >> 4, head & 15
        if count == 15:
            count, at = _varint(data, at)
        if inner in (TRUE, FALSE):
            return None, at + count
        values = []
        for _ in range(count):
            value, at = _value(data, at, inner, flat, depth + 1)
            values.append(value)
        return values, at
    if kind in (BYTE, DOUBLE):
        return None, at + (1 if kind == BYTE else 8)
    raise LookupError


def _varint(data: Any, at: int) -> tuple[int, int]:
    """An unsigned number of variable length, and where it ends; IndexError."""
    value, shift = 0, 0
    while (byte := data[at]) > 127:
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if shift > 63:
            raise IndexError
    return value | byte << shift, at + 1


def _signed(data: Any, at: int) -> tuple[int, int]:
    """A signed number of variable length, and where it ends; IndexError."""
    number, at = _varint(data, at)
    return number >> 1 ^ -(number & 1), at
