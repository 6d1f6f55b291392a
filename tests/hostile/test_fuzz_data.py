"""Runs fuzz_data.py with a few files."""

import os
import subprocess
import sys

import fuzz_data


def test_a_few_broken_files(tmp_path):
    """The fuzzer runs in a separate process, because libraries might crash."""
    done = subprocess.run(
        [sys.executable, fuzz_data.__file__],
        env={"INPUTS": "200", **os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" files, ") == len(fuzz_data.KINDS)
