"""Tests rows from all kinds of files, from folders, and from Python data."""

import csv
import gzip
import json
import shlex
import struct
from datetime import date
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from mlx_segtrain.data import arrow, limits, tables
from mlx_segtrain.data.formats import checked
from mlx_segtrain.data.messages import Other
from mlx_segtrain.data.sources import rows_of, source_of, sources_of
from mlx_segtrain.errors import InputError

CHAT = [{"role": "user", "content": "a\n\u2028"}, {"role": "assistant", "content": None}]
ROWS = [
    {"prompt": f'é, "{i}"\n🎉', "completion": "x" * (i % 7), "messages": CHAT[: i % 2 + 1], "n": i}
    for i in range(40)
]
FLAT = [{key: row[key] for key in ("prompt", "completion")} for row in ROWS]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zst(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def write_cells(path, rows, delimiter=",", **how):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(
            file, list(rows[0]) if rows else ["text"], delimiter=delimiter, **how
        )
        table.writeheader()
        table.writerows(rows)


def write_arrow(path, rows, kind=pa.ipc.new_stream, *, n=7):
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    with kind(str(path), table.schema) as file:
        file.write_table(table, n)


def write_parquet(path, rows, **how):
    pq.write_table(pa.Table.from_pylist(rows), path, **{"row_group_size": 11, **how})


#: For each file name: a function that writes the file, and whether all cells are text.
FILES = {
    "a.jsonl": (lambda path, rows: path.write_bytes(lines(rows)), False),
    "a.ndjson": (lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + lines(rows)), False),
    "a.jsonl.gz": (lambda path, rows: path.write_bytes(gzip.compress(lines(rows))), False),
    "two.jsonl.gz": (
        lambda path, rows: path.write_bytes(
            gzip.compress(lines(rows[:9])) + gzip.compress(lines(rows[9:]))
        ),
        False,
    ),
    "a.jsonl.zst": (lambda path, rows: path.write_bytes(zst(lines(rows))), False),
    "a.json": (lambda path, rows: path.write_text(json.dumps(rows, indent=2)), False),
    "raw.json": (
        lambda path, rows: path.write_text("\ufeff\n" + json.dumps(rows, ensure_ascii=False)),
        False,
    ),
    "lines.json": (lambda path, rows: path.write_bytes(lines(rows)), False),
    "a.json.zst": (lambda path, rows: path.write_bytes(zst(json.dumps(rows).encode())), False),
    "a.csv": (write_cells, True),
    "quoted.csv": (lambda path, rows: write_cells(path, rows, quoting=csv.QUOTE_ALL), True),
    "semicolons.csv": (lambda path, rows: write_cells(path, rows, ";"), True),
    "A.TSV": (lambda path, rows: write_cells(path, rows, "\t"), True),
    "a.csv.gz": (
        lambda path, rows: (
            write_cells(path, rows),
            path.write_bytes(gzip.compress(path.read_bytes())),
        ),
        True,
    ),
    "a.parquet": (write_parquet, False),
    "flat.parquet": (
        lambda path, rows: write_parquet(path, [{**row, "messages": None} for row in rows]),
        False,
    ),
    "plain.parquet": (
        lambda path, rows: write_parquet(path, rows, use_dictionary=False, compression="zstd"),
        False,
    ),
    "stream.arrow": (write_arrow, False),
    "file.arrow": (lambda path, rows: write_arrow(path, rows, pa.ipc.new_file), False),
    "a.feather": (
        lambda path, rows: feather.write_feather(pa.Table.from_pylist(rows), str(path)),
        False,
    ),
    "dictionaries.arrow": (
        lambda path, rows: write_arrow(
            path,
            pa.table(
                {
                    key: pa.array([row[key] for row in rows]).dictionary_encode()
                    for key in ("prompt", "completion")
                }
            ),
        ),
        True,
    ),
}


def expected(name, rows):
    """Returns the rows as read from a file: in tables, every row has every column; in CSV, all
    values are text."""
    if FILES[name][1]:
        return [{key: row[key] for key in FLAT[0]} for row in rows]
    return [{**row, "messages": None} for row in rows] if name == "flat.parquet" else rows


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("name", FILES)
def test_rows_of_a_file(name, n, tmp_path, monkeypatch):
    """Whether a file has few or many blocks, every row has a name, and the sizes of the blocks add
    up to the size of the file."""
    path, rows = tmp_path / name, ROWS[:n]
    FILES[name][0](path, FLAT[:n] if FILES[name][1] else rows)
    source, nothing = sources_of(path)
    assert nothing is None and source.name == name
    for block in (4 << 20, 600):
        monkeypatch.setattr(limits, "BLOCK", block)
        found = list(rows_of(source))
        assert [row for _, row in found] == expected(name, rows)
        assert [where for where, _ in found] == [f"{name}:{i + 1}" for i in range(n)]
        blocks = list(source.blocks())
        assert sum(own.size for own in blocks) == pytest.approx(source.size, abs=16)
        assert list(source.blocks(1)) == blocks[1:]
        assert [own.first for own in blocks] == [
            int(next(own.rows())[0].rpartition(":")[2]) for own in blocks
        ]
    assert len(blocks) > 1 or n == 1
    digest = source.fingerprint()
    path.write_bytes(path.read_bytes() + b" ")
    assert source.fingerprint() != digest


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_tables_without_rows(name, tmp_path):
    FILES[name][0](tmp_path / name, pa.table({"text": pa.array([], pa.string())}).to_pylist())
    assert list(source_of(tmp_path / name).blocks()) == []


@pytest.mark.parametrize("name", FILES)
def test_an_empty_file(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    try:
        assert list(rows_of(source_of(tmp_path / name))) == []
    except InputError as error:  # formats with a header do not allow empty files
        assert str(error).startswith(str(tmp_path / name)) and "cannot be read" in str(error)


@pytest.mark.parametrize("name", [name for name in FILES if "gz" in name or "zst" in name])
def test_a_compressed_file_that_ends_early(name, tmp_path):
    path = tmp_path / name
    FILES[name][0](path, FLAT if FILES[name][1] else ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be read: Truncated"):
        list(rows_of(source_of(path)))
    path.write_bytes(b"no such thing")
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        list(rows_of(source_of(path)))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", '[{"a": 1}, {"a": 2]', "a.json:2: the row is not valid JSON"),
        ("a.json", '[{"a": 1} {"a": 2}]', "a.json:1: the row must be followed by a comma"),
        ("a.json", '[{"a": 1}, 7]', "a.json:2: the row must be a JSON object, not a number"),
        ("a.json", '[{"a": 1},]', "a.json:2: the row is not valid JSON"),
        ("a.json", '[{"a": 1}', "a.json:1: the row must be followed by a comma"),
        ("a.json", '[{"a": 1}] x', "a.json has text after the end of its list"),
        ("a.json", "[" * 200_000, "a.json:1: the row is nested too deeply"),
        ("a.json", '[{"a": "\\ud800"}]', "a.json:1: the row contains a lone surrogate"),
        ("a.json", b'[{"a": "\xff"}]', "a.json:1: this row or a later one is not valid UTF-8"),
        ("a.json", '{"data": [\n{"a": 1}]}', "a.json:1: the line is not valid JSON"),
        ("a.csv", "a,b\n1,2\n\n1\n", "a.csv:2: the row has 1 cells, but the header has 2"),
        ("a.csv", 'a,b\n1,2\n1,"2\n3,4\n', "a.csv:2: the row is not valid CSV"),
        ("a.csv", "a,a\n1,2\n", "a.csv: two columns have the same name"),
        ("a.csv", b"a,b\n1,2\n1,\xff\n", "a.csv:2: the row is not valid UTF-8"),
        ("a.csv", "a\n" + "x" * 99, "a.csv:1: the row is larger than"),
        ("a.jsonl", '{"a": 1}\n' + json.dumps({"a": "x" * 99}), "a.jsonl:2: the row is larger"),
        ("a.json", json.dumps([{}, {"a": "x" * 200}]), "a.json:2: the row is larger than"),
        ("a.parquet", "PAR1 nothing PAR1", "a.parquet cannot be read"),
        ("a.arrow", "ARROW1 nothing", "a.arrow cannot be read"),
        ("a.txt", "", "a.txt is not a data file in a supported format: use .jsonl"),
        ("a.parquet.gz", "", "a.parquet.gz is not a data file in a supported format"),
    ],
)
def test_a_broken_file(name, content, says, tmp_path, monkeypatch):
    if "x" * 99 in str(content):
        monkeypatch.setattr(limits, "MOST_BYTES", 90)
        monkeypatch.setattr(limits, "BLOCK", 20)
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        list(rows_of(source_of(path)))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def dictionary(n, text):
    return pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), pa.array([text]))


def test_what_would_grow(tmp_path, monkeypatch):
    """Files that would grow too large in memory are refused: a long text that many rows share,
    compressed text, and a row with 10⁹ nulls."""
    monkeypatch.setattr(limits, "SLACK", 1 << 20)
    (tmp_path / "a.jsonl.zst").write_bytes(zst(b"\n" * (4 << 20)))
    once = pa.table({"text": dictionary(4000, "x" * 5000)})
    pq.write_table(once, tmp_path / "a.parquet", store_schema=False)
    pq.write_table(
        pa.table({"text": ["x" * 5000] * 4000}),
        tmp_path / "b.parquet",
        use_dictionary=False,
        compression="zstd",
    )
    write_arrow(tmp_path / "a.arrow", pa.table({"text": dictionary(9000, "x" * 5000)}), n=9000)
    for name in ("a.jsonl.zst", "a.parquet", "b.parquet", "a.arrow"):
        with pytest.raises(
            InputError, match=f"{name} decompresses to more than 200 times its size"
        ):
            for _ in source_of(tmp_path / name).blocks():
                pass
    empty = pa.FixedSizeListArray.from_arrays(pa.nulls(10**9), 10**9)
    write_arrow(tmp_path / "b.arrow", pa.table({"messages": empty}))
    with pytest.raises(InputError, match=r"b.arrow:1: the row is larger than 16 MiB"):
        list(source_of(tmp_path / "b.arrow").blocks())


def test_a_table_that_is_not_well_formed(tmp_path):
    """Tables with offsets beyond the end of the texts or with two columns of the same name are
    refused."""
    write_arrow(tmp_path / "a.arrow", pa.table({"text": ["x" * 987_654]}))
    content = (tmp_path / "a.arrow").read_bytes()
    end, far = (struct.pack("<ii", 0, n) + b"x" for n in (987_654, 10**9))
    assert content.count(end) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(end, far))
    with pytest.raises(InputError, match=r"a\.arrow cannot be read"):
        list(source_of(tmp_path / "a.arrow").blocks())
    write_arrow(tmp_path / "b.arrow", pa.table([["a"], ["b"]], names=["text", "text"]))
    with pytest.raises(InputError, match="two columns have the same name"):
        list(source_of(tmp_path / "b.arrow").blocks())


#: Options that differ between programs that write Parquet.
PARQUET = {
    **{codec: {"compression": codec} for codec in ("none", "gzip", "brotli", "zstd", "lz4")},
    "version 2": {"data_page_version": "2.0"},
    "small pages": {"data_page_size": 100, "write_batch_size": 3},
    "small dictionaries": {"dictionary_pagesize_limit": 50},
    **{
        f"{encoding}, {version}, {codec}": {
            "use_dictionary": False,
            "column_encoding": {
                **dict.fromkeys(("prompt", "completion"), encoding),
                **{f"messages.list.element.{key}": encoding for key in ("role", "content")},
                "n": "DELTA_BINARY_PACKED",
            },
            "data_page_version": version,
            "compression": codec,
        }
        for encoding in ("DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY")
        for version in ("1.0", "2.0")
        for codec in ("none", "zstd")
    },
}


@pytest.mark.parametrize("how", PARQUET)
def test_parquet_of_other_writers(how, tmp_path):
    rows = [{**row, "messages": row["messages"] * (1 + i % 4)} for i, row in enumerate(ROWS * 10)]
    rows[7]["messages"] = None
    write_parquet(tmp_path / "a.parquet", rows, **{"row_group_size": 300, **PARQUET[how]})
    assert [row for _, row in rows_of(source_of(tmp_path / "a.parquet"))] == rows


def test_a_text_of_lists_that_stands_in_many_rows(tmp_path):
    """The file stores the text once, although many rows contain it, some even twice."""
    rows = [{"tools": ["x" * 99_999, "y"] * (i % 3)} for i in range(200)]
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=200)
    assert [row for _, row in rows_of(source_of(tmp_path / "a.parquet"))] == rows


def test_a_reader_that_is_ended(tmp_path, monkeypatch):
    """If Arrow or the operating system ends a reader process, reading fails with an error that
    names the file, and the next file uses another reader. An unfinished reader does not block
    others."""
    for name in ("a.parquet", "b.parquet"):
        write_parquet(tmp_path / name, [{"text": "x" * 99_999}] * 100, use_dictionary=False)
    monkeypatch.setattr(limits, "BLOCK", 1 << 18)
    monkeypatch.setattr(tables, "_idle", made := [tables._Reader()])
    (reader,) = made
    blocks = source_of(tmp_path / "a.parquet").blocks()
    next(blocks)
    reader.process.kill()
    with pytest.raises(InputError, match=r"a\.parquet cannot be read in parts of at most 256 MiB"):
        list(blocks)
    blocks = source_of(tmp_path / "a.parquet").blocks()
    next(blocks)
    del blocks
    assert len(list(source_of(tmp_path / "b.parquet").blocks())) > 10
    assert made == [own for own in made if own is not reader] != []  # without the killed reader
    made.pop().close()


def test_a_reader_that_has_read_a_smaller_file(tmp_path, monkeypatch):
    """The smaller file's limit does not apply to the larger file."""
    small, large = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_parquet(small, ROWS)
    content = small.read_bytes()
    footer = 8 + struct.unpack("<I", content[-8:-4])[0]
    with large.open("wb") as file:  # a sparse file with zeros before the footer
        file.write(content[:-footer])
        file.seek(1 << 30)
        file.write(content[-footer:])
    monkeypatch.setattr(tables, "_idle", made := [tables._Reader()])
    (reader,) = made
    for path in (small, large):
        assert [row for _, row in rows_of(source_of(path))] == ROWS
    assert made == [reader], "another process has read the larger file"
    reader.close()


@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_arrow_that_is_compressed(codec, kind, tmp_path):
    table = pa.Table.from_pylist(ROWS)
    table = table.append_column("d", table["prompt"].dictionary_encode())
    with kind(
        str(tmp_path / "a.arrow"), table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)
    ) as file:
        file.write_table(table, 7)
    found = [row for _, row in rows_of(source_of(tmp_path / "a.arrow"))]
    assert found == [{**row, "d": row["prompt"]} for row in ROWS]


def test_an_arrow_file_whose_end_tells_of_more(tmp_path):
    """Truncated files are refused. Files are read as streams, so a truncated one could otherwise
    look like a file with fewer rows."""
    path = tmp_path / "a.arrow"
    write_arrow(path, ROWS, pa.ipc.new_file)
    content = path.read_bytes()
    stream = content[: content.rindex(b"\xff\xff\xff\xff\0\0\0\0")]
    end = content[len(stream) :]
    with pa.ipc.open_file(path) as file:
        half = len(stream) // 2
        assert file.num_record_batches == 6
    for broken in (content[:-1], stream, stream[:half] + end, b"ARROW1\0\0" + end):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"a\.arrow cannot be read"):
            list(source_of(path).blocks())


def test_columns_of_what_json_has_no_values_for(tmp_path):
    """For values that JSON cannot represent, blocks record only whether they are present or
    null."""
    columns = {
        "image": pa.array([b"x" * (1 << 20), None]),
        "map": pa.array([[("a", "b")], None], pa.map_(pa.string(), pa.string())),
        "length": pa.array([0, None], pa.duration("s")),
        "runs": pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), pa.array(["a"])),
        "bytes": pa.array([{"bytes": b"x", "path": "a"}, None]),
        "text": pa.array(["a", "b"]),
    }
    write_arrow(tmp_path / "a.arrow", pa.table(columns))
    (block,) = source_of(tmp_path / "a.arrow").blocks()
    assert len(block.payload) < 1 << 14
    (_, one), (_, two) = block.rows()
    assert one == {
        **{name: Other(str(own.type)[:60]) for name, own in columns.items()},
        "bytes": Other("struct with values of type binary"),
        "text": "a",
    }
    assert two == {**dict.fromkeys(columns), "runs": one["runs"], "text": "b"}


#: Arrays of one value and null that are cast, and the value in a row.
CAST = {
    "view": (pa.array(["a", None], pa.string_view()), "a"),
    "decimal": (pa.array([Decimal("-1.50"), None]), "-1.50"),
    "date": (pa.array([date(2024, 2, 29), None]), "2024-02-29"),
    "time": (pa.array([7, None], pa.time32("s")), "00:00:07"),
    "timestamp": (pa.array([3600, None], pa.timestamp("s")), "1970-01-01 01:00:00"),
    "zone": (pa.array([0, None], pa.timestamp("s", "Any/Where")), "1970-01-01 00:00:00+0000"),
    "category": (
        pa.DictionaryArray.from_arrays([0, None], pa.array(["a"], pa.string_view())),
        "a",
    ),
}
#: How to make an array of lists: both values of an array, null, the second value, and no values.
LISTS = {
    "list": lambda own: pa.ListArray.from_arrays(
        [0, 2, 2, 3, 3], pa.concat_arrays([own, own.slice(1)]), mask=NULL
    ),
    "view": lambda own: pa.ListViewArray.from_arrays(*VIEWS, own, mask=NULL),
    "large view": lambda own: pa.LargeListViewArray.from_arrays(*VIEWS, own, mask=NULL),
}
VIEWS = [0, 0, 1, 0], [2, 1, 1, 0]  # the offsets and sizes of views
NULL = pa.array([False, True, False, False])


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("name", CAST)
def test_values_that_json_represents_after_a_cast(name, kind, monkeypatch):
    """Tables of polars contain views. All of these types may also be within structs and lists, and
    the rows of a block may be a slice of a table."""
    array, value = CAST[name]
    structs = pa.StructArray.from_arrays([array, pa.array([1, 2])], ["a", "n"])
    one, two = {"a": value, "n": 1}, {"a": None, "n": 2}
    lists = LISTS[kind](structs)
    monkeypatch.setattr(arrow, "ROWS", 3)
    for start in range(4):
        found = rows_of(sources_of(pa.table({"lists": lists.slice(start)}))[0])
        assert [row["lists"] for _, row in found] == [[one, two], None, [two], []][start:]
    found = rows_of(sources_of(pa.table({"own": array}))[0])
    assert [row["own"] for _, row in found] == [value, None]


def test_broken_statistics_of_parquet_do_not_end_the_reader(tmp_path):
    """The statistics must not be read, because pyarrow aborts the process if they are broken."""
    table = pa.table({"text": ["a"], "n": pa.array([0x11223344], pa.int32())})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False, store_schema=False)
    whole = path.read_bytes()
    at = whole.rindex(b"\x04\x44\x33\x22\x11")  # a 4-byte value in the footer
    size = int.from_bytes(whole[-8:-4], "little") - 2
    broken = whole[:at] + b"\x02\x44\x33" + whole[at + 5 : -8] + size.to_bytes(4, "little")
    path.write_bytes(broken + b"PAR1")
    with pytest.raises(InputError, match=r"a\.parquet .*cannot be read: .*stream"):
        list(rows_of(source_of(path)))


def test_rows_of_many_values(tmp_path):
    """Commas and brackets within text are not counted as values."""
    long = {"text": '[,"\\' * 1_000_000}
    (tmp_path / "a.jsonl").write_bytes(lines([long]))
    (tmp_path / "a.json").write_bytes(json.dumps([long]).encode())
    for name in ("a.jsonl", "a.json"):
        assert [row for _, row in rows_of(source_of(tmp_path / name))] == [long]
    many = b'{"a": [' + b"{}," * 1_048_577 + b"0]}"
    (tmp_path / "a.jsonl").write_bytes(many)
    (tmp_path / "a.json").write_bytes(b"[" + many + b"]")
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(InputError, match=f"{name}:1: the row has more than 2,097,152 values"):
            list(rows_of(source_of(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.arrow"])
def test_a_table_of_many_columns(name, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MOST_COLUMNS", 3)
    FILES[name.replace("a.arrow", "stream.arrow")][0](tmp_path / name, [dict.fromkeys("abc", "x")])
    assert len(list(rows_of(source_of(tmp_path / name)))) == 1
    FILES[name.replace("a.arrow", "stream.arrow")][0](tmp_path / name, [dict.fromkeys("abcd", "x")])
    with pytest.raises(InputError, match=f"{name} has more than 3 columns"):
        list(rows_of(source_of(tmp_path / name)))


def test_parquet_that_ends_a_process(tmp_path):
    """The files were found by a fuzzer. Their row counts are wrong, and Arrow allocates memory
    according to these counts."""
    pq.write_table(pa.table({}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    rows = b"\x16\x00\x16\x00\x26"
    assert content.count(rows) == 1
    (tmp_path / "a.parquet").write_bytes(content.replace(rows, b"\x16\x00\x16\x3f\x26"))
    with pytest.raises(InputError, match="the row counts in its metadata are inconsistent"):
        list(source_of(tmp_path / "a.parquet").blocks())
    table = pa.table({"text": ["a"] * 5000})
    pq.write_table(table, tmp_path / "b.parquet", store_schema=False)
    content = (tmp_path / "b.parquet").read_bytes()
    footer = content[-8 - struct.unpack("<I", content[-8:-4])[0] : -8]
    many = footer.replace(b"\x90\x4e", b"\xfe\xff\xff\xff\xff\xff\x7f")  # 5000 as a varint
    assert many != footer
    end = many + struct.pack("<I", len(many)) + b"PAR1"
    (tmp_path / "b.parquet").write_bytes(content[: -8 - len(footer)] + end)
    with pytest.raises(InputError, match=r"b\.parquet decompresses to more than"):
        list(source_of(tmp_path / "b.parquet").blocks())


# ---- folders


def write(folder, *names):
    folder.mkdir(exist_ok=True, parents=True)
    for name in names:
        (folder / name).write_text(json.dumps([{"text": name}]) if "json" in name else "text\na\n")
    return folder


@pytest.mark.parametrize(
    ("names", "train", "valid"),
    [
        (["train.csv", "valid.json", "notes.txt"], ["train.csv"], ["valid.json"]),
        (["train.json", "validation.csv"], ["train.json"], ["validation.csv"]),
        (["train.csv", "test.csv"], ["train.csv"], []),
        (["alpaca_data.json", "README.md"], ["alpaca_data.json"], []),
        (["rows.csv", "valid.csv"], ["rows.csv"], ["valid.csv"]),
        (
            ["train-00001-of-00002.csv", "train-00000-of-00002.csv", "validation-0-of-1.csv"],
            ["train-00000-of-00002.csv", "train-00001-of-00002.csv"],
            ["validation-0-of-1.csv"],
        ),
    ],
)
def test_which_files_of_a_folder_are_read(names, train, valid, tmp_path):
    own, other = sources_of(write(tmp_path, *names))
    assert [*own.files] == train and [*(other.files if other else ())] == valid
    assert [where for where, _ in rows_of(own)] == [f"{name}:1" for name in train]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["train.csv", "train.json"], "has train.csv and train.json: keep only one"),
        (["train.csv", "valid.csv", "validation.csv"], "has valid.csv and validation.csv: keep"),
        (["train.csv", "train-0-of-1.csv"], "has train-*-of-1.csv and train.csv: keep"),
        (
            ["train-0-of-3.csv", "train-2-of-3.csv"],
            "has only 2 of the 3 files named train-*-of-3.csv: add",
        ),
        (["a.csv", "b.csv"], "contains no training file: add train.jsonl, or a file named train"),
        (["valid.csv"], "contains no training file"),
        ([".train.csv"], "contains no training file"),
    ],
)
def test_folders_of_which_it_cannot_be_told(names, says, tmp_path):
    with pytest.raises(InputError) as caught:
        sources_of(write(tmp_path, *names))
    assert says in str(caught.value)


def test_the_folder_of_a_repository(tmp_path):
    write(tmp_path / "data", "train-0-of-1.csv", "validation-0-of-1.csv")
    train, valid = sources_of(tmp_path)
    assert [*train.files] == ["data/train-0-of-1.csv"]
    assert valid is not None and [*valid.files] == ["data/validation-0-of-1.csv"]


def test_folders_that_datasets_saves(tmp_path, capsys):
    own = datasets.Dataset.from_list(ROWS)
    own.save_to_disk(str(tmp_path / "one"), num_shards=2)
    train, valid = sources_of(tmp_path / "one")
    assert len(train.files) == 2 and valid is None and train.name.endswith(" and 1 more")
    assert [row for _, row in rows_of(train)] == ROWS
    both = datasets.DatasetDict(train=own, validation=own.select(range(3)))
    both.save_to_disk(str(tmp_path / "two"))
    train, valid = sources_of(tmp_path / "two")
    assert [*train.files] == ["train/data-00000-of-00001.arrow"]
    assert valid is not None and [row for _, row in rows_of(valid)] == ROWS[:3]
    state = tmp_path / "one" / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "../two/train/x.arrow"}]}))
    with pytest.raises(InputError, match=r"state\.json does not list valid data files"):
        sources_of(tmp_path / "one")


# ---- Python


PYTHON = {
    "list": lambda: ROWS,
    "generator": lambda: (row for row in ROWS),
    "table": lambda: pa.Table.from_pylist(ROWS),
    "dataset": lambda: datasets.Dataset.from_list(ROWS),
    "chosen": lambda: datasets.Dataset.from_list(ROWS[::-1]).select(range(39, -1, -1)),
}


@pytest.mark.parametrize("name", PYTHON)
def test_rows_of_python(name, monkeypatch):
    monkeypatch.setattr(limits, "BLOCK", 600)
    train, valid = sources_of(PYTHON[name]())
    assert valid is None and not train.files and len(list(train.blocks())) > 1
    for _ in range(2):  # rows from a generator can be read twice
        found = list(rows_of(train))
        assert [row for _, row in found] == ROWS
        assert [where for where, _ in found] == [f"train_data:{i + 1}" for i in range(40)]
    assert train.fingerprint() == sources_of(PYTHON[name]())[0].fingerprint()
    assert train.fingerprint() != sources_of(ROWS[1:])[0].fingerprint()


def test_what_becomes_of_the_objects_later_changes_nothing():
    rows = [{"text": "a"}]
    train, _ = sources_of(rows)
    rows[0]["text"] = "b"
    assert [*rows_of(train)] == [("train_data:1", {"text": "a"})]


def test_splits_of_python(tmp_path):
    _, valid = sources_of({"train": ROWS, "validation": ROWS[:2], "test": []})
    assert valid is not None and [row for _, row in rows_of(valid)] == ROWS[:2]
    _, valid = sources_of(ROWS, ROWS[:1])
    assert valid is not None and valid.name == "valid_data"
    (tmp_path / "a.csv").write_text("text\nb\n")
    _, valid = sources_of(ROWS, tmp_path / "a.csv")
    assert valid is not None and [*rows_of(valid)] == [("a.csv:1", {"text": "b"})]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "data_dir is missing: set it in the YAML file or with --data"),
        (7, "train_data is a number: pass a list or an iterator"),
        (["a"], "train_data:1: the row must be a dict, not a string"),
        ([{}, {"a": {1, 2}}], "train_data:2: the row cannot be written as JSON"),
        ([{"a": "\ud800"}], "train_data:1: the row cannot be written as JSON"),
        ({"test": []}, "has no split \"train\" (it has 'test')"),
    ],
)
def test_python_data_that_cannot_be_used(data, says):
    with pytest.raises(InputError) as caught:
        sources_of(data)
    assert says in str(caught.value)


def test_a_row_of_python_that_is_too_long(monkeypatch):
    monkeypatch.setattr(limits, "MOST_BYTES", 9)
    with pytest.raises(InputError, match="train_data:1: the row is larger than"):
        sources_of([{"text": "a" * 9}])


def test_a_table_of_pandas():
    pandas = pytest.importorskip("pandas")
    rows = [*FLAT, {"prompt": "q", "completion": None}]
    frame = pandas.DataFrame(rows)
    for own, wanted in ((frame, rows), (frame.iloc[[3, 1]], [rows[3], rows[1]])):
        assert [row for _, row in rows_of(sources_of(own)[0])] == wanted


def test_two_columns_of_any_name_are_told_how_they_can_be_trained():
    with pytest.raises(InputError) as error:
        checked({"user": "hi", "bot": "hello"}, "odd.csv:1")
    _, hint = shlex.split(str(error.value)[str(error.value).index("--columns") :])
    columns = json.loads(hint.removesuffix("."))
    found = checked({"user": "hi", "bot": "hello"}, "odd.csv:1", columns=columns)
    assert (found.format, found.row["prompt"]) == ("prompt-completion", "hi")
    for row in ({"a": "x", "b": 3}, {"a": "x"}, {"a": "x", "b": "y", "c": "z"}):
        with pytest.raises(InputError) as error:
            checked(row, "odd.csv:1")
        assert "--columns" not in str(error.value)
