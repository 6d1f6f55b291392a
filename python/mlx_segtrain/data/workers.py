"""Tokenizes blocks in one or several processes. The samples are written to files or stay in
memory."""

import gc
import os
import pickle
import queue
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .. import processes
from ..errors import InputError, RunError
from ..files import atomic
from ..torchless import hide_torch
from .blocks import Block
from .encoding import Options
from .samples import batch_of

#: The environment of a worker. A worker uses only one thread, because the other workers need the
#: other cores.
SETTINGS = {
    **{"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    **{"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "RUST_BACKTRACE": "0"},
}
#: The number of blocks assigned to a worker at a time: one is being tokenized, and one is waiting.
AHEAD = 2


@dataclass(frozen=True)
class Done:
    """The result of tokenizing a block: its samples, in a file or as `content`, or the reason why
    there are none.

    `first` contains the first row of each format; `unwritten` says why the file could not be
    written; `fault` is the message of an InputError, or None.
    """

    index: int
    size: int
    rows: int
    first: dict[str, str]
    content: bytes | None = None
    unwritten: str | None = None
    fault: str | None = None


def tokenized(
    index: int, block: Block, file: Path | None, tokenizer: Any, options: Options
) -> Done:
    """Tokenizes a block and writes its samples to `file`. If `file` is None or cannot be written,
    the samples are in the result."""
    import pyarrow as pa

    first: dict[str, str] = {}
    try:
        batch = batch_of(block, tokenizer, options, first)
    except InputError as error:
        return Done(index, block.size, 0, first, fault=str(error))
    rows, unwritten = batch.num_rows, None
    if file is not None:
        try:
            with atomic(file) as aside, pa.ipc.new_file(str(aside), batch.schema) as writer:
                writer.write_batch(batch)
            return Done(index, block.size, rows, first)
        except OSError as error:
            unwritten = error.strerror or str(error)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return Done(index, block.size, rows, first, sink.getvalue().to_pybytes(), unwritten)


def cores() -> int:
    """Returns the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_workers(
    blocks: Iterable[tuple[int, Block, Path | None]], tokenizer: Any, options: Options, count: int
) -> Iterator[Done]:
    """Tokenizes blocks as `tokenized` does, but in `count` processes. Yields the results as they
    arrive. Raises RunError if one of the processes was killed."""
    setup, waiting = pickle.dumps((tokenizer, options)), iter(blocks)
    workers: list[_Worker] = []
    try:
        workers += (_Worker(setup) for _ in range(count))
        while True:
            for worker in workers:
                for job in islice(waiting, AHEAD - worker.has):
                    worker.give(job)
            busy = {worker.wire: worker for worker in workers if worker.has}
            if not busy:
                return
            for wire in wait(list(busy)):
                yield busy[wire].take()  # type: ignore[index]
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.wire.close()
            worker.process.wait()


class _Worker:
    """A tokenizing process, and the number of blocks that are currently assigned to it."""

    def __init__(self, setup: bytes):
        self.has = 0
        self.wire, self.process = processes.start_connected(__name__, SETTINGS)
        self._send(lambda: self.wire.send_bytes(setup))

    def give(self, job: tuple[int, Block, Path | None]) -> None:
        self._send(lambda: self.wire.send(job))
        self.has += 1

    def take(self) -> Done:
        try:
            done = self.wire.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        self.has -= 1
        return done

    def _send(self, send: Any) -> None:
        try:
            send()
        except OSError:
            raise self._gone() from None

    def _gone(self) -> RunError:
        code = self.process.wait()
        how = (
            f"exited with code {code}"
            if code >= 0
            else f"was killed by {signal.Signals(-code).name}"
        )
        return RunError(
            f"a tokenizing process {how}: run the same command again to continue; if memory runs "
            "out, use fewer processors (with taskset)."
        )


def main(number: str) -> None:
    """Tokenizes the blocks that arrive through the socket `number`. The process ends as soon as its
    parent process ends, even while it is tokenizing."""
    # The parent process decides when this process ends, even after Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hide_torch()
    wire: Any = Connection(int(number))
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                asked.put(wire.recv())
        except (EOFError, OSError):
            os._exit(0)

    tokenizer, options = wire.recv()
    threading.Thread(target=listen, daemon=True).start()
    gc.freeze()
    while True:
        index, block, file = asked.get()
        wire.send(tokenized(index, block, file, tokenizer, options))
