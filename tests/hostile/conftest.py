"""Watches every attack. An attack must not affect other clients, and its memory must be freed."""

import time

import pytest

from lib.attack import Watch, memory_mb, patience
from lib.folders import write_llama
from mlx_segtrain.models import load_tokenizer

#: The additional memory that an attack may take, and the memory that may remain after it, in 10⁶
#: bytes. Some memory remains because a helper process that the server has started stays alive.
MOST_MB, LEFT_MB = 500, 250
#: The seconds within which the memory must be freed, and within which a server under attack must
#: respond. With a processor of its own, a server responds within 1 s, but here attackers and other
#: tests use the processor too.
BACK_S, ANSWER_S = 60, 2


@pytest.fixture(scope="session", autouse=True)
def warm(tmp_path_factory):
    """Loads 200 MB of libraries before the first attack. Otherwise their memory would be attributed
    to this attack."""
    load_tokenizer(write_llama(tmp_path_factory.mktemp("warm") / "model"))


@pytest.fixture(autouse=True)
def watched(request, warm):
    """Watches the /healthz, the page and the memory of a server. Without a server, watches the
    memory of this process."""
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
