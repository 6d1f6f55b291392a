"""Waits until processes have ended."""

import time
from collections.abc import Iterable

import psutil


def ended(processes: Iterable[psutil.Process], seconds: float = 10) -> bool:
    """Returns whether all of these processes have ended after at most `seconds`.

    A zombie has ended. After its parent was killed, a process remains a zombie until the system's
    first process waits for it, and in some containers that process never does.
    """
    end = time.monotonic() + seconds
    remaining = list(processes)
    while remaining := [process for process in remaining if _runs(process)]:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
