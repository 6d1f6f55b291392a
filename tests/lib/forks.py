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
from typing import Any
from unittest.mock import patch

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
    Popen that the package uses."""

    def __init__(self, module: str, *args: Any, **how: Any):
        self._process = processes().Process(target=_main, args=(module, args), kwargs=how)
        self._process.start()
        self.pid = self._process.pid
        self.kill = self._process.kill

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode


def start(
    module: str, *args: str, files: Iterable[int], env: Mapping[str, str], **how: Any
) -> Fork:
    """Does the same as the package's `start`, in a fork instead of a new process."""
    own = {str(number): _File(number) for number in files}
    outputs = [_File(how[name]) for name in ("stdout", "stderr")]
    given = {"env": dict(env), "place": how["cwd"], "outputs": outputs}
    return Fork(module, *(own.get(arg, arg) for arg in args), **given)


def start_connected(module: str, settings: Mapping[str, str]) -> tuple[Connection, Fork]:
    """Does the same as the package's `start_connected`, in a fork instead of a new process."""
    wire, theirs = Pipe()
    with theirs:
        env = {**os.environ, **settings}
        return wire, Fork(module, _File(theirs.fileno()), env=env, place="/", outputs=[])


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
