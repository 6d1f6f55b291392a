"""Starts Python processes of this package with a safe module path and few environment variables.

`python -m` puts the current folder at the front of the module path, so a file `yaml.py` in this
folder would replace the package yaml. Our processes are therefore started in another folder and in
isolated mode, which Python 3.10 supports, unlike the flag `-P`. They receive the current process's
module path, without the folder in which that process was started, and only the environment
variables that they need.
"""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

#: Sets the module path before any module outside the standard library is imported, loads this
#: package from its folder, and calls `main` of one of its modules.
START = """\
import sys
sys.path[:] = sys.argv[1].split(chr(0x1f))
import importlib.util
spec = importlib.util.spec_from_file_location(
    sys.argv[2], sys.argv[3] + "/__init__.py", submodule_search_locations=[sys.argv[3]]
)
sys.modules[sys.argv[2]] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
del sys.argv[:4]
sys.exit(importlib.import_module(sys.argv[0]).main(*sys.argv[1:]))
"""
#: Environment variables passed to every process. They determine file locations, the language, and
#: the behaviour of numerical libraries.
COMMON = (
    *("HOME", "LANG", "LANGUAGE", "LC_*", "LOGNAME", "PATH", "TMPDIR", "TZ", "USER"),
    *("CONDA_PREFIX", "VIRTUAL_ENV", "XDG_CACHE_HOME", "LD_LIBRARY_PATH", "DYLD_*_PATH"),
    *("CUDA_*", "CUDNN_*", "NVIDIA_*", "METAL_*", "MLX_*", "MTL_*"),
    *("MKL_*", "OMP_*", "OPENBLAS_*", "VECLIB_*"),
    *("HF_HOME", "HF_HUB_CACHE"),
)
#: Additional variables for processes that connect to other machines.
NETWORK = (
    *("CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE"),
    *("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"),
    *("all_proxy", "https_proxy", "http_proxy", "no_proxy"),
)
#: Variables passed only to the server.
OWN = ("MLX_SEGTRAIN_TOKEN",)


#: The folder in which this process was started.
STARTED_IN: str | None = None
with suppress(OSError):  # the folder may have been deleted
    STARTED_IN = os.path.realpath(os.getcwd())


def command(module: str, *args: str) -> list[str]:
    """Returns a command that runs `main(*args)` of one of our modules in a new Python process. The
    caller must run the command in a safe folder, such as /."""
    package = Path(__file__).parent
    folders = [
        path
        for path in sys.path
        if os.path.isabs(path) and "\x1f" not in path and os.path.realpath(path) != STARTED_IN
    ]
    places = ["\x1f".join(folders), package.name, str(package)]
    return [sys.executable, "-I", "-c", START, *places, module, *args]


def environment(more: Iterable[str], added: Mapping[str, str]) -> dict[str, str]:
    """Returns this process's environment, updated with `added` and restricted to variables whose
    names match COMMON or `more` (which may contain patterns such as "HF_*")."""
    patterns = (*COMMON, *more)
    return {
        name: value
        for name, value in {**os.environ, **added}.items()
        if name not in OWN and any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def start(
    module: str, *args: str, files: Iterable[int], env: Mapping[str, str], **how: Any
) -> subprocess.Popen[Any]:
    """Runs `main(*args)` of one of our modules in a new process, which inherits these open files.

    The new process has its own session, so Ctrl-C in a terminal reaches only the current process,
    which then ends the processes that it has started.
    """
    how = {"stdin": subprocess.DEVNULL, "cwd": "/", "start_new_session": True} | how
    return subprocess.Popen(command(module, *args), pass_fds=tuple(files), env=env, **how)


def start_connected(
    module: str, settings: Mapping[str, str], **how: Any
) -> tuple[Connection, subprocess.Popen[Any]]:
    """Runs `main` of one of our modules as `start` does, and connects the two processes. The
    argument of `main` is the file descriptor of the connection. `settings` contains environment
    variables."""
    wire, theirs = Pipe()
    with theirs:
        number, env = theirs.fileno(), {**environment((), {}), **settings}
        return wire, start(module, str(number), files=[number], env=env, **how)


def set_limit(kind: int, value: int | None = None) -> None:
    """Sets the soft limit of this process for a resource. The limit becomes `value`, or the hard
    limit if `value` is None or larger."""
    hard = resource.getrlimit(kind)[1]
    if value is None or (hard != resource.RLIM_INFINITY and value > hard):
        value = hard
    resource.setrlimit(kind, (value, hard))


class _Memory:
    """Limits the memory of this process. On Linux the system enforces the limit; elsewhere a thread
    checks it regularly."""

    def __init__(self) -> None:
        self.pid, self.most = 0, 0

    def allow(self, more: int) -> None:
        """Allows this process to allocate `more` additional bytes. Beyond this limit, allocations
        fail or the process is killed."""
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
        except OSError:
            return self._watch(more)
        set_limit(resource.RLIMIT_AS, pages * resource.getpagesize() + more)

    def _watch(self, more: int) -> None:
        self.most = _resident() + more
        if self.pid != os.getpid():  # a forked process has no threads
            self.pid = os.getpid()
            threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            if _resident() > self.most:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)


MEMORY = _Memory()


def _resident() -> int:
    """Returns the peak resident memory of this process in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
