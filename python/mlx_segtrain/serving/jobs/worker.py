"""Runs a job. The server (queue.py) starts this process, which calls main(KIND, FILE, LOCK).

FILE contains the job's configuration and the folders that the job may read. LOCK is the descriptor
of a lock file, which stays locked while the process runs. A job with several ranks runs in other
processes, which this process starts and follows (group.py).

The process writes events to stdout, one per line, and writes the first event before it imports
large packages. The process keeps running if the server ends. Lines that libraries print become
events of type log; otherwise, a printed line from an untrusted file could pass for one of our
events.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ... import events
from ...errors import InputError, RunError
from ...torchless import hide_torch
from ..opening import confine
from ..roots import Roots
from .kinds import kind_of, tell

#: The maximum number of printed characters that are logged per line (LONGEST) and per job (MOST).
LONGEST, MOST = 4000, 4 << 20


class Printed(io.TextIOBase):
    """Turns printed lines into events of type log."""

    def __init__(self) -> None:
        self.rest, self.left = "", MOST

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self._tell(line)
        self.rest = self.rest[-LONGEST:]
        return len(text)

    def _tell(self, line: str) -> None:
        if self.left > 0 and line.strip():
            # Only the last state of a progress bar is logged.
            line = line.rpartition("\r")[2][:LONGEST] or line[:LONGEST]
            self.left -= len(line)
            tell({"type": "log", "line": line if self.left > 0 else "further output is not logged"})

    def end(self) -> None:
        self._tell(self.rest)
        self.rest = ""


def main(kind: str, file: str, lock: str) -> int:
    """Runs a job. Returns 0 if it is done, 1 if it failed, or 130 if it was cancelled."""
    hide_torch()
    os.set_inheritable(int(lock), False)  # processes that libraries start may outlive this one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump could contain a token
    tell({**events.started(), "pid": os.getpid(), "kind": kind})
    sys.stdout = sys.stderr = printed = Printed()
    if not kind_of(kind).trains:  # a training run handles the signal itself
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = last_event(lambda: _run(kind, Path(file)))
    printed.end()
    tell(end)
    return {"done": 0, "failed": 1, "cancelled": 130}[end["type"]]


def _run(kind: str, file: Path) -> events.Event:
    given = json.loads(file.read_text(encoding="utf-8"))
    if "hosts" not in given:
        return run_confined(kind, given)
    from . import group

    return group.run(kind, given)


def run_confined(kind: str, given: dict[str, Any]) -> events.Event:
    """Runs a job in this process. If there are roots, the process can from then on read only files
    below them."""
    if given["roots"]:
        confine(Roots(map(Path, given["roots"]), Path(given["store"])))
    return kind_of(kind).run(given["values"])


def last_event(run: Callable[[], events.Event]) -> events.Event:
    """Calls `run`, which runs a job, and returns the job's last event, even if `run` raises an
    exception."""
    try:
        return run()
    except KeyboardInterrupt:
        return {"type": "cancelled", "ts": events.now(), "message": "nothing was written"}
    except (InputError, RunError) as error:
        return {**events.failed(error), "error": str(error)}
    except SystemExit:
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        # Any other exception is a bug. Its traceback is logged, but the client receives only a
        # sentence.
        import traceback

        traceback.print_exc()
        return events.failed(error)
