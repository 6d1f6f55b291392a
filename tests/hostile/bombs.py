"""Writes and reads small files that use a lot of memory when they are unpacked (decompression
bombs).

    python tests/hostile/bombs.py FOLDER [NAME ...]

prints a line of JSON for each file, with the memory and time needed to read it, and the error, if
any.
"""

import base64
import gzip
import importlib.abc
import json
import mmap
import os
import re
import resource
import struct
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from mlx_segtrain import InputError
from mlx_segtrain.data import tables
from mlx_segtrain.data.sources import rows_of, source_of

MB = 1 << 20
#: The memory limit of a process that reads a bomb, in bytes. It protects the machine if a reader
#: does not check sizes.
CONFINED = 6 << 30

#: The file extension of each bomb, and the function that creates its bytes.
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {}


def bomb(ending: str) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    def add(made: Callable[[], bytes]) -> Callable[[], bytes]:
        BOMBS[made.__name__] = (ending, made)
        return made

    return add


def packed(codec: str, piece: bytes, times: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """Compresses many repetitions of a piece without building the whole text in memory."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as file:
        file.write(before)
        for _ in range(times):
            file.write(piece)
        file.write(after)
    return sink.getvalue().to_pybytes()


# ---- text


@bomb(".json.gz")
def blanks_in_a_list() -> bytes:
    return packed("gzip", b" " * MB, 700, b"[", b"]")


@bomb(".jsonl.zst")
def a_line_of_600_mb() -> bytes:
    return packed("zstd", b"x" * MB, 600, b'{"text": "')


@bomb(".csv.zst")
def a_cell_of_600_mb() -> bytes:
    return packed("zstd", b"x" * MB, 600, b'text\n"')


@bomb(".jsonl.zst")
def a_window_of_2_gb() -> bytes:
    return b"\x28\xb5\x2f\xfd" + bytes([0, (31 - 10) << 3]) + b"\x01\x00\x00"


@bomb(".jsonl.gz")
def members_without_end() -> bytes:
    return gzip.compress(b"") * 100_000 + gzip.compress(b'{"text": "a"}\n')


@bomb(".json")
def lists_in_lists() -> bytes:
    return b"[" * (15 * MB)


@bomb(".jsonl")
def empty_objects() -> bytes:
    return b'{"a":[' + b'{"":0},' * 2_300_000 + b"0]}"


@bomb(".json")
def empty_objects_of_a_list() -> bytes:
    return b"[" + empty_objects() + b"]"


@bomb(".csv")
def a_million_columns() -> bytes:
    n = 1_150_000
    return b",".join(b"%x" % i for i in range(n)) + (b"\n" + b"," * (n - 1)) * 3


@bomb(".csv")
def cells_of_one_row() -> bytes:
    return b"text\n" + b"ab," * (5 * MB) + b"\n"


# ---- Arrow


def ipc(table: pa.Table, codec: str | None = None, kind: Any = pa.ipc.new_stream) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with kind(sink, table.schema, options=options) as file:
        file.write_table(table, 1 << 31)
    return sink.getvalue().to_pybytes()


def texts(mb: int) -> pa.Array:
    """Returns texts of 15 MB each, about `mb` MB in total. They consist of null characters in
    mapped memory whose pages are never written, so they use no physical memory."""
    n = mb // 15
    offsets = pa.py_buffer(struct.pack(f"<{n + 1}i", *range(0, (n + 1) * 15 * MB, 15 * MB)))
    own = mmap.mmap(-1, n * 15 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return pa.StringArray.from_buffers(n, offsets, pa.py_buffer(own))


def one_of(text: str, rows: int) -> pa.DictionaryArray:
    indices = pa.array(memoryview(bytes(4 * rows)).cast("i"))
    return pa.DictionaryArray.from_arrays(indices, pa.array([text]))


@bomb(".arrow")
def a_compressed_stream() -> bytes:
    return ipc(pa.table({"text": texts(600)}), "zstd")


@bomb(".arrow")
def a_compressed_file() -> bytes:
    return ipc(pa.table({"text": texts(600)}), "lz4", pa.ipc.new_file)


@bomb(".arrow")
def a_compressed_dictionary() -> bytes:
    indices = pa.array([0], pa.int32())
    return ipc(
        pa.table({"text": pa.DictionaryArray.from_arrays(indices, texts(600))}), codec="zstd"
    )


@bomb(".arrow")
def a_buffer_that_lies() -> bytes:
    content = ipc(pa.table({"text": ["x" * 1_234_567]}), "zstd")
    at = content.rindex(struct.pack("<q", 1_234_567))
    return content[:at] + struct.pack("<q", 1 << 40) + content[at + 8 :]


@bomb(".arrow")
def a_list_of_one_text() -> bytes:
    inner = pa.ListArray.from_arrays([0, 2000], one_of("x" * MB, 2000))
    return ipc(pa.table({"messages": inner}), "zstd")


@bomb(".arrow")
def a_thousand_million_rows() -> bytes:
    return ipc(pa.table({"text": pa.nulls(2**31 - 1)}))


@bomb(".arrow")
def a_run_of_a_thousand_million() -> bytes:
    ends = pa.array([10**9], pa.int32())
    return ipc(pa.table({"text": pa.RunEndEncodedArray.from_arrays(ends, pa.array(["x" * MB]))}))


@bomb(".arrow")
def images() -> bytes:
    """Returns a valid file that contains images, which the reader skips."""
    return ipc(pa.table({"text": ["a"] * 300, "image": [b"x" * MB] * 300}))


@bomb(".arrow")
def many_columns() -> bytes:
    fields = [pa.field(f"c{i}", pa.null()) for i in range(300_000)]
    columns = [pa.nulls(1)] * len(fields)
    return ipc(pa.Table.from_arrays(columns, schema=pa.schema(fields)))


@bomb(".arrow")
def columns_that_are_shared() -> bytes:
    return shared_schema(20, 1_500_000)


def shared_schema(depth: int, padding: int) -> bytes:
    """Returns a schema of nested structs. The two fields of each struct refer to the same bytes, so
    the schema has 2^depth columns."""
    kind: Any = pa.int8()
    for _ in range(depth):
        kind = pa.struct([pa.field("a", kind), pa.field("b", pa.int8())])
    schema = pa.schema([pa.field("text", kind)], metadata={"padding": "x" * padding})
    content = bytearray(schema.serialize().to_pybytes())

    def field(table: int, i: int) -> int:
        vtable = table - struct.unpack_from("<i", content, table)[0]
        if 4 + 2 * i >= struct.unpack_from("<H", content, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", content, vtable + 4 + 2 * i)[0]
        return table + offset if offset else 0

    def target(at: int) -> int:
        return at + struct.unpack_from("<I", content, at)[0]

    message = target(8)  # the message follows its length
    items = target(field(target(field(message, 2)), 1)) + 4  # the schema's fields
    for _ in range(depth):
        items = target(field(target(items), 5)) + 4
        struct.pack_into("<I", content, items + 4, target(items) - items - 4)
    return bytes(content)


# ---- Building blocks of Parquet files: numbers in Thrift's compact protocol, headers, pages


class I32(int):
    pass


def number(n: int) -> bytes:
    found = bytearray()
    while n > 127:
        found.append(n & 127 | 128)
        n >>= 7
    return bytes([*found, n])


def signed(n: int) -> bytes:
    return number(2 * n if n >= 0 else -2 * n - 1)


def thrift(value: Any) -> tuple[int, bytes]:
    """Returns the Thrift type of a value and its encoded bytes. A dict is encoded as a struct whose
    field numbers are the keys."""
    if isinstance(value, int):
        return 5 if isinstance(value, I32) else 6, signed(value)
    if isinstance(value, bytes):
        return 8, number(len(value)) + value
    if isinstance(value, list):
        elements = [thrift(own) for own in value]
        kind = elements[0][0] if elements else 12
        head = bytes([0xF0 | kind]) + number(len(value))
        return 9, head + b"".join(content for _, content in elements)
    content, last = b"", 0
    for i, own in value.items():
        kind, its = thrift(own)
        content += bytes([(i - last) << 4 | kind]) + its
        last = i
    return 12, content + b"\0"


INT8, TEXT, FIXED = 1, 6, 7


def element(name: bytes, kind: int | None = None, repetition: int = 0, **more: int) -> dict:
    fields = {1: kind, 2: more.get("length"), 3: repetition, 5: more.get("children")}
    made: dict[int, Any] = {i: I32(own) for i, own in fields.items() if own is not None}
    converted = more.get("converted", 0 if kind == TEXT else None)  # 0: UTF-8
    made |= {4: name} | ({} if converted is None else {6: I32(converted)})
    return dict(sorted(made.items()))


def in_list(kind: int, **more: int) -> list[dict]:
    """Returns the schema of a column "messages" whose values are lists."""
    inner = element(b"element", kind, 1, **more)
    outer = element(b"messages", None, 1, children=1, converted=3)
    return [outer, element(b"list", None, 2, children=1), inner]


def page(count: int, content: bytes, encoding: int = 0, size: int = 0) -> bytes:
    """Returns a page of values. If the content is compressed, `size` is its uncompressed size."""
    own = {1: I32(count), 2: I32(encoding), 3: I32(3), 4: I32(3)}
    size, content = (size, content) if size else (len(content), squeezed(content))
    return thrift({1: I32(0), 2: I32(size), 3: I32(len(content)), 5: own})[1] + content


def dictionary(*values: bytes) -> bytes:
    content = b"".join(struct.pack("<I", len(own)) + own for own in values)
    own = {1: I32(len(values)), 2: I32(0)}
    its = squeezed(content)
    return thrift({1: I32(2), 2: I32(len(content)), 3: I32(len(its)), 7: own})[1] + its


def squeezed(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def run(count: int, value: int) -> bytes:
    """Encodes a small number that is repeated `count` times."""
    return number(count << 1) + bytes([value])


def levels(*runs: bytes) -> bytes:
    return struct.pack("<I", sum(map(len, runs))) + b"".join(runs)


def one_list(count: int) -> bytes:
    """Returns the levels of one row, which is a list of `count` values."""
    return levels(run(1, 0), run(count - 1, 1)) + levels(run(count, 3))


def parquet(
    schema: list[dict],
    columns: list[tuple[int, list[bytes], int]],
    rows: int = 1,
    stored: bytes = b"",
    told: dict[int, Any] | None = None,
) -> bytes:
    """Returns a Parquet file with false sizes.

    Each element of `columns` consists of a type, the pages, and the number of values. The first
    page may be a dictionary page. `told` replaces fields of the metadata. `stored` is an Arrow
    schema.
    """
    content, chunks = b"PAR1", []
    names = [[own[4]] for own in schema if 5 not in own]
    if any(own[4] == b"list" for own in schema):
        names = [[b"messages", b"list", b"element"]]
    for path, (kind, pages, count) in zip(names, columns, strict=True):
        at, first = len(content), len(pages[0]) if len(pages) > 1 else 0
        content += b"".join(pages)
        meta = {1: I32(kind), 2: [I32(0), I32(8)], 3: path, 4: I32(6), 5: count, 6: 100}
        meta |= {7: len(content) - at, 9: at + first} | ({11: at} if first else {})
        chunks.append({2: at, 3: dict(sorted((meta | (told or {})).items()))})
    tops = sum(own[4] not in (b"list", b"element") for own in schema)
    footer: dict[int, Any] = {1: I32(1), 2: [element(b"schema", children=tops), *schema], 3: rows}
    footer |= {4: [{1: chunks, 2: 100 * len(chunks), 3: rows}]}
    footer |= {5: [{1: b"ARROW:schema", 2: base64.b64encode(stored)}]} if stored else {}
    return closed(content, thrift(footer)[1])


def closed(content: bytes, footer: bytes) -> bytes:
    return content + footer + struct.pack("<I", len(footer)) + b"PAR1"


def text_of(mb: int) -> bytes:
    """Returns a page that contains one text of `mb` MB."""
    head = struct.pack("<I", mb * MB)
    return page(1, packed("zstd", b"x" * MB, mb, head), size=mb * MB + 4)


def numbers(*values: int, count: int | None = None) -> bytes:
    """Encodes numbers in DELTA_BINARY_PACKED, and repeats the last one until there are `count`
    numbers."""
    block = 128
    while count and block < count:
        block *= 2
    content = number(block) + number(4) + number(count or len(values)) + signed(values[0])
    steps = [b - a for a, b in pairwise(values)]
    if count:
        return content + (signed(0) + bytes(4)) * 2
    for at in range(0, len(steps), block):
        own = steps[at : at + block]
        least = min(own)
        own = [step - least for step in own] + [0] * (block - len(own))
        parts = [own[i : i + 32] for i in range(0, block, 32)]
        widths = [max(step.bit_length() for step in part) for part in parts]
        content += signed(least) + bytes(widths)
        for part, width in zip(parts, widths, strict=True):
            bits = sum(step << width * i for i, step in enumerate(part))
            content += bits.to_bytes(4 * width, "little")
    return content


@bomb(".parquet")
def a_text_that_stands_in_every_row() -> bytes:
    sink = pa.BufferOutputStream()
    how: Any = {"store_schema": False, "write_statistics": False, "compression": "zstd"}
    table = pa.table({"text": one_of("x" * (15 * MB), 4000)})
    pq.write_table(table, sink, dictionary_pagesize_limit=1 << 30, **how)
    return sink.getvalue().to_pybytes()


@bomb(".parquet")
def a_page_of_600_mb() -> bytes:
    return parquet([element(b"text", TEXT)], [(TEXT, [text_of(600)], 1)])


@bomb(".parquet")
def pages_of_many_columns() -> bytes:
    own = [element(b"%d" % i, TEXT) for i in range(40)]
    return parquet(own, [(TEXT, [text_of(15)], 1)] * 40)


@bomb(".parquet")
def null_of_a_fixed_length() -> bytes:
    own = element(b"text", FIXED, 1, length=1 << 26)
    return parquet([own], [(FIXED, [page(20, levels(run(20, 0)))], 20)], 20)


@bomb(".parquet")
def null_of_a_fixed_length_in_a_list() -> bytes:
    content = levels(run(1, 0), run(999, 1)) + levels(run(1000, 2))
    return parquet(in_list(FIXED, length=MB), [(FIXED, [page(1000, content)], 1000)])


@bomb(".parquet")
def null_of_a_list_of_fixed_size() -> bytes:
    kind = pa.list_(pa.field("element", pa.int8()), 100_000_000)
    content = levels(run(16, 0)) + levels(run(16, 0))
    stored = pa.schema([pa.field("messages", kind)]).serialize().to_pybytes()
    columns = [(INT8, [page(16, content)], 16)]
    return parquet(in_list(INT8, converted=15), columns, 16, stored)


@bomb(".parquet")
def null_in_a_list_of_lists_of_fixed_size() -> bytes:
    inner = pa.list_(pa.field("element", pa.int8()), 1_000_000)
    stored = pa.schema([pa.field("messages", pa.list_(pa.field("element", inner)))])
    outer = element(b"element", None, 1, children=1, converted=3)
    items = [element(b"list", None, 2, children=1), element(b"element", INT8, 1, converted=15)]
    schema = [*in_list(INT8)[:2], outer, *items]
    content = levels(run(1, 0), run(999, 1)) + levels(run(1000, 2))
    path = [b"messages", b"list", b"element", b"list", b"element"]
    columns = [(INT8, [page(1000, content)], 1000)]
    return parquet(schema, columns, 1, stored.serialize().to_pybytes(), {3: path})


@bomb(".parquet")
def a_list_of_a_dictionary() -> bytes:
    content = one_list(1000) + bytes([1]) + run(1000, 0)
    return parquet(in_list(TEXT), [(TEXT, [dictionary(b"x" * MB), page(1000, content, 8)], 1000)])


@bomb(".parquet")
def a_list_of_50_million() -> bytes:
    n = 50_000_000
    content = one_list(n) + bytes([1]) + run(n, 0)
    return parquet(in_list(TEXT), [(TEXT, [dictionary(b"x"), page(n, content, 8)], n)])


@bomb(".parquet")
def a_list_of_shared_beginnings() -> bytes:
    n = 1001
    content = numbers(0, *[MB] * (n - 1)) + numbers(MB, *[0] * (n - 1)) + b"x" * MB
    return parquet(in_list(TEXT), [(TEXT, [page(n, one_list(n) + content, 7)], n)])


@bomb(".parquet")
def lengths() -> bytes:
    n = 200_000_000
    return parquet([element(b"text", TEXT)], [(TEXT, [page(n, numbers(0, count=n), 6)], 5)], 5)


@bomb(".parquet")
def more_lengths_than_values() -> bytes:
    content = numbers(0, count=200_000_000)
    return parquet([element(b"text", TEXT)], [(TEXT, [page(5, content, 6)], 5)], 5)


@bomb(".parquet")
def more_beginnings_than_values() -> bytes:
    content = numbers(0, count=200_000_000)
    return parquet([element(b"text", TEXT)], [(TEXT, [page(5, content * 2, 7)], 5)], 5)


@bomb(".parquet")
def a_codec_that_is_not_known() -> bytes:
    """Returns a file that makes Arrow abort the process."""
    column = (TEXT, [text_of(1)], 1)
    return parquet([element(b"text", TEXT)], [column], told={4: I32(-33)})


@bomb(".parquet")
def counts_of_levels_that_are_not_there() -> bytes:
    column = (TEXT, [text_of(1)], 1)
    return parquet([element(b"text", TEXT)], [column], told={16: {3: [1, 1]}})


@bomb(".parquet")
def a_footer_of_columns() -> bytes:
    """Returns a file with a row group that has a million columns of three bytes each."""
    schema = thrift([element(b"schema", children=1), element(b"text", TEXT)])[1]
    n = 1_000_000
    group = b"\x19\xfc" + number(n) + b"\x26\x00\x00" * n + b"\x16\x00\x16\x00\x00"
    return closed(b"PAR1", b"\x15\x02\x19" + schema + b"\x16\x00\x19\x1c" + group + b"\0")


@bomb(".parquet")
def columns_of_a_schema() -> bytes:
    own = [element(b"%d" % i, TEXT) for i in range(150_000)]
    schema = [element(b"schema", children=len(own)), *own]
    return closed(b"PAR1", thrift({1: I32(1), 2: schema, 3: 0, 4: []})[1])


@bomb(".parquet")
def a_schema_that_is_stored() -> bytes:
    content = page(1, levels(run(1, 0)))
    own = element(b"text", TEXT, 1)
    return parquet([own], [(TEXT, [content], 1)], stored=shared_schema(18, 280_000))


# ---- memory and time of reading


def memory(key: str) -> int:
    """Returns the memory of this process in bytes: VmRSS (resident now) or VmHWM (the peak so
    far)."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{key}:\s+(\d+)", status)[0]) << 10


def apart(work: Callable[[], None]) -> None:
    """Runs `work` in a forked process, which has all modules imported but no freed memory to
    reuse."""
    if (child := os.fork()) == 0:
        work()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)


class NoPandas(importlib.abc.MetaPathFinder):
    """Hides pandas, because `pa.array` would import it, which takes longer than writing most
    bombs."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def write(name: str, path: Path) -> None:
    sys.meta_path.insert(0, NoPandas())
    path.write_bytes(BOMBS[name][1]())


def read(name: str, path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (CONFINED, CONFINED))
    before, said, rows = memory("VmRSS"), "", 0
    try:
        for _ in rows_of(source_of(path)):
            rows += 1
    except InputError as error:
        said = str(error)
    for reader in tables._idle:  # their peak memory is known only after they end
        reader.close()
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    grown = memory("VmHWM") - before + max(0, (others.ru_maxrss << 10) - before)
    seconds = time.process_time() + others.ru_utime + others.ru_stime
    size = path.stat().st_size
    print(json.dumps([name, {"size": size, "grown": grown, "s": seconds, "said": said}]))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in sys.argv[2:] or BOMBS:
        path = folder / f"{name}{BOMBS[name][0]}"
        apart(lambda path=path, name=name: write(name, path))
        apart(lambda path=path, name=name: read(name, path))
        path.unlink()
