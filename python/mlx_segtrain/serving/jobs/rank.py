"""Runs one rank of a job. mlx.launch (launcher.py) starts this process, which calls main(KIND).

The rank reads the job's configuration from stdin, so that the configuration does not appear in
process lists. The rank prints its events, one per line, for the job's process (group.py). Events
are ASCII, because mlx.launch may split the output between any two bytes.
"""

import json
import os
import resource
import socket
import sys
from itertools import takewhile
from typing import Any

from ...torchless import hide_torch
from ..hosts import share_memory
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
    share_memory(given["values"], given.pop("ranks_here")[rank])
    end = last_event(lambda: run_confined(kind, given))
    printed.end()
    tell({"type": "end", "rank": rank, "event": end})
    if end["type"] == "failed":
        os._exit(1)  # a normal exit waits for the device, which may wait for a lost rank
    return 0


def _given() -> dict[str, Any]:
    """Reads the lines that group.py sends, up to an empty line."""
    lines = takewhile(bool, (line.rstrip("\r\n") for line in sys.stdin))
    return json.loads("".join(line[1:] for line in lines))
