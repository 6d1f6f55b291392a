"""Handles untrusted templates, tokenizers and data in processes that can be killed.

A root process loads the libraries. For each model, a process is forked from the root process, and
loads the model's tokenizer. Workers, which render templates and encode text, are forked from that
process. As a result, a worker starts in milliseconds, and a worker that hangs or uses too much
memory can be killed without affecting the others. Every wait has a time limit.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import processes
from ...errors import InputError
from .. import opening
from ..pools import Busy, Pool
from .child import receive, send

#: A command counts as slow after SLICE_S seconds. Only MOST_SLOW slow commands may run at a time.
SLICE_S, MOST_SLOW = 0.5, 3
#: Maximum number of idle workers per model.
MOST_IDLE = 2
#: Time limits in seconds: for loading the libraries, which may be slow on a busy machine, and for a
#: fork.
START_S, FORK_S = 120.0, 30.0
#: Prompts of more than LARGE characters are encoded one at a time, with at most MOST_MEMORY bytes
#: of memory.
LARGE, MOST_MEMORY = 1 << 16, 448 << 20

_PROMPTS = Pool("prompts", MOST_SLOW + 2, 256)
_LARGE_PROMPTS = Pool("large prompts", 1, 8)
INSPECTIONS = Pool("inspections", 2, 16)


def prompts(size: int) -> Pool:
    """Returns the pool for prompts with `size` characters."""
    return _LARGE_PROMPTS if size > LARGE else _PROMPTS


@dataclass(frozen=True)
class Limits:
    """The limits of a command: seconds of CPU time, and bytes of additional memory. The limit on
    elapsed time is four times the limit on CPU time."""

    seconds: float
    memory: int

    @classmethod
    def of_prompt(cls, size: int) -> Limits:
        """Returns the limits for a prompt of `size` characters. A tokenizer needs at most 400 bytes
        per character."""
        return cls(5 + size / 100_000, min((48 << 20) + 512 * size, MOST_MEMORY))


#: Limits for loading a tokenizer (LOADING), and for inspecting a data set (INSPECTING).
LOADING = Limits(60, 1 << 30)
INSPECTING = Limits(120, 256 << 20)


class Failed(InputError):
    """The command failed, or its process was killed."""


@dataclass(eq=False)
class _Process:
    """The parent's view of a process: its socket, and the command that is running."""

    wire: socket.socket
    pid: int
    parent: _Process | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    begun: float = 0.0  #: when the process received its current command
    seconds: float = 1.0  #: the time limit of that command
    evicted: bool = False  #: whether it is being killed because too many commands are slow

    @property
    def spent(self) -> float:
        """The fraction of the command's time limit that has passed."""
        return (time.monotonic() - self.begun) / self.seconds

    def fork(self) -> _Process:
        ours, theirs = socket.socketpair()
        with theirs, self.lock:
            self.wire.settimeout(FORK_S)
            send(self.wire, {"op": "fork"}, (theirs.fileno(),))
            answer = receive(self.wire)
        if answer is None:
            raise OSError("it has ended")
        return _Process(ours, answer[0]["value"], self)

    def tell(self, op: str, limits: Limits | None, **values: Any) -> None:
        limited = {} if limits is None else {"limits": vars(limits)}
        self.wire.settimeout(FORK_S)
        send(self.wire, {"op": op, **limited, **values})

    def says_something(self, seconds: float) -> bool:
        """Returns whether a reply arrives or the socket closes within `seconds`."""
        wait = select.poll()
        wait.register(self.wire, select.POLLIN)
        return bool(wait.poll(1000 * seconds))

    def answer(self, seconds: float) -> Any:
        """Returns the reply. Raises TimeoutError if no reply arrives in time, OSError if the
        process was killed, or _Told if the command failed."""
        self.wire.settimeout(max(seconds, 0.001))
        answer = receive(self.wire)
        if answer is None:
            raise OSError("it was killed")
        values = answer[0]
        if "error" in values:
            raise _Told(values["error"], values["kind"])
        return values["value"]

    def kill(self) -> None:
        self.wire.close()
        if self.parent is not None:
            with suppress(OSError), self.parent.lock:
                self.parent.tell("kill", None, pid=self.pid)
                self.parent.answer(FORK_S)


class _Told(Exception):
    """An error in the other process: its message, and the name of its type."""

    def __init__(self, reason: str, kind: str):
        super().__init__(reason)
        self.kind = kind


class _Root:
    """The process that has loaded the libraries. If this process has ended, the next fork starts a
    new one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: _Process | None = None
        self.popen: subprocess.Popen[bytes] | None = None

    def fork(self) -> _Process:
        with self.lock:
            for _ in range(2):
                try:
                    return self._running().fork()
                except OSError:
                    self.close()
        raise Busy("the processes that read untrusted files cannot be started: try again.")

    def _running(self) -> _Process:
        if self.process is None:
            ours, theirs = socket.socketpair()
            with theirs:
                self.popen = processes.start(
                    f"{__package__}.child",
                    *(str(theirs.fileno()), *opening.confined()),
                    files=[theirs.fileno()],
                    env={**processes.environment((), {}), **SETTINGS},
                    **dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL),
                )
            self.process = _Process(ours, self.popen.pid)
            self.process.tell("nothing", None)
            self.process.answer(START_S)
        return self.process

    def close(self) -> None:
        """Ends the process and all its descendants."""
        if self.popen is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
        if self.process is not None:
            self.process.wire.close()
        self.popen = self.process = None


_ROOT = _Root()
atexit.register(_ROOT.close)
#: Libraries must not use the network, and must not start threads, which a fork would lose.
SETTINGS = {
    **{"PYTHONDONTWRITEBYTECODE": "1", "RUST_BACKTRACE": "0"},
    **{"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"},
    **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
}


class Confined:
    """The workers for a model's tokenizer, or for work without a model. All calls block, so they
    must be made in threads."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.users = 0  #: the number of calls in progress, updated by the owner
        self._lock = threading.Lock()  # guards the attributes below
        self._keeper: _Process | None = None  # loads the tokenizer and forks workers
        self._idle: list[_Process] = []
        self._slow: list[_Process] = []
        self._closed = False

    def start(self) -> None:
        """Loads the tokenizer unless it is already loaded. Raises InputError if that fails."""
        with self._lock:
            if self._keeper is not None:
                return
            if self._closed:
                raise Busy("the model was replaced: try again.")
            keeper = _ROOT.fork()
            try:
                if self.folder is not None:
                    keeper.tell("load", LOADING, folder=str(self.folder))
                    keeper.answer(4 * LOADING.seconds)
            except BaseException as error:
                keeper.kill()
                raise _as_failure(error, LOADING, f"the tokenizer of {self.folder}") from None
            self._keeper = keeper

    def ask(self, op: str, limits: Limits, what: str, **values: Any) -> Any:
        """Runs a command in a worker and returns its result. Raises Failed if the command fails,
        with a message about `what`, or Busy if the client should try again."""
        self.start()
        begun, worker = time.monotonic(), self._take()
        # The system limits only CPU time. Elapsed time may be longer on a busy machine, so its
        # limit is four times as high.
        worker.begun, worker.seconds = begun, 4 * limits.seconds
        try:
            worker.tell(op, limits, **values)
            if not worker.says_something(SLICE_S):
                self._add_slow(worker)
            answer = worker.answer(begun + worker.seconds - time.monotonic())
        except BaseException as error:
            self._give_back(worker, failed=True)
            if worker.evicted and not isinstance(error, _Told):
                raise Busy(
                    f"{what} was stopped, because too many requests are slow: try again in a "
                    "moment."
                ) from None
            raise _as_failure(error, limits, what) from None
        self._give_back(worker, failed=False)
        return answer

    def _take(self) -> _Process:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            keeper = self._keeper
        if keeper is None:
            raise Busy("the model was replaced: try again.")
        try:
            return keeper.fork()
        except OSError:  # it has ended: the next call starts another process
            with self._lock:
                if self._keeper is keeper:
                    self._keeper = None
            raise Busy("the tokenizer's process has ended: try again.") from None

    def _add_slow(self, worker: _Process) -> None:
        """Adds a slow worker. If there are too many slow workers, ends the one that is closest to
        its time limit."""
        with self._lock:
            self._slow.append(worker)
            running = [x for x in self._slow if not x.evicted]
            worst = max(running, key=lambda x: x.spent)
            worst.evicted = evict = len(running) > MOST_SLOW
        if evict:
            # The thread that waits for this worker receives an error, and then kills the worker.
            with suppress(OSError):
                worst.wire.shutdown(socket.SHUT_RDWR)

    def _give_back(self, worker: _Process, *, failed: bool) -> None:
        with self._lock:
            slow = worker in self._slow
            if slow:
                self._slow.remove(worker)
            keep = not (failed or slow or self._closed) and len(self._idle) < MOST_IDLE
            if keep:
                self._idle.append(worker)
        if not keep:
            worker.kill()

    def close(self) -> None:
        """Ends all workers. Calls in progress fail."""
        with self._lock:
            self._closed = True
            ended = [*self._idle, *self._slow]
            keeper, self._keeper, self._idle = self._keeper, None, []
        for process in (*ended, *(() if keeper is None else (keeper,))):
            with suppress(OSError):
                process.wire.shutdown(socket.SHUT_RDWR)
            if process is keeper:
                process.kill()


def _as_failure(error: BaseException, limits: Limits, what: str) -> BaseException:
    if isinstance(error, _Told):
        if error.kind == "memory":
            return Failed(f"{what} uses more than {limits.memory >> 20} MiB of memory.")
        return Failed(str(error) if error.kind == "InputError" else f"{what} failed: {error}")
    if isinstance(error, TimeoutError):
        return Failed(f"{what} takes longer than {limits.seconds:.0f} s.")
    if isinstance(error, OSError):
        return Failed(
            f"{what} was stopped: it used more than {limits.seconds:.0f} s of processor time or "
            f"{limits.memory >> 20} MiB of memory."
        )
    return error
