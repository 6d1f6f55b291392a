"""Watches every attack: it must not affect other clients, and its memory must be freed."""

import time

import pytest

from lib.attack import Watch, memory_mb, patience
from lib.folders import write_llama
from mlx_segtrain.models import load_tokenizer

#: Additional memory that an attack may take, and that may remain after it, in 10⁶ bytes: a helper
#: process that the server started for it stays.
MOST_MB, LEFT_MB = 500, 250
#: Seconds within which the memory is freed, and within which an attacked server answers. On its own
#: processor it takes 1 s, but attackers and other tests use the processor here.
BACK_S, ANSWER_S = 60, 2


@pytest.fixture(scope="session", autouse=True)
def warm(tmp_path_factory):
    """Loads 200 MB of libraries before the first attack, which would otherwise be blamed for
    them."""
    load_tokenizer(write_llama(tmp_path_factory.mktemp("warm") / "model"))


@pytest.fixture(autouse=True)
def watched(request, warm):
    """Watches a server's /healthz, page and memory; without a server, the memory of this
    process."""
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
