"""Forks of a process that has already imported all modules for a run. They start in 0.6 s instead
of 5 s."""

import functools
import multiprocessing
import os
import subprocess
import sys
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
