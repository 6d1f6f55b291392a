"""Determines how much memory a run may use on this machine."""

import os
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import _core
from .costs import CPU, WORKSPACE, Device

#: MARGIN is the fraction of the memory that is reserved for other programs. On a CPU, INTERPRETER
#: bytes are also reserved for the Python interpreter.
MARGIN = 0.05
INTERPRETER = 1 << 29


#: The fraction of the available RAM that offloaded arrays may use. This memory is page-locked, so
#: other programs cannot use it.
OFFLOADED = 0.5


def device(deterministic: bool = False, size: int = 2, offloads: bool = False) -> Device:
    """Returns a description of MLX's default device for memory estimates. `size` is the size of an
    element on a GPU, in bytes. `offloads` allows plans to keep arrays in host memory, which is
    possible only on CUDA."""
    if mx.default_device() == mx.Device(mx.cpu):
        return CPU
    if not mx.cuda.is_available():
        return Device("metal", size, nax=_core.has_neural_accelerators())
    # Each GPU may be used by a process of its own.
    host = int(OFFLOADED * available_ram() / mx.device_count(mx.gpu)) if offloads else 0
    cudnn = "cudnn" in _core.attention_impls()
    return Device("cuda", size, WORKSPACE, cudnn=cudnn, repeatable=deterministic, host=host)


def working_set() -> int | None:
    """Returns the recommended working set size of Metal in bytes, which is also the maximum that a
    process may wire. Returns None on other devices."""
    if mx.default_device() == mx.Device(mx.cpu) or not mx.metal.is_available():
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


def budget_bytes(gb: float | None = None) -> int:
    """Returns the memory budget in bytes. It is `gb` · 10⁹ if `gb` is given; otherwise it is the
    available memory minus a margin. Available memory is the recommended working set on Metal, the
    free memory on CUDA, and on a CPU the available RAM within the limits of the process's control
    groups."""
    if gb is not None:
        return int(min(gb, 1e8) * 1e9)
    if mx.default_device() == mx.Device(mx.cpu):
        return max(0, int(available_ram() * (1 - MARGIN)) - INTERPRETER)
    wired = working_set()
    if wired is not None:
        return int(wired * (1 - MARGIN))
    info: dict[str, Any] = dict(mx.device_info())
    for key in ("free_memory", "memory_size", "total_memory"):
        if key in info:
            return int(int(info[key]) * (1 - MARGIN))
    return int(available_ram() * (1 - MARGIN))


def available_ram(root: Path = Path("/")) -> int:
    """Returns the number of bytes that can be allocated without paging, within the limits of the
    process's control groups."""
    meminfo = root / "proc/meminfo"
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        ram = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([ram, *_group_limits(root)])


def _group_limits(root: Path) -> list[int]:
    """Returns the number of free bytes in each control group of the process and in all parents of
    these groups (cgroups v1 and v2)."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.strip("/")
        for group in [folder, *folder.parents]:
            if not group.is_relative_to(base):
                break
            try:
                most = (group / limit).read_text().strip()
                if most != "max":
                    taken = int((group / used).read_text()) - _file_cache(group)
                    limits.append(max(0, int(most) - taken))
            except (OSError, ValueError):
                continue
    return limits


def _file_cache(group: Path) -> int:
    """Returns the size of a group's file cache in bytes. The kernel frees this cache under memory
    pressure."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
        stat = {name: int(n) for name, n in (line.split() for line in lines)}
    except (OSError, ValueError):
        return 0
    names = ("inactive_file", "active_file")
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in names)
