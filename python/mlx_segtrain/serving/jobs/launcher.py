"""Runs mlx.launch for a job with several ranks (group.py): main(WATCHED, *ARGUMENTS).

mlx.launch does not end the ranks if it is killed, or if the job's process is. So mlx.launch runs in
one process group with its local ranks, and the group ends when the pipe WATCHED is closed, whose
other end the job's process holds.
"""

import os
import signal
import sys
import threading

from mlx._distributed_utils.launch import main as launch


def main(watched: str, *arguments: str) -> None:
    threading.Thread(target=_end_with, args=(int(watched),), daemon=True).start()
    sys.argv[1:] = arguments
    launch()


def _end_with(watched: int) -> None:
    os.read(watched, 1)
    os.killpg(0, signal.SIGKILL)
