"""Sends arrays from one rank to another through MLX, while both ranks compute.

The sender and the receiver start their transfers in the same order, so transfers can be implemented
with either messages or collectives. The sender does not wait for a transfer to finish.
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

#: The shape and the dtype of an array.
Form = tuple[tuple[int, ...], mx.Dtype]
TYPES = (mx.float32, mx.bfloat16, mx.float16, mx.int32, mx.uint32, mx.int64, mx.bool_)
#: The time in seconds within which the ranks must form a ring.
CONNECT = 60.0
#: The ring that this process uses in addition to another back end, and the addresses of its ranks.
_ring: tuple[Any, list[list[str]]] | None = None
#: A form is sent as the index of its dtype, its number of axes, and this many sizes, padded with 0.
AXES = 6


@dataclass
class Transfers:
    """The transfers of one rank. Each direction has its own stream, so that a transfer that waits
    for another rank does not delay the others."""

    ranks: Ranks
    group: Any
    streams: dict[tuple[int, ...], Any] = field(default_factory=dict)
    sent: deque[list[mx.array]] = field(default_factory=deque)

    def send(self, arrays: Sequence[mx.array], to: int) -> None:
        """Starts to send arrays to another rank."""
        stream = self._stream(self.ranks.rank, to)
        # Only one element of each array is kept for `settle`, because whole arrays would use too
        # much memory.
        ends = [mx.as_strided(self._sent(x, to), (1,), (1,), 0, stream=stream) for x in arrays]
        ends = [mx.add(x, x, stream=stream) for x in ends]
        self.ranks.start(ends)
        self.sent.append(ends)

    def post(self, forms: Sequence[Form], source: int) -> list[mx.array]:
        """Starts to receive arrays of these forms, and returns the arrays, which may not have
        arrived yet."""
        moved = [self._received(shape, dtype, source) for shape, dtype in forms]
        self.ranks.start(moved)
        return moved

    def settle(self, left: int = 0) -> None:
        """Waits until at most `left` of the started sends are unfinished."""
        while len(self.sent) > left:
            self.ranks.wait_for(self.sent.popleft())

    def send_forms(self, arrays: Sequence[mx.array], to: int) -> None:
        """Sends the forms of the arrays that will be sent next."""
        rows = [[TYPES.index(x.dtype), x.ndim, *x.shape, *[0] * (AXES - x.ndim)] for x in arrays]
        self.send([mx.array(rows, mx.int32)], to)

    def forms(self, count: int, source: int) -> list[Form]:
        """Receives the forms of the `count` arrays that a rank will send next."""
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
    """Transfers between two GPUs. MLX does not support messages between GPUs, so a transfer is a
    sum to which the receiver adds zeros. All sums run on one stream."""

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
    """Returns the transfers of a rank. They are messages in MLX's ring, or sums between two NCCL
    ranks.

    In MLX 0.32.4, the NCCL back end does not support messages, and JACCL confuses the completion of
    sends with that of receives if both happen at the same time. Ranks of these back ends therefore
    also create a ring.
    """
    if ranks.backend == "nccl" and ranks.size == 2:
        found: Transfers = Sums(ranks, ranks.group)
    else:
        group = ranks.group if ranks.backend == "ring" else ring_of(ranks)
        found = Transfers(ranks, group)
    ranks.settle = found.settle
    return found


def ring_of(ranks: Ranks) -> Any:
    """Returns a ring over TCP between ranks that use another back end. Raises RunError if the ring
    cannot be created.

    MLX creates a ring only once per process, so all runs of the process share it.
    """
    global _ring
    if _ring is None:
        _ring = _connected(ranks)
    group, ranks.ring = _ring
    return group


def _connected(ranks: Ranks) -> tuple[Any, list[list[str]]]:
    """Returns a new ring and the addresses of its ranks. Ends the process if creating the ring
    takes too long, since MLX may wait for another rank forever while it holds the GIL."""
    address = address_of(ranks)
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
    host = f"[{address}]" if ":" in address else address
    ring = [[own] for own in ranks.gather(f"{host}:{port}")]
    if ranks.first:  # printed now, because nothing can be printed while MLX holds the GIL
        places = ", ".join(f"rank {r} at {own}" for r, (own,) in enumerate(ring))
        said = f"connecting a ring of {places}: each rank must reach the next over TCP"
        print(f"mlx-segtrain: {said} within {CONNECT:.0f} s", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hosts.json"
        file.write_text(json.dumps(ring), encoding="utf-8")
        os.environ["MLX_HOSTFILE"] = str(file)
        exit_later(CONNECT)
        try:
            return mx.distributed.init(strict=True, backend="ring"), ring
        except (RuntimeError, ValueError) as error:
            said = f"rank {ranks.rank} cannot reach its neighbours in the ring: {error}"
            raise RunError(said) from error
        finally:
            faulthandler.cancel_dump_traceback_later()
            del os.environ["MLX_HOSTFILE"]
