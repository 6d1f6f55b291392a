"""Fixtures for all tests: tiny models, data, and an environment without the user's settings."""

import gc
import os
import re
import resource
import signal

import mlx.core as mx
import pytest
from hypothesis import settings

from lib.folders import write_llama, write_pairs, write_rows
from lib.hub import serve_hub
from lib.peers import load_peers

# Tests and their child processes must not depend on environment variables that a user or a terminal
# has set, such as those for widths, colours, the Hub and trackers.
OURS = (
    r"COLUMNS|LINES|TERM|COLORTERM|FORCE_COLOR|NO_COLOR|HF_.*|WANDB_.*"
    r"|MLX_SEGTRAIN_(TOKEN|MEM_LOG)"
)
for name in [name for name in os.environ if re.fullmatch(OURS, name)]:
    del os.environ[name]

# A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP. Child processes of
# the tests would inherit ignored signals, but they do not inherit handlers: install a handler.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def fsync(file):
    """Replaces `os.fsync`. Like the original, it raises OSError for a closed file, but it does not
    wait for the disk.

    Waiting would take half of the time of a tiny run, and would matter only in a real power
    failure.
    """
    os.fstat(file if isinstance(file, int) else file.fileno())


os.fsync = fsync

# By default, tests run on the CPU; DEVICE=gpu runs the same tests on a GPU. TF32 is disabled on a
# GPU, because it is not accurate enough for the error bounds of the tests.
if os.environ.get("DEVICE") == "gpu":
    os.environ["MLX_ENABLE_TF32"] = "0"
mx.set_default_device(mx.Device(getattr(mx, os.environ.get("DEVICE", "cpu"))))

# Hypothesis examples have no deadline, because their duration depends on the load of the machine.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

#: The maximum address space, in bytes, of the tests that attack a server and of their servers.
MOST_OF_ATTACKS = 24 << 30


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Adds the mark `acceptance` to tests that attack a server or compare results with torch. Other
    acceptance tests are marked in their files.

    Files with acceptance tests run first, because a slow file at the end would leave the other test
    processes idle.
    """
    for item in items:
        if "hostile" in item.path.parts or "hf" in getattr(item, "fixturenames", ()):
            item.add_marker("acceptance")
    slow = {item.path for item in items if item.get_closest_marker("acceptance")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Excludes the imported modules from garbage collections, which saves time in each of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def hf():
    return load_peers()


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def llama4(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "llama4", bits=4)


@pytest.fixture(scope="session")
def llama_mixed(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("models") / "mixed", bits=4, mixed=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_rows(path)
    return write_rows(path, 6, "valid.jsonl", first=24)


@pytest.fixture(scope="module", autouse=True)
def bounded(request):
    """Limits the memory of tests that attack a server, because a successful attack could use any
    amount of memory."""
    if "hostile" not in request.path.parts:
        yield
        return
    from mlx_segtrain.serving.confined.child import set_limit

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    set_limit(resource.RLIMIT_AS, MOST_OF_ATTACKS)
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Frees what the tests of a file leave in reference cycles, such as models."""
    yield
    gc.collect()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Returns a cache folder that only this test uses."""
    monkeypatch.setenv("MLX_SEGTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs")


@pytest.fixture
def hub():
    with serve_hub() as hub:
        yield hub
