"""Fuzzes the readers of data files. The readers may raise only InputError, and must not hang or use
excessive memory.

    INPUTS=100000 SEED=1 python tests/hostile/fuzz_data.py [KIND ...]

runs the fuzzer outside of pytest. The fuzzer prints the name of its working folder, and a line for
each kind of file. If a library crashes, the run ends, and the folder contains the file that caused
the crash.
"""

import csv
import gzip
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq

from lib.mutators import Mutator
from mlx_segtrain import InputError
from mlx_segtrain.data.formats import checked
from mlx_segtrain.data.sources import rows_of, source_of

#: The maximum number of seconds per file, and the maximum increase in memory, in bytes, over all
#: files of one kind.
LONGEST_S, ROOM = 10, 256 << 20
#: The number of faults after which the fuzzer stops.
MOST_FAULTS = 10

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi é🎉"}]
ROWS: list[dict[str, Any]] = [
    {"messages": CHAT, "system": "Be kind.", "tools": json.dumps([{"type": "function"}])},
    {"messages": json.dumps(CHAT)},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
    {"prompt": "Q", "completion": "A"},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"prompt": "Q", "chosen": "A", "rejected": "B"},
    {"prompt": "Q", "completion": "A", "label": True},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Add.", "context": "1 2", "response": "3"},
    {"question": "Q", "answer": "A"},
    {"text": "a " * 50, "n": 3, "x": 0.5, "when": None},
]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def cells(delimiter: str) -> Callable[[list[Any]], bytes]:
    def write(rows: list[Any]) -> bytes:
        file = io.StringIO()
        table = csv.writer(file, delimiter=delimiter)
        own = [row for row in rows if isinstance(row, dict)][:1] or [{"text": "a"}]
        table.writerow(own[0])
        table.writerows([_cell(x)[:2000] for x in row.values()] for row in own)
        return file.getvalue().encode("utf-8", "surrogatepass")

    return write


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def table(rows: list[Any]) -> pa.Table:
    """Returns a table of the rows, or of the first row if Arrow cannot combine the rows."""
    for some in (rows, rows[:1], ROWS[:1]):
        try:
            return pa.Table.from_pylist(some)
        except Exception:
            continue
    raise AssertionError


def ipc(
    kind: Any, dictionary: bool = False, codec: str | None = None
) -> Callable[[list[Any]], bytes]:
    def write(rows: list[Any]) -> bytes:
        made = table(rows)
        if dictionary:
            columns = [
                own.dictionary_encode() if pa.types.is_string(own.type) else own
                for own in made.columns
            ]
            made = pa.table(dict(zip(made.column_names, columns, strict=True)))
        sink = pa.BufferOutputStream()
        with kind(sink, made.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as file:
            file.write_table(made)
        return sink.getvalue().to_pybytes()

    return write


def parquet(**how: Any) -> Callable[[list[Any]], bytes]:
    def write(rows: list[Any]) -> bytes:
        sink = pa.BufferOutputStream()
        try:
            pq.write_table(table(rows), sink, **how)
        except Exception:  # the rows contain a struct without fields
            sink = pa.BufferOutputStream()
            pq.write_table(table(ROWS[:1]), sink, **how)
        return sink.getvalue().to_pybytes()

    return write


def texts(write: Callable[[list[Any]], bytes]) -> Callable[[list[Any]], bytes]:
    """Returns a function that writes the first row three times, with every value as text."""

    def write_texts(rows: list[Any]) -> bytes:
        own = [row for row in rows if isinstance(row, dict) and row] or ROWS[:1]
        return write([{key: _cell(value) for key, value in own[0].items()}] * 3)

    return write_texts


#: The extension of each kind of file, and the function that writes rows to a file of this kind.
KINDS: dict[str, tuple[str, Callable[[list[Any]], bytes]]] = {
    "jsonl": (".jsonl", lines),
    "jsonl.gz": (".jsonl.gz", lambda rows: gzip.compress(lines(rows), 1)),
    "jsonl.zst": (".jsonl.zst", lambda rows: zst(lines(rows))),
    "json": (".json", lambda rows: json.dumps(rows, indent=1).encode()),
    "csv": (".csv", cells(",")),
    "tsv": (".tsv", cells("\t")),
    "parquet": (".parquet", parquet()),
    "parquet, plain": (".parquet", parquet(use_dictionary=False, compression="none")),
    "parquet, lengths": (
        ".parquet",
        texts(
            parquet(
                use_dictionary=False,
                column_encoding="DELTA_BYTE_ARRAY",
                data_page_version="2.0",
                compression="zstd",
            )
        ),
    ),
    "arrow file": (".arrow", ipc(pa.ipc.new_file)),
    "arrow stream": (".arrow", ipc(pa.ipc.new_stream)),
    "arrow, compressed": (".arrow", ipc(pa.ipc.new_file, dictionary=True, codec="zstd")),
    "arrow, dictionaries": (".arrow", ipc(pa.ipc.new_stream, dictionary=True)),
}


def changed(kind: str, fuzzer: Mutator) -> bytes:
    """Returns a file with unusual values, changed bytes, or both."""
    write = KINDS[kind][1]
    rows: list[Any] = fuzzer.chance.choices(ROWS, k=fuzzer.chance.randrange(1, 4))
    how = fuzzer.chance.random()
    if how < 0.4:
        rows = [fuzzer.value(row) for row in rows]
    try:
        whole = write(rows)
    except (ValueError, TypeError, OverflowError):
        whole = write(ROWS[:2])
    if kind in ("jsonl.gz", "jsonl.zst") and how < 0.2:  # changes the uncompressed bytes
        whole = (gzip.compress if kind == "jsonl.gz" else zst)(fuzzer.bytes(lines(ROWS[:3])))
    return whole if 0.2 < how < 0.4 else fuzzer.bytes(whole)


def read(path: Path) -> str:
    """Returns the error message for a file, or "" if all of its rows can be read."""
    try:
        for source, row in rows_of(source_of(path)):
            checked(row, source)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, str(error)[:300]
        return str(error)
    return ""


def too_long(*_: Any) -> None:
    raise TimeoutError


def fuzz(place: Path, kinds: list[str], inputs: int, seed: int, said: Any = print) -> None:
    """Reads mutated files. Raises an AssertionError that lists the faults, and keeps the files that
    caused the faults in the folder `place`."""
    signal.signal(signal.SIGALRM, too_long)
    faults: list[str] = []
    for kind in kinds:
        path = place / f"train{KINDS[kind][0]}"
        path.write_bytes(KINDS[kind][1](ROWS[:3]))
        assert not read(path), read(path)
        fuzzer, refused, begun = Mutator(seed), 0, time.monotonic()
        peak, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
        for i in range(inputs):
            path.write_bytes(changed(kind, fuzzer))
            started = time.process_time()
            signal.alarm(LONGEST_S * 6)
            try:
                refused += bool(read(path))
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                faults.append(f"{kind} {i}: {type(error).__name__}: {error}"[:600])
                shutil.copy(path, place / f"fault-{len(faults)}-{path.name}")
            signal.alarm(0)
            took = time.process_time() - started
            slowest = max(slowest, took)
            if took > LONGEST_S:
                faults.append(f"{kind} {i}: {took:.1f} s")
            if len(faults) > MOST_FAULTS:
                break
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
        if more > ROOM:
            faults.append(f"{kind}: {more >> 20} MiB of memory")
        said(
            f"{kind}: {inputs} files, {refused} refused, {time.monotonic() - begun:.0f} s, slowest "
            f"{slowest:.2f} s, {more >> 20} MiB more memory",
            flush=True,
        )
    assert not faults, "\n".join([str(place), *faults])


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    print(folder, flush=True)
    chosen = sys.argv[1:] or list(KINDS)
    fuzz(folder, chosen, int(os.environ.get("INPUTS", "1000")), int(os.environ.get("SEED", "0")))
    shutil.rmtree(folder)
