"""Arrays from one rank to the one beside it, through MLX, while both compute.

Sender and receiver name their transfers in the same order, so the same code serves messages and
collectives. A transfer runs on a stream of its own; nobody waits for one that is sent.
"""

import faulthandler
import json
import os
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import RunError
from .ranks import Ranks, address_of, exit_later

#: Shape and type of an array.
Form = tuple[tuple[int, ...], mx.Dtype]
TYPES = (mx.float32, mx.bfloat16, mx.float16, mx.int32, mx.uint32, mx.int64, mx.bool_)
#: Seconds in which the ranks must have connected a ring.
CONNECT = 60.0
#: The ring of this process, besides another back end, and the addresses of its ranks.
_ring: tuple[Any, list[list[str]]] | None = None
#: Numbers that say a form: its type, how many axes it has, and these.
AXES = 6


@dataclass
class Transfers:
    """The transfers of one rank. Each direction has its own stream: a transfer that is waited for
    must not hold up another."""

    ranks: Ranks
    group: Any
    streams: dict[tuple[int, ...], Any] = field(default_factory=dict)
    sent: deque[list[mx.array]] = field(default_factory=deque)

    def send(self, arrays: Sequence[mx.array], to: int) -> None:
        """Gives arrays to a rank that receives as many."""
        stream = self._stream(self.ranks.rank, to)
        # What is kept to wait for is one number, or it would keep what was sent.
        ends = [mx.as_strided(self._sent(x, to), (1,), (1,), 0, stream=stream) for x in arrays]
        ends = [mx.add(x, x, stream=stream) for x in ends]
        self.ranks.start(ends)
        self.sent.append(ends)

    def post(self, forms: Sequence[Form], source: int) -> list[mx.array]:
        """Returns arrays that another rank sends; they may not have arrived yet."""
        moved = [self._received(shape, dtype, source) for shape, dtype in forms]
        self.ranks.start(moved)
        return moved

    def settle(self, left: int = 0) -> None:
        """Waits until at most `left` transfers are on their way to others."""
        while len(self.sent) > left:
            self.ranks.wait_for(self.sent.popleft())

    def send_forms(self, arrays: Sequence[mx.array], to: int) -> None:
        """Tells what is sent next."""
        rows = [[TYPES.index(x.dtype), x.ndim, *x.shape, *[0] * (AXES - x.ndim)] for x in arrays]
        self.send([mx.array(rows, mx.int32)], to)

    def forms(self, count: int, source: int) -> list[Form]:
        """Returns the forms of the `count` arrays that a rank sends next."""
        posted = self.post([((count, AXES + 2), mx.int32)], source)
        self.ranks.wait_for(posted)
        rows = np.array(posted[0]).tolist()
        return [(tuple(axes[:n]), TYPES[kind]) for kind, n, *axes in rows]

    def _stream(self, *way: int) -> Any:
        if way not in self.streams:
            self.streams[way] = mx.new_stream(mx.Device(mx.cpu))
        return self.streams[way]

    def _sent(self, x: mx.array, to: int) -> mx.array:
        stream = self._stream(self.ranks.rank, to)
        return mx.distributed.send(x, to, group=self.group, stream=stream)

    def _received(self, shape: tuple[int, ...], dtype: mx.Dtype, source: int) -> mx.array:
        stream = self._stream(source, self.ranks.rank)
        return mx.distributed.recv(shape, dtype, source, group=self.group, stream=stream)


class Sums(Transfers):
    """Between two GPUs, where MLX has no messages: a sum with zeros, on one stream."""

    def _sent(self, x: mx.array, to: int) -> mx.array:
        return mx.distributed.all_sum(x, group=self.group, stream=self._stream())

    def _received(self, shape: tuple[int, ...], dtype: mx.Dtype, source: int) -> mx.array:
        nothing = mx.zeros(shape, dtype)
        return mx.distributed.all_sum(nothing, group=self.group, stream=self._stream())

    def _stream(self, *way: int) -> Any:
        if () not in self.streams:
            self.streams[()] = mx.new_stream(mx.Device(mx.gpu))
        return self.streams[()]


def transfers_of(ranks: Ranks) -> Transfers:
    """Returns the transfers of a rank, by messages of MLX's ring. NCCL has none in MLX 0.32.4, and
    those of JACCL take the end of a message that is sent for that of one that is received, as both
    are under way at once: these ranks use a ring besides, save for that two of NCCL add up."""
    if ranks.backend == "nccl" and ranks.size == 2:
        found: Transfers = Sums(ranks, ranks.group)
    else:
        group = ranks.group if ranks.backend == "ring" else ring_of(ranks)
        found = Transfers(ranks, group)
    ranks.settle = found.settle
    return found


def ring_of(ranks: Ranks) -> Any:
    """A ring over TCP between ranks that another back end connects. RunError if it fails.

    MLX makes one for each process, which all runs of the process use.
    """
    global _ring
    if _ring is None:
        _ring = _connected(ranks)
    group, ranks.ring = _ring
    return group


def _connected(ranks: Ranks) -> tuple[Any, list[list[str]]]:
    """A new ring, and the addresses of its ranks. The process ends if it is not there in time: MLX
    may wait for another rank for ever, with Python's lock."""
    address = address_of(ranks)
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
    host = f"[{address}]" if ":" in address else address
    ring = [[own] for own in ranks.gather(f"{host}:{port}")]
    if ranks.first:  # now, since nothing can be said while MLX has the lock
        places = ", ".join(f"rank {r} at {own}" for r, (own,) in enumerate(ring))
        said = f"connecting a ring of {places}: each must reach the next one by TCP"
        print(f"mlx-segtrain: {said} within {CONNECT:.0f} s", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hosts.json"
        file.write_text(json.dumps(ring), encoding="utf-8")
        os.environ["MLX_HOSTFILE"] = str(file)
        exit_later(CONNECT)
        try:
            return mx.distributed.init(strict=True, backend="ring"), ring
        except (RuntimeError, ValueError) as error:
            said = f"rank {ranks.rank} cannot reach the ranks beside it: {error}"
            raise RunError(said) from error
        finally:
            faulthandler.cancel_dump_traceback_later()
            del os.environ["MLX_HOSTFILE"]
