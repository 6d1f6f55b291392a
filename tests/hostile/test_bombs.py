"""Small files of every format that ask for much memory: none is given it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bombs
import pytest

#: Bytes that reading a file may take besides the file, which may be mapped, and seconds.
ROOM, LONGEST_S = 448 << 20, 30

#: Those that are honest, or whose rows are read before they end.
READ = ("images", "members_without_end", "a_schema_that_is_stored")

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells of it"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What reading each of them took, in a process of its own."""
    command = [sys.executable, bombs.__file__, str(tmp_path_factory.mktemp("bombs"))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("name", bombs.BOMBS)
def test_what_a_bomb_takes(name, found):
    own = found[name]
    assert own["grown"] < ROOM + own["size"], own
    assert own["s"] < LONGEST_S, own
    assert bool(own["said"]) == (name not in READ), own
    assert "\n" not in own["said"] and len(own["said"]) < 300
