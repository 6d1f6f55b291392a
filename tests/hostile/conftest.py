"""Checks that no attack affects other clients or leaves memory in use."""

import time

import pytest

from lib.attack import Watch, memory_mb, patience
from lib.folders import write_llama
from mlx_segtrain.models import load_tokenizer

#: The additional memory, in 10⁶ bytes, that may be in use during an attack, and after the attack.
#: Some memory stays in use after an attack, because the server keeps a helper process running.
MOST_MB, LEFT_MB = 500, 250
#: The time limits in seconds for freeing memory after an attack, and for responses of a server
#: under attack. A server that has a processor to itself responds within 1 s, but here attackers and
#: other tests use the processor too.
BACK_S, ANSWER_S = 60, 2


@pytest.fixture(scope="session", autouse=True)
def warm(tmp_path_factory):
    """Loads 200 MB of libraries before the first attack, because their memory would otherwise be
    attributed to that attack."""
    load_tokenizer(write_llama(tmp_path_factory.mktemp("warm") / "model"))


@pytest.fixture(autouse=True)
def watched(request, warm):
    """Monitors /healthz, the page and the memory of the server. If the test uses no server,
    monitors the memory of this process instead."""
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
