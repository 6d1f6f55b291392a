"""The processes of a run, which `mlx.launch` starts and MLX's collectives connect.

The micro-batches of a step, or its prompts if completions are generated, are divided between the
ranks, and their gradients are summed; in a pipeline, each micro-batch runs through the layers of
all ranks instead. All decisions follow from values that are bit-identical on all ranks, so all of
them take the same steps. Only rank 0 writes files. A run on one device has a group of one rank.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from .. import events
from ..config import TrainConfig
from ..errors import InputError, RunError
from . import watch
from .links import Links

T = TypeVar("T")

#: Variables that mlx.launch and MLX's back ends set for a rank; they are not settings of a run.
LAUNCH = (
    *("MLX_RANK", "MLX_WORLD_SIZE", "MLX_HOSTFILE", "MLX_RING_VERBOSE"),
    *("MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR", "MLX_JACCL_RING", "MLX_NCCL_TIMEOUT"),
)
#: Seconds between two checks for lost ranks, and after which a warning names a slow rank.
LOOK, SLOW = 0.05, 60.0
#: Bytes that are gathered in one sum, a multiple of 4, to limit the memory that MLX needs.
PIECE = 1 << 28
#: Seconds that a rank may take to end after another rank is lost, without the time of saving; that
#: the GIL may stay blocked before the process is ended; and between two checks.
TO_END, STUCK, SECOND = 25.0, 25.0, 1.0


class LostRank(RunError):
    """A rank has failed, has ended or does not answer."""


class Diverged(RunError):
    """The factors are not the same on all ranks."""


def launched() -> int | None:
    """Returns the rank of this process; None if mlx.launch did not start it."""
    rank = os.environ.get("MLX_RANK", "")
    return int(rank) if rank.isdecimal() and _backend() else None


def _backend() -> str | None:
    """Returns MLX's back end, from the variables of mlx.launch; None for a single process."""
    if os.environ.get("NCCL_HOST_IP") and os.environ.get("MLX_WORLD_SIZE", "1") != "1":
        return "nccl"
    if os.environ.get("MLX_IBV_DEVICES") and os.environ.get("MLX_JACCL_COORDINATOR"):
        return "jaccl"
    return "ring" if len(_hosts()) > 1 else None


def _hosts() -> list[list[str]]:
    """Returns the addresses of each rank of a ring."""
    try:
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text(encoding="utf-8"))
    except (KeyError, OSError, ValueError):  # the file is empty for a single host
        return []
    return [own if isinstance(own, list) else [own] for own in hosts]


def address_of(ranks: "Ranks") -> str:
    """Returns the address of this rank in the network that MLX uses."""
    backend, rank = ranks.backend, ranks.rank
    if backend == "ring":
        return _hosts()[rank][0].rpartition(":")[0].strip("[]")
    first = os.environ["NCCL_HOST_IP"] if backend == "nccl" else ""
    first = first or os.environ["MLX_JACCL_COORDINATOR"].rpartition(":")[0]
    if rank == 0:
        return first
    family, kind, _, _, at = socket.getaddrinfo(first, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as route:  # nothing is sent
        route.connect(at)
        return route.getsockname()[0]


@dataclass(eq=False)
class Ranks:
    """A group of processes; by default, it consists of this process only. `warn` receives a
    sentence about slow ranks."""

    rank: int = 0
    size: int = 1
    backend: str = ""
    group: Any = None
    stream: Any = None
    pipeline: bool = False  #: every rank has some layers, and runs all micro-batches
    #: Addresses by rank of a ring that transfers.py has created.
    ring: list[list[str]] = field(default_factory=list)
    links: Links | None = None
    names: list[str] = field(default_factory=list)
    warn: Callable[[str], None] = lambda message: None
    #: Called before each sum: waits for transfers, because back ends may reorder them with sums.
    settle: Callable[[], None] = lambda: None
    waited: float = 0.0  #: seconds spent waiting for other ranks
    saving: bool = False  #: the state is being written, so the process must not end

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    @property
    def ends(self) -> bool:
        """Whether this rank has the outputs of batches; in a pipeline only the last one has."""
        return not self.pipeline or self.rank == self.size - 1

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.names[rank]})" if self.names else f"rank {rank}"

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this rank's share of a step's items: every `size`-th, or all in a pipeline."""
        return items if self.pipeline else items[self.rank :: self.size]

    def unshared(self, own: Sequence[T]) -> list[T]:
        """Returns the JSON values of all ranks, in the order of the items that `share` divided."""
        every = self.gather(list(own))
        return [every[i % self.size][i // self.size] for i in range(sum(map(len, every)))]

    def add(self, outputs: Sequence[Any], gradient: mx.array) -> tuple[list[float], mx.array]:
        """Returns the sums over all ranks, bit-identical on each."""
        n = gradient.size
        parts = [gradient, mx.array([float(x) for x in outputs], mx.float32)]
        total = self._sum(mx.concatenate(parts))
        return [float(x) for x in np.array(total[n:])], total[:n]

    def gather(self, value: T) -> list[T]:
        """Returns the JSON values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        return [json.loads(own) for own in self.every(text)]

    def gathered(self, rows: Mapping[str, T]) -> dict[str, T]:
        """Returns the union of the mappings of all ranks."""
        return {name: x for own in self.gather(dict(rows)) for name, x in own.items()}

    def given(self, content: bytes) -> bytes:
        """Returns the content that rank 0 has."""
        return content if self.size == 1 else self.every(content if self.first else b"")[0]

    def every(self, content: bytes) -> list[bytes]:
        """Returns the contents of all ranks, by rank."""
        lengths = np.zeros(self.size, np.int64)
        lengths[self.rank] = len(content)
        # Each number is 0 on all ranks except one, so sums of its int32 halves are exact.
        total = np.array(self._sum(mx.array(lengths.view(np.int32))))
        ends = np.cumsum(total.view(np.int64)).tolist()
        begin, found = ends[self.rank] - len(content), bytearray()
        for at in range(0, ends[-1], PIECE):
            size = min(PIECE, ends[-1] - at)
            piece = np.zeros(-(-size // 4) * 4, np.uint8)
            own = content[max(at - begin, 0) : max(at + size - begin, 0)]
            first = max(begin - at, 0)
            piece[first : first + len(own)] = np.frombuffer(own, np.uint8)
            total = np.array(self._sum(mx.array(piece.view(np.int32))))
            found += total.view(np.uint8)[:size].tobytes()
        return [bytes(found[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def _sum(self, x: mx.array) -> mx.array:
        """Returns the sum of an array over all ranks. Raises LostRank if one is lost."""
        if self.links and self.links.suspects:
            self._blame(None)
        self.settle()
        mx.eval(x)
        total = mx.distributed.all_sum(x, group=self.group, stream=self.stream)
        self.start([total])
        self.wait_for([total])
        return total

    def start(self, arrays: Sequence[mx.array]) -> None:
        """Starts the transfers of arrays. Raises LostRank if MLX cannot start them."""
        try:
            mx.async_eval(arrays)
        except RuntimeError as error:
            self._blame(error)

    def wait_for(self, arrays: Sequence[mx.array]) -> None:
        """Waits for arrays that depend on other ranks. Raises LostRank if one of them is lost.

        Another thread waits, on a stream that nothing else uses. Meanwhile this one checks for lost
        ranks, and can stop waiting.
        """
        done, failures = threading.Event(), list[BaseException]()
        begin = time.perf_counter()

        def wait() -> None:
            try:
                mx.eval(arrays)
            except BaseException as error:
                failures.append(error)
            done.set()

        if self.links:
            self.links.waits(True)
        try:
            threading.Thread(target=wait, daemon=True).start()
            self._watch(done)
        except RuntimeError as error:
            failures.append(error)
        except LostRank as lost:
            # Printed at once, because ending this process may block the GIL, see _end_in_time.
            print(f"mlx-segtrain: {lost}: ending", file=sys.stderr, flush=True)
            _hang_up(self.ring or _hosts())
            done.wait(watch.SETTLE)
            raise
        finally:
            self.waited += time.perf_counter() - begin
            if self.links:
                self.links.waits(False)
        if failures:
            self._blame(failures[0])

    def _watch(self, done: threading.Event) -> None:
        started, warned = time.monotonic(), False
        while not done.wait(LOOK):
            if (lost := self.lost()) is not None:
                raise lost
            slow = self.links.behind() if self.links else []
            if not warned and slow and time.monotonic() - started > SLOW:
                warned = True
                # Only one of the waiting ranks warns.
                if self.rank == min(r for r in range(self.size) if r not in slow):
                    those = ", ".join(map(self.name, slow))
                    self.warn(f"all ranks have waited {SLOW:.0f} s for {those}")

    def _blame(self, error: BaseException | None) -> None:
        """Waits until the ranks agree on the lost one, and raises LostRank: MLX reports only that a
        connection is lost."""
        deadline = time.monotonic() + watch.PATIENCE + 3 * watch.SETTLE
        while self.links and time.monotonic() < deadline:
            if (lost := self.lost()) is not None:
                raise lost from None
            time.sleep(LOOK)
        raise RunError(f"the ranks cannot reach each other any more: {error}") from error

    def lost(self) -> LostRank | None:
        """Returns the error that names the lost rank, if there is one."""
        if self.links is None or (lost := self.links.lost) is None:
            return None
        if lost.rank == self.rank:
            return LostRank(f"{self.name(lost.rank)}, which is this one, {lost.why}")
        return LostRank(f"{self.name(lost.rank)} {lost.why}")

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raises RunError if the values of a rank differ from those of rank 0."""
        every = self.gather(dict(values))
        for r, own in enumerate(every):
            for name in [*every[0], *(n for n in own if n not in every[0])]:
                if own.get(name) != every[0].get(name):
                    those = [f"{own.get(name)!s:.80}", f"{every[0].get(name)!s:.80}"]
                    raise RunError(
                        f"{name} is {those[0]} on {self.name(r)}, but {those[1]} on "
                        f"{self.name(0)}: all ranks need the same model, data, options and "
                        "version."
                    )

    def check_factors(self, step: int, digest: str) -> None:
        """Raises Diverged if the factors of a rank differ from those of most ranks."""
        every = self.gather(digest)
        most = max(every, key=every.count)  # the first one in a tie
        odd = [self.name(r) for r, own in enumerate(every) if own != most]
        if odd:
            raise Diverged(
                f"step {step}: the factors of {', '.join(odd)} differ from those of the other "
                "ranks, probably because a device or a connection is faulty: nothing is saved; "
                "resume from the last checkpoint, on other hardware if it happens again."
            )


#: The group of a single process.
ALONE = Ranks()


def check_ranks(config: TrainConfig, ranks: Ranks, scores: bool = False) -> None:
    """Raises InputError if these ranks cannot train with this configuration; `scores` says that a
    function scores the model."""
    if ranks.pipeline and (config.sample_prompts or scores):
        what = "sample_prompts" if config.sample_prompts else "score"
        raise InputError(
            f"{what} needs the whole model, but a rank of a pipeline has only a part of it: leave "
            "it out.",
            field="sample_prompts" if config.sample_prompts else None,
        )


@contextmanager
def joined(tell: events.OnEvent) -> Iterator[Ranks]:
    """Connects the ranks of a run; yields ALONE if there are no others.

    An exception ends the run on all ranks, with a message that names this one. Raises RunError if
    the ranks cannot connect.
    """
    rank, backend = launched(), _backend()
    if rank is None or backend is None:
        yield ALONE
        return
    try:
        group = mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {rank} cannot reach the others by {backend}: {error}") from error
    device = mx.gpu if backend == "nccl" else mx.cpu
    ranks = Ranks(rank, group.size(), backend, group, mx.new_stream(mx.Device(device)))
    ranks.warn = lambda message: tell(events.warning(message))
    place = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        ranks.names = ranks.gather(place)
        ranks.links = Links(rank, ranks.size, address_of(ranks), ranks.gather, _wake)
    except OSError as error:
        raise RunError(f"rank {rank} ({place}) cannot reach all others: {error}") from error
    links = ranks.links
    given_up = threading.Event()
    threading.Thread(target=_end_in_time, args=(ranks, given_up), daemon=True).start()
    try:
        yield ranks
        ranks.gather(None)  # no rank leaves before rank 0 has saved
    except LostRank:
        raise
    except BaseException as error:
        links.fail(f"failed: {str(error).rstrip('.') or type(error).__name__}")
        raise
    finally:
        given_up.set()
        links.close()


def _end_in_time(ranks: Ranks, over: threading.Event) -> None:
    """Ends this process if a rank is lost and it does not end by itself, because a back end waits
    for that rank; but not while it is writing the state.

    If the back end holds the GIL while it waits, as MLX may when it frees memory during a sum of
    NCCL, this thread cannot run; then faulthandler's thread ends the process.
    """
    waited = 0.0
    try:
        while not over.wait(SECOND):
            lost = ranks.lost()
            if lost is None:
                continue
            exit_later(STUCK)
            waited += 0.0 if ranks.saving else SECOND
            if waited >= TO_END:
                print(f"mlx-segtrain: error: {lost}; this process had to be ended", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)
    finally:
        faulthandler.cancel_dump_traceback_later()


def exit_later(seconds: float) -> None:
    """Ends this process after `seconds`, even if the GIL is blocked, unless this is called again or
    faulthandler's dump is cancelled."""
    with suppress(OSError, AttributeError):  # stderr is no file
        faulthandler.dump_traceback_later(seconds, exit=True)


def _hang_up(hosts: list[list[str]]) -> None:
    """Closes the sockets of MLX's ring, which are found by the ports of these addresses.

    Otherwise its threads would wait for a lost rank forever, and so would MLX when it frees memory,
    because it waits for all streams.
    """
    ports = {int(at.rpartition(":")[2]) for own in hosts for at in own}
    for fd in map(int, os.listdir("/dev/fd")):
        try:
            copy = os.dup(fd)
        except OSError:  # the descriptor of the listing itself
            continue
        try:
            own = socket.socket(fileno=copy)
        except OSError:  # no socket
            os.close(copy)
            continue
        with own, suppress(OSError):
            if own.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if {own.getsockname()[1], own.getpeername()[1]} & ports:
                own.shutdown(socket.SHUT_RDWR)


def _wake() -> None:
    """Makes the main thread check for lost ranks, if it handles the signals of a run."""
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    main = threading.main_thread().ident
    if main and hasattr(handler, "allowed"):
        # A real signal also interrupts a wait for something else, such as a reward's command.
        signal.pthread_kill(main, signal.SIGTERM)
