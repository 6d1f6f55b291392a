"""A rank of a job, started by mlx.launch (launcher.py): main(KIND).

The rank reads the job's configuration from stdin, so that lists of processes do not show it. It
prints its events as one line each for the job's process (group.py). They are ASCII, because
mlx.launch may split the output between any two bytes.
"""

import json
import os
import resource
import socket
import sys
from itertools import takewhile
from typing import Any

from ...torchless import hide_torch
from .kinds import tell
from .worker import Printed, last_event, run_confined


def main(kind: str) -> int:
    """Runs this rank's part of a job. Returns 0, or 1 if it failed."""
    hide_torch()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump could contain a token
    sys.stdout = sys.stderr = printed = Printed()
    rank = int(os.environ["MLX_RANK"])
    tell({"type": "rank", "rank": rank, "pid": os.getpid(), "host": socket.gethostname()})
    given = _given()
    tell({"type": "ready", "rank": rank})
    end = last_event(lambda: run_confined(kind, given))
    printed.end()
    tell({"type": "end", "rank": rank, "event": end})
    if end["type"] == "failed":
        os._exit(1)  # a normal exit waits for the device, which may wait for a lost rank
    return 0


def _given() -> dict[str, Any]:
    """Reads lines up to an empty one, and closes stdin. If stdin stayed open, mlx.launch would
    constantly check whether it can write to it, which takes a whole core."""
    text = "".join(line.rstrip("\r\n") for line in takewhile(str.strip, sys.stdin))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return json.loads(text)
