"""Forks of a process that has already imported all modules for a run. They start in 0.6 s instead
of 5 s."""

import functools
import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import DupFd
from operator import methodcaller
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any
from unittest.mock import patch

import mlx_segtrain.commands.main
import mlx_segtrain.processes
from lib.folders import write_tokenizer

TESTS = Path(__file__).parents[1]
#: Modules that are imported once, before the process is forked.
PRELOADED = ["lib.warm", "lib.runs", "lib.launched", "pytest"]


@functools.cache
def processes() -> Any:
    """Returns a multiprocessing context whose processes are forks.

    faults.c is loaded into each of these processes and is inactive unless FAULT_ROOT is set. On a
    Mac, processes are spawned without faults.c, because Apple's libraries do not work after a fork.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    if multiprocessing.parent_process() is not None:
        # This process is a fork itself. It uses the process from which it was forked, although
        # multiprocessing would start another one.
        multiprocessing.forkserver._forkserver.ensure_running = lambda: None
        return found
    found.set_forkserver_preload(PRELOADED)
    global _place  # this process removes the folder when it ends
    _place = TemporaryDirectory()
    model, library = Path(_place.name, "model"), Path(_place.name, "faults.so")
    write_tokenizer(model)
    (model / "config.json").write_text('{"model_type": "llama"}')
    source = TESTS / "lib" / "faults.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    before = {name: os.environ.get(name, "") for name in ("LD_PRELOAD", "PYTHONPATH")}
    own = {
        "LD_PRELOAD": f"{library} {before['LD_PRELOAD']}".rstrip(),
        "PYTHONPATH": f"{TESTS}:{before['PYTHONPATH']}".rstrip(":"),
        **{"WARM_MODEL": str(model), "OMP_NUM_THREADS": "1"},
    }
    with patch.dict(os.environ, own):
        first = found.Process(target=os.getpid)  # starts the server process that forks the others
        first.start()
        first.join()
    assert first.exitcode == 0
    return found


class _File:
    """A file descriptor that is passed to a fork when the fork starts. This process keeps no copy
    of the descriptor, because the copy would hold a lock."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return methodcaller("detach"), (DupFd(self.number),)


class Fork:
    """A fork that runs `main` of one of our modules. It provides the methods and attributes of
    Popen that the package and the tests use."""

    stdout: IO[str]

    def __init__(self, module: str, *args: Any, **how: Any):
        self._process = processes().Process(target=_main, args=(module, args), kwargs=how)
        self._process.start()
        self.pid = self._process.pid
        self.kill = self._process.kill

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"process {self.pid} has not ended in time"
        return self._process.exitcode


def start(
    module: str, *args: str, files: Iterable[int], env: Mapping[str, str], **how: Any
) -> Fork:
    """Does the same as the package's `start`, in a fork instead of a new process."""
    own = {str(number): _File(number) for number in files}
    nowhere = os.open(os.devnull, os.O_RDWR)
    outputs = [how.get("stdout", 1), how.get("stderr", 2)]
    outputs = [_File(nowhere if x == subprocess.DEVNULL else x) for x in outputs]
    given = {"env": dict(env), "place": how.get("cwd", "/"), "outputs": outputs}
    fork = Fork(module, *(own.get(arg, arg) for arg in args), **given)
    os.close(nowhere)
    return fork


def start_connected(module: str, settings: Mapping[str, str]) -> tuple[Connection, Fork]:
    """Does the same as the package's `start_connected`, in a fork instead of a new process."""
    wire, theirs = Pipe()
    with theirs:
        env = {**os.environ, **settings}
        return wire, Fork(module, _File(theirs.fileno()), env=env, place="/", outputs=[])


def start_server(*args: str, env: Mapping[str, str], cwd: Path, stderr: int) -> Fork:
    """Runs `mlx-segtrain serve` with these arguments in a fork. Its output can be read from
    `stdout`."""
    ours, theirs = os.pipe()
    server = Fork(__name__, *args, env=env, place=cwd, outputs=[_File(theirs), _File(stderr)])
    os.close(theirs)
    server.stdout = os.fdopen(ours)
    return server


def main(*args: str) -> int:
    """Runs a server whose processes (for jobs and tokenizers) are forks, too."""
    mlx_segtrain.processes.start = start
    sys.argv[1:] = ["serve", *args]
    return mlx_segtrain.commands.main.main()


def _main(
    module: str, args: list[Any], env: dict[str, str], place: os.PathLike[str], outputs: list[Any]
) -> None:
    os.setsid()
    os.chdir(place)
    os.environ.clear()
    os.environ.update(env)
    for number, file in enumerate(outputs, 1):
        os.dup2(file, number)
    sys.exit(importlib.import_module(module).main(*map(str, args)))
