"""Runs mlx.launch for a job with several ranks (group.py): main(WATCHED, *ARGUMENTS).

mlx.launch does not end the ranks if it is killed, or if the job's process is. So mlx.launch runs in
one process group with its local ranks, and the group ends when the pipe WATCHED is closed, whose
other end the job's process holds.

mlx.launch calls `select` to wait until a rank has output or its stdin can be written. The latter is
always true, so its threads would not wait at all, and each would take a whole core during the run.
We replace `select` by a function that waits only for output.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from select import select

from mlx._distributed_utils import launch

#: Maximum seconds before input for the ranks is passed on.
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
