"""Runs fuzz.py with a few inputs."""

import os

from fuzz import fuzz


def test_a_few_inputs(tmp_path):
    fuzz(tmp_path, int(os.environ.get("INPUTS", "300")), int(os.environ.get("SEED", "0")))
