"""What every test gets: a process without the settings of its user, tiny models and data."""

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

# What a terminal or an account on this machine has set is not what the tests are about, nor their
# children: widths, colours, settings of a hub or a tracker.
OURS = (
    r"COLUMNS|LINES|TERM|COLORTERM|FORCE_COLOR|NO_COLOR|HF_.*|WANDB_.*"
    r"|MLX_SEGTRAIN_(TOKEN|MEM_LOG)"
)
for name in [name for name in os.environ if re.fullmatch(OURS, name)]:
    del os.environ[name]

# A shell ignores Ctrl-C for what it starts in the background, and nohup a closed terminal; what
# tests start would inherit that. A handler is not inherited.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def fsync(file):
    """Refuses what is not open, as the system's does, and waits for no disk.

    No test cuts the power, and half of a tiny run was this wait.
    """
    os.fstat(file if isinstance(file, int) else file.fileno())


os.fsync = fsync


def stay_on_own_processors():
    """Gives each process of the tests, with its children, an equal share of the processors.

    MLX's threads and the caller's take turns, and in tiny runs the kernel moves them between
    processors each time. The kernels of this package still have as many threads as there are
    processors.
    """
    worker, count = (
        os.environ.get("PYTEST_XDIST_WORKER"),
        os.environ.get("PYTEST_XDIST_WORKER_COUNT"),
    )
    if worker is None or count is None or not hasattr(os, "sched_setaffinity"):
        return
    allowed = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("MLX_SEGTRAIN_THREADS", str(len(allowed)))
    if len(allowed) >= int(count):
        os.sched_setaffinity(0, allowed[int(worker.removeprefix("gw")) :: int(count)])


stay_on_own_processors()

# The CPU is what every machine has; DEVICE=gpu runs the same tests there. MLX's products of float32
# would be TF32 on CUDA, which is less exact than what is compared.
if os.environ.get("DEVICE") == "gpu":
    os.environ["MLX_ENABLE_TF32"] = "0"
mx.set_default_device(mx.Device(getattr(mx, os.environ.get("DEVICE", "cpu"))))

# How long an example takes depends on what else the machine does.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

#: Bytes of address space of tests that attack, and of their servers.
MOST_OF_ATTACKS = 24 << 30


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Attacks and comparisons with torch are acceptance tests, as are files that say so.

    Files with acceptance tests run first: whatever is slow and comes last, all other processes
    wait for.
    """
    for item in items:
        if "hostile" in item.path.parts or "hf" in getattr(item, "fixturenames", ()):
            item.add_marker("acceptance")
    slow = {item.path for item in items if item.get_closest_marker("acceptance")}
    items.sort(key=lambda item: item.path not in slow)


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
    """An attack that succeeds takes memory without end: not this machine's."""
    if "hostile" not in request.path.parts:
        yield
        return
    from mlx_segtrain.serving.confined.child import set_limit

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    set_limit(resource.RLIMIT_AS, MOST_OF_ATTACKS)
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder that only this test uses."""
    monkeypatch.setenv("MLX_SEGTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs")


@pytest.fixture
def hub():
    with serve_hub() as hub:
        yield hub
