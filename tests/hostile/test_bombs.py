"""In every format, reading a small file that unpacks to a very large one stays within the limits on
memory and time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bombs
import pytest

#: The maximum memory in bytes and the maximum number of seconds for reading a file. The size of the
#: file is added to the memory limit, because the file may be memory-mapped.
ROOM, LONGEST_S = 448 << 20, 30

#: The files that are read without an error.
READ = ("images", "members_without_end", "a_schema_that_is_stored")

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read from /proc"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Reads each file in a separate process. Returns the memory and time for each file, by name."""
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
