"""Sets up compilers, MLX's wheels for macOS, and the build folder."""

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "mac"
#: The folder with MLX's unpacked package for macOS.
SITE = BUILD / "site"
BIN = BUILD / "bin"
CORES = os.cpu_count() or 1
#: The deployment target of MLX's wheels and of CMakeLists.txt.
MACOS = "14.0"
#: The Python version of the wheels that are used. The wheels' C++ code is the same for all Python
#: versions.
WHEELS_OF = "3.12"

A, B = TypeVar("A"), TypeVar("B")


class Found(Exception):
    """Raised when a check finds a fault. The message names the fault."""


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Prints the duration of the enclosed step when it is done."""
    began = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)


def run(command: Sequence[str | Path], **rest) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **rest
    )


def environment() -> dict[str, str]:
    """Returns the environment variables for zig and the wrappers. Zig's caches are in the build
    folder."""
    caches = {f"ZIG_{name}_CACHE_DIR": str(BUILD / "zig") for name in ("GLOBAL", "LOCAL")}
    path = os.pathsep.join([str(SITE), str(ROOT / "tests")])
    return {**os.environ, **caches, "MAC_BIN": str(BIN), "PYTHONPATH": path}


def zig(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "ziglang", *arguments]


def at_once(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """Calls the function for each item, on one thread per core, and returns the results."""
    with ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(function, items))


def fetch() -> int:
    """Downloads and unpacks MLX's wheels for macOS. Returns the number of downloaded bytes."""
    version = re.search(r'"mlx==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert version
    wheels, done = BUILD / "wheels", SITE / f"{version[1]}.done"
    if done.exists():
        return 0
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.rmtree(wheels, ignore_errors=True)
    packages = [f"{name}=={version[1]}" for name in ("mlx", "mlx-metal")]
    only = ["--no-deps", "--only-binary", ":all:", "--python-version", WHEELS_OF]
    only += ["--platform", f"macosx_{MACOS.replace('.', '_')}_arm64"]
    command = [sys.executable, "-m", "pip", "download", "-q", *only, "-d", wheels, *packages]
    if (got := run(command)).returncode:
        raise Found(f"MLX's wheels for macOS cannot be downloaded\n{got.stderr}")
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as file:
            file.extractall(SITE)
    # CMakeLists.txt imports MLX to find its folder. The import would load mlx.core, which is built
    # for macOS, so a stub replaces this module.
    core = SITE / "mlx" / "core" / "__init__.py"
    core.write_text("__version__ = None\n")
    done.touch()
    return sum(wheel.stat().st_size for wheel in wheels.iterdir())


def set_up() -> None:
    """Writes Python's headers for macOS, and wrapper scripts that run zig and have the names of the
    commands that CMake runs."""
    BIN.mkdir(parents=True, exist_ok=True)
    for name, module in (
        ("c++", "mac.compiler"),
        ("ar", "ziglang ar"),
        ("ranlib", "ziglang ranlib"),
    ):
        file = BIN / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    headers = BUILD / "headers"
    if not headers.exists():
        aside = BUILD / "headers.aside"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(sysconfig.get_paths()["include"], aside)
        shutil.copy(HERE / "include" / "pyconfig.h", aside)
        aside.rename(headers)
