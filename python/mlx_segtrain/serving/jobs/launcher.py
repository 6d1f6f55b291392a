"""Runs mlx.launch for a job with several ranks (group.py): main(WATCHED, *ARGUMENTS).

The ranks would keep running if mlx.launch or the job's process were killed. Therefore mlx.launch
and its local ranks form a process group, which is killed when the pipe WATCHED to the job's process
is closed.

mlx.launch calls `select` to wait until a rank has output or the rank's stdin is writable. Because a
rank's stdin is always writable, `select` returns immediately, and each thread of mlx.launch would
occupy a core during the run. Therefore we replace `select` with a function that waits only for
output.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from select import select

from mlx._distributed_utils import launch

#: Maximum delay of input for the ranks, in seconds.
INPUT_S = 0.05


def main(watched: str, *arguments: str) -> None:
    threading.Thread(target=_end_with, args=(int(watched),), daemon=True).start()
    launch.select = _select  # pyright: ignore[reportPrivateImportUsage]
    sys.argv[1:] = arguments
    launch.main()


def _select(
    to_read: Sequence[int], to_write: Sequence[int], failed: Sequence[int], seconds: float
) -> tuple[list[int], list[int], list[int]]:
    readable = select(to_read, [], [], min(seconds, INPUT_S))[0]
    return readable, select([], to_write, [], 0)[1], []


def _end_with(watched: int) -> None:
    os.read(watched, 1)
    os.killpg(0, signal.SIGKILL)
