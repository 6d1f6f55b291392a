"""Reads Parquet and Arrow files in a separate process whose memory is limited.

A small file may decompress to a large one. Moreover, Arrow trusts the sizes in a file's headers: it
allocates that much memory, and aborts the process if the allocation fails. Therefore a separate
process maps the file and sends its blocks, and the operating system limits the memory of that
process.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

from .. import processes
from ..errors import InputError
from ..files import open_regular
from . import limits
from .blocks import Block
from .limits import VALUE, check_columns, check_growth, told

#: Environment variables that make a reader process use one thread, and make Arrow free memory
#: immediately.
SETTINGS = {
    **{"ARROW_DEFAULT_MEMORY_POOL": "system", "ARROW_IO_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
}
#: The number of Parquet rows to read at a time. It is small because a long text that is repeated in
#: all rows is stored only once in the file, but once per row in memory.
FEW = 16


class _Reader:
    """A process that reads one file after another."""

    def __init__(self) -> None:
        silent: Any = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        self.wire, self.process = processes.start_connected(__name__, SETTINGS, **silent)

    def close(self) -> None:
        self.process.kill()
        self.wire.close()
        self.process.wait()


#: Idle readers.
_idle: list[_Reader] = []
atexit.register(lambda: [reader.close() for reader in _idle])
os.register_at_fork(after_in_child=_idle.clear)


def _ready() -> _Reader:
    while _idle:
        if (reader := _idle.pop()).process.poll() is None:
            return reader
    return _Reader()


def read(path: Path) -> Iterator[Block]:
    """Yields the blocks of a file. Raises InputError if the file cannot be read."""
    with open_regular(path) as file:
        most = max(limits.HELD, limits.HELD_TIMES * os.fstat(file.fileno()).st_size)
        reader, ended = _ready(), False
        try:
            # Send the limits, since this process may have changed them.
            own = {name: value for name, value in vars(limits).items() if name.isupper()}
            reader.wire.send_bytes(json.dumps([str(path), most, own]).encode())
            send_handle(reader.wire, file.fileno(), reader.process.pid)
            head = json.loads(reader.wire.recv_bytes())
            while isinstance(head, list):
                first, size = head
                block = Block(path.name, first, size, reader.wire.recv_bytes(), "arrow")
                head = json.loads(reader.wire.recv_bytes())
                ended = not isinstance(head, list)  # set before the caller gets the last block
                yield block
            ended = True
        except (EOFError, OSError):
            raise InputError(
                f"{path.name} cannot be read in parts of at most {most >> 20} MiB, or is corrupt; "
                "write it again with fewer rows per batch, row group or page, or as JSON lines."
            ) from None
        finally:
            if ended:
                _idle.append(reader)
            else:
                reader.close()
        if head is not None:
            raise InputError(head)


# ---- in the process


def main(number: str) -> None:
    """Reads files whose descriptors arrive through the socket `number`, until the socket is
    closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wire: Any = Connection(int(number))
    while True:
        try:
            path, most, own = json.loads(wire.recv_bytes())
        except EOFError:
            return
        for name, value in own.items():
            setattr(limits, name, value)
        with open(recv_handle(wire), "rb") as file:
            wire.send_bytes(json.dumps(_said(wire, Path(path), file.fileno(), most)).encode())


def _said(wire: Any, path: Path, file: int, most: int) -> str | None:
    """Sends the blocks of a file. Returns None, or the message of an InputError if the file cannot
    be read."""
    import pyarrow as pa
    import pyarrow.parquet  # must be imported before memory is limited

    from . import arrow

    try:
        # This must happen before the file is mapped: the previous file's limit may be too low for
        # this file.
        size = os.fstat(file).st_size
        processes.MEMORY.allow(most + size)
        with told(path), pa.memory_map(f"/dev/fd/{file}") as mapped:
            batches = _parquet if path.suffix.lower() == ".parquet" else _arrow
            for block in arrow.blocks_of(path.name, batches(mapped, path.name, size), size):
                wire.send_bytes(json.dumps([block.first, block.size]).encode())
                wire.send_bytes(block.payload)
    except InputError as error:
        if isinstance(error.__cause__, MemoryError):
            os._exit(1)  # frees the memory that Arrow still holds
        return str(error)
    return None


def _parquet(file: Any, name: str, size: int) -> Iterator[tuple[Any, int]]:
    """Yields each batch with the approximate number of bytes that have been read from the file."""
    import pyarrow.parquet as pq

    reader = pq.ParquetFile(file, pre_buffer=False)
    metadata, total = reader.metadata, reader.metadata.num_rows
    check_columns(name, metadata.num_columns)
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != total or (total and not metadata.num_columns):
        raise ValueError("the row counts in its metadata are inconsistent")
    check_growth(name, VALUE * total, size)
    rows = 0
    for batch in reader.iter_batches(FEW, use_threads=False):
        rows += batch.num_rows
        yield batch, size * rows // max(total, rows)


def _arrow(file: Any, name: str, size: int) -> Iterator[tuple[Any, int]]:
    """Like `_parquet`, but for an Arrow stream or an Arrow file. An Arrow file begins with a magic
    string; a stream does not."""
    import pyarrow as pa

    options = pa.ipc.IpcReadOptions(use_threads=False)
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file, options=options)
    check_columns(name, len(reader.schema))
    if is_file:
        count = reader.num_record_batches
        yield from ((reader.get_batch(i), size * (i + 1) // count) for i in range(count))
    else:
        yield from ((batch, file.tell()) for batch in reader)
