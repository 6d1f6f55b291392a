"""Every attack is watched: what one client does, no other notices, and the memory comes back."""

import time

import pytest

from lib.attack import Watch, memory_mb, patience
from lib.folders import write_llama
from mlx_segtrain.models import load_tokenizer

#: Memory that an attack may take over what was there, in 10⁶ bytes, and what may be left of it: a
#: helper process that it made the server start stays.
MOST_MB, LEFT_MB = 500, 250
#: Seconds in which the memory comes back, and in which a server that is attacked answers: 1 where
#: it has a processor to itself, which the attackers and other tests take here.
BACK_S, ANSWER_S = 60, 2


@pytest.fixture(scope="session", autouse=True)
def warm(tmp_path_factory):
    """Libraries are loaded as they are first used, 200 MB of them, which no attack has taken."""
    load_tokenizer(write_llama(tmp_path_factory.mktemp("warm") / "model"))


@pytest.fixture(autouse=True)
def watched(request, warm):
    """With a server: its /healthz, page and memory. Without one: the memory of this process."""
    server = request.getfixturevalue("server") if "server" in request.fixturenames else None
    with Watch(server) as watch:
        yield
    assert not watch.failures, watch.failures
    assert watch.grown_mb < MOST_MB, watch.grown_mb
    if server:
        assert max(watch.health) < ANSWER_S * patience(), watch.health
        end = time.monotonic() + BACK_S
        while memory_mb(server.process.pid) - watch.rest > LEFT_MB:
            assert time.monotonic() < end, (memory_mb(server.process.pid), watch.rest)
            time.sleep(0.2)
