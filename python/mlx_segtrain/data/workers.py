"""Blocks to batches, in this process or in several, each as a file where one is wanted."""

import os
import pickle
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from .. import processes
from ..errors import InputError, RunError
from ..files import atomic
from .blocks import Block
from .encoding import Options
from .samples import batch_of

#: Of a worker: threads of its own would only be in the way of the others.
SETTINGS = {
    **{"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    **{"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "RUST_BACKTRACE": "0"},
}
#: Blocks that a worker has at once: the next one waits while it works.
AHEAD = 2


@dataclass(frozen=True)
class Done:
    """What became of a block: a file, or an Arrow stream of the same, or why there is none.

    `first` are the formats that were met, each with its first row; `unwritten` says why there is
    no file; `fault` is an InputError's sentence, or None.
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
    """A block's samples, in `file` or, where that is None or cannot be written, in the answer."""
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
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_workers(
    blocks: Iterable[tuple[int, Block, Path | None]], tokenizer: Any, options: Options, count: int
) -> Iterator[Done]:
    """The same of many blocks, in `count` processes, in the order in which they are done.

    RunError if one of the processes was ended.
    """
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
    """A process, and the number of blocks that it has."""

    def __init__(self, setup: bytes):
        self.has = 0
        self.wire, self.process = processes.start_connected(f"{__package__}.worker", SETTINGS)
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
        how = f"with code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        return RunError(
            f"a process that tokenizes was ended {how}: the same command goes on from what is "
            "done; if memory is short, let it use fewer processors (taskset)."
        )
