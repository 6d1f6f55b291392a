"""Tests an installed wheel: `python tests/smoke.py` shows the help and trains a tiny model on the
CPU."""

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import mlx.core as mx

from lib.folders import write_llama, write_rows

COMMAND = Path(sysconfig.get_path("scripts")) / "mlx-segtrain"


def run(*args: str) -> None:
    subprocess.run([COMMAND, *args], check=True, cwd=folder)


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    mx.set_default_device(mx.Device(mx.cpu))
    write_llama(folder / "MODEL", bits=4)
    write_rows(folder / "data")
    run("--help")
    both = ("--model", "MODEL", "--adapter", "out")
    run("train", *both, "--data", "data", "--iters", "2", "--max-seq-length", "64")
    run("generate", *both, "--prompt", "Count to 3.", "--max-tokens", "4")
print(f"Python {sys.version.split()[0]}: the installed package trains and generates.")
