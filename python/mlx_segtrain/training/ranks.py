"""The processes of a run (ranks), which are started by `mlx.launch` and connected by MLX's
collectives.

The ranks divide the micro-batches of a step (or the prompts, if completions are generated) among
themselves, and sum their gradients. In a pipeline, they divide the layers instead, and each
micro-batch runs through the layers of all ranks. All ranks take the same steps, because their
decisions depend only on values that are bit-identical on all ranks. Only rank 0 writes files. A run
on one device has a group of one rank.
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

#: Environment variables that mlx.launch and MLX's back ends set for a rank. They are not
#: recorded as settings of a run.
LAUNCH = (
    *("MLX_RANK", "MLX_WORLD_SIZE", "MLX_HOSTFILE", "MLX_RING_VERBOSE"),
    *("MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR", "MLX_JACCL_RING", "MLX_NCCL_TIMEOUT"),
)
#: LOOK is the interval between checks for lost ranks; SLOW is the time after which a warning names
#: the slow ranks. Both are in seconds.
LOOK, SLOW = 0.05, 60.0
#: The maximum number of bytes gathered in one sum, which limits the memory that MLX needs. It must
#: be a multiple of 4.
PIECE = 1 << 28
#: Times in seconds that apply once another rank is lost. TO_END is the time within which this rank
#: must end, excluding the time for saving; STUCK is the maximum time for which the GIL may be
#: blocked before the process is ended; SECOND is the interval between checks.
TO_END, STUCK, SECOND = 25.0, 25.0, 1.0


class LostRank(RunError):
    """A rank has failed, has ended or does not respond."""


class Diverged(RunError):
    """The factors differ between the ranks."""


def launched() -> int | None:
    """Returns the rank of this process, or None if mlx.launch did not start it."""
    rank = os.environ.get("MLX_RANK", "")
    return int(rank) if rank.isdecimal() and _backend() else None


def _backend() -> str | None:
    """Returns the name of MLX's back end, according to the variables that mlx.launch has set, or
    None for a single process."""
    if os.environ.get("NCCL_HOST_IP") and os.environ.get("MLX_WORLD_SIZE", "1") != "1":
        return "nccl"
    if os.environ.get("MLX_IBV_DEVICES") and os.environ.get("MLX_JACCL_COORDINATOR"):
        return "jaccl"
    return "ring" if len(_hosts()) > 1 else None


def _hosts() -> list[list[str]]:
    """Returns, for each rank, a list of its addresses in MLX's ring."""
    try:
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text(encoding="utf-8"))
    except (KeyError, OSError, ValueError):  # for a single host, the file is empty
        return []
    return [own if isinstance(own, list) else [own] for own in hosts]


def address_of(ranks: "Ranks") -> str:
    """Returns the IP address of this rank on the network that MLX uses."""
    backend, rank = ranks.backend, ranks.rank
    if backend == "ring":
        return _hosts()[rank][0].rpartition(":")[0].strip("[]")
    first = os.environ["NCCL_HOST_IP"] if backend == "nccl" else ""
    first = first or os.environ["MLX_JACCL_COORDINATOR"].rpartition(":")[0]
    if rank == 0:
        return first
    family, kind, _, _, at = socket.getaddrinfo(first, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as route:  # connecting this socket sends nothing
        route.connect(at)
        return route.getsockname()[0]


@dataclass(eq=False)
class Ranks:
    """A group of processes, by default only this process. `warn` is called with a message that
    names slow ranks."""

    rank: int = 0
    size: int = 1
    backend: str = ""
    group: Any = None
    stream: Any = None
    pipeline: bool = False  #: whether each rank runs only a part of the layers
    #: The addresses of each rank, if transfers.py has created a ring.
    ring: list[list[str]] = field(default_factory=list)
    links: Links | None = None
    names: list[str] = field(default_factory=list)
    warn: Callable[[str], None] = lambda message: None
    #: Waits for transfers. It is called before each sum, because back ends may reorder transfers
    #: and sums.
    settle: Callable[[], None] = lambda: None
    waited: float = 0.0  #: seconds spent waiting for other ranks
    saving: bool = False  #: whether the state is being written; the process must not end then

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only rank that writes files and prints."""
        return self.rank == 0

    @property
    def ends(self) -> bool:
        """Whether this rank has the outputs of batches; in a pipeline, only the last rank does."""
        return not self.pipeline or self.rank == self.size - 1

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.names[rank]})" if self.names else f"rank {rank}"

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this rank's share of the items of a step: every `size`-th item, or all items in a
        pipeline."""
        return items if self.pipeline else items[self.rank :: self.size]

    def unshared(self, own: Sequence[T]) -> list[T]:
        """Undoes `share`: returns the items of all ranks (JSON values) in their original order."""
        every = self.gather(list(own))
        return [every[i % self.size][i // self.size] for i in range(sum(map(len, every)))]

    def add(self, outputs: Sequence[Any], gradient: mx.array) -> tuple[list[float], mx.array]:
        """Returns the outputs and the gradient, summed over all ranks. The sums are bit-identical
        on all ranks."""
        n = gradient.size
        parts = [gradient, mx.array([float(x) for x in outputs], mx.float32)]
        total = self._sum(mx.concatenate(parts))
        return [float(x) for x in np.array(total[n:])], total[:n]

    def gather(self, value: T) -> list[T]:
        """Returns a list of the values that the ranks pass. Each value must be serializable as
        JSON."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        return [json.loads(own) for own in self.every(text)]

    def gathered(self, rows: Mapping[str, T]) -> dict[str, T]:
        """Merges the mappings of all ranks into one mapping. The values must be serializable as
        JSON."""
        return {name: x for own in self.gather(dict(rows)) for name, x in own.items()}

    def given(self, content: bytes) -> bytes:
        """Returns, on every rank, the `content` that rank 0 passes."""
        return content if self.size == 1 else self.every(content if self.first else b"")[0]

    def every(self, content: bytes) -> list[bytes]:
        """Returns a list of the contents that the ranks pass, in the order of the ranks."""
        lengths = np.zeros(self.size, np.int64)
        lengths[self.rank] = len(content)
        # Each int64 is 0 on all ranks except one, so its int32 halves can be summed exactly.
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
        """Returns the sum of an array over all ranks. Raises LostRank if a rank is lost."""
        if self.links and self.links.suspects:
            self._blame(None)
        self.settle()
        mx.eval(x)
        total = mx.distributed.all_sum(x, group=self.group, stream=self.stream)
        self.start([total])
        self.wait_for([total])
        return total

    def start(self, arrays: Sequence[mx.array]) -> None:
        """Starts to evaluate arrays that involve transfers. Raises LostRank if MLX reports an
        error."""
        try:
            mx.async_eval(arrays)
        except RuntimeError as error:
            self._blame(error)

    def wait_for(self, arrays: Sequence[mx.array]) -> None:
        """Waits for arrays that depend on other ranks. Raises LostRank if a rank is lost.

        Another thread does the waiting, on a stream that nothing else uses. Meanwhile, the calling
        thread checks for lost ranks, and can stop waiting.
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
            # Printed now, because the GIL may be blocked when this process ends (see _end_in_time).
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
                # Only the first of the waiting ranks warns.
                if self.rank == min(r for r in range(self.size) if r not in slow):
                    those = ", ".join(map(self.name, slow))
                    self.warn(f"the other ranks have waited {SLOW:.0f} s for {those}")

    def _blame(self, error: BaseException | None) -> None:
        """Waits until the ranks agree on which rank is lost, then raises LostRank. This is needed
        because MLX reports a lost connection without saying which rank is lost."""
        deadline = time.monotonic() + watch.PATIENCE + 3 * watch.SETTLE
        while self.links and time.monotonic() < deadline:
            if (lost := self.lost()) is not None:
                raise lost from None
            time.sleep(LOOK)
        raise RunError(f"the ranks can no longer reach each other: {error}") from error

    def lost(self) -> LostRank | None:
        """Returns the error that names the lost rank, or None if no rank is lost."""
        if self.links is None or (lost := self.links.lost) is None:
            return None
        if lost.rank == self.rank:
            return LostRank(f"{self.name(lost.rank)}, which is this one, {lost.why}")
        return LostRank(f"{self.name(lost.rank)} {lost.why}")

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raises RunError if the values of a rank differ from rank 0's values."""
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
        """Raises Diverged if the factors of a rank differ from the factors that most ranks have.
        `digest` is a hash of this rank's factors."""
        every = self.gather(digest)
        most = max(every, key=every.count)  # in a tie, the first one
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
    """Raises InputError if these ranks cannot train with this configuration. `scores` is whether
    the caller of `train` has passed a `score` function."""
    if ranks.pipeline and (config.sample_prompts or scores):
        what = "sample_prompts" if config.sample_prompts else "score"
        raise InputError(
            f"{what} requires the whole model, but each rank of a pipeline has only a part of the "
            "model: leave this option out.",
            field="sample_prompts" if config.sample_prompts else None,
        )


@contextmanager
def joined(tell: events.OnEvent) -> Iterator[Ranks]:
    """Connects the ranks of a run; yields ALONE if there is only one process.

    An exception in the `with` block ends the run on all ranks, with a message that names this rank.
    Raises RunError if the ranks cannot connect.
    """
    rank, backend = launched(), _backend()
    if rank is None or backend is None:
        yield ALONE
        return
    try:
        group = mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {rank} cannot reach the other ranks ({backend}): {error}") from error
    device = mx.gpu if backend == "nccl" else mx.cpu
    ranks = Ranks(rank, group.size(), backend, group, mx.new_stream(mx.Device(device)))
    ranks.warn = lambda message: tell(events.warning(message))
    place = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        ranks.names = ranks.gather(place)
        ranks.links = Links(rank, ranks.size, address_of(ranks), ranks.gather, _wake)
    except OSError as error:
        raise RunError(f"rank {rank} ({place}) cannot reach all other ranks: {error}") from error
    links = ranks.links
    given_up = threading.Event()
    threading.Thread(target=_end_in_time, args=(ranks, given_up), daemon=True).start()
    try:
        yield ranks
        ranks.gather(None)  # so that no rank leaves before rank 0 has saved
    except LostRank:
        raise
    except BaseException as error:
        links.fail(f"failed: {str(error).rstrip('.') or type(error).__name__}")
        raise
    finally:
        given_up.set()
        links.close()


def _end_in_time(ranks: Ranks, over: threading.Event) -> None:
    """Ends this process from a separate thread if a back end waits forever for a lost rank, but not
    while the state is being written.

    This thread cannot run if the back end holds the GIL while it waits, which can happen when MLX
    frees memory during an NCCL sum. In this case, faulthandler's thread ends the process.
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
                print(
                    f"mlx-segtrain: error: {lost}; this process had to be terminated",
                    file=sys.stderr,
                )
                sys.stderr.flush()
                os._exit(1)
    finally:
        faulthandler.cancel_dump_traceback_later()


def exit_later(seconds: float) -> None:
    """Ends this process after `seconds`, even if the GIL is blocked. A later call replaces this
    deadline; faulthandler.cancel_dump_traceback_later cancels it."""
    with suppress(OSError, AttributeError):  # stderr may not be a file
        faulthandler.dump_traceback_later(seconds, exit=True)


def _hang_up(hosts: list[list[str]]) -> None:
    """Closes the sockets of MLX's ring, which are identified by the ports of these addresses.

    Otherwise the ring's threads would wait for a lost rank forever. MLX would then wait forever,
    too, because it waits for all streams when it frees memory.
    """
    ports = {int(at.rpartition(":")[2]) for own in hosts for at in own}
    for fd in map(int, os.listdir("/dev/fd")):
        try:
            copy = os.dup(fd)
        except OSError:  # the descriptor that was used to list the folder
            continue
        try:
            own = socket.socket(fileno=copy)
        except OSError:  # not a socket
            os.close(copy)
            continue
        with own, suppress(OSError):
            if own.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if {own.getsockname()[1], own.getpeername()[1]} & ports:
                own.shutdown(socket.SHUT_RDWR)


def _wake() -> None:
    """Makes the main thread check for lost ranks, provided that it handles the signals of a run."""
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    main = threading.main_thread().ident
    if main and hasattr(handler, "allowed"):
        # A real signal also interrupts other waits of the main thread, such as waiting for a
        # reward's command.
        signal.pthread_kill(main, signal.SIGTERM)
