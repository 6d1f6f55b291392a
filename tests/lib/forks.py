"""Forks of a process that has imported everything that a run needs. They start in 0.6 s instead of
5 s."""

import functools
import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from lib.folders import write_tokenizer

TESTS = Path(__file__).parents[1]
#: Modules that are imported once, before the forks.
PRELOADED = ["lib.warm", "lib.runs", "lib.launched", "pytest"]


@functools.cache
def processes() -> Any:
    """Returns a multiprocessing context whose processes are forks.

    faults.c is loaded in each of these processes and does nothing unless FAULT_ROOT is set. On a
    Mac, where Apple's libraries do not work after a fork, processes are spawned instead, and
    faults.c is not loaded.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    global _place  # the folder is removed when this process ends
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
        first = found.Process(target=os.getpid)  # starts the process from which others are forked
        first.start()
        first.join()
    assert first.exitcode == 0
    return found


def start_connected(module: str, settings: Mapping[str, str]) -> tuple[Connection, Any]:
    """Does the same as the package's start_connected, in a fork instead of a new process. Of Popen,
    the second value has only what starting modules call."""
    wire, theirs = Pipe()
    with theirs:
        process = processes().Process(target=_connected, args=(module, theirs, dict(settings)))
        process.start()
    process.wait = process.join  # type: ignore[attr-defined]
    return wire, process


def _connected(module: str, wire: Connection, settings: Mapping[str, str]) -> None:
    os.environ.update(settings)
    importlib.import_module(module).main(str(wire.fileno()))
