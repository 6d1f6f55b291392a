"""Loads the module that computes reference results with torch and PEFT, if both are installed."""

import importlib
import importlib.util
import os

import pytest


def load_peers():
    """Returns lib.hf_peers. Skips the test if torch or PEFT is not installed, unless PEERS=1 is
    set."""
    missing = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("PEERS", "0") in ("", "0"):
        pytest.skip(
            f"{' and '.join(missing)} not installed: `make test PEERS=1` installs them "
            "and runs this test"
        )
    return importlib.import_module("lib.hf_peers")
