"""Starts the ranks of a run as processes on this machine, connected in a ring over loopback."""

import json
import os
import socket
import sys
import time
from contextlib import contextmanager

import mlx.core as mx

from lib.forks import processes
from mlx_segtrain import TrainConfig, train
from mlx_segtrain.training import ranks, watch

#: Code that makes each rank write its factors to its own file at the end of a run.
FACTORS = """
import numpy as np
from pathlib import Path
from mlx_segtrain.training import loop
own = loop.Run._result
def result(self, *args):
    path = Path(self.config.adapter_path).parent / f"{self.config.adapter_path.name}-{rank}.npy"
    np.save(path, np.array(self.state.at.vector))
    return own(self, *args)
loop.Run._result = result
"""


def run(rank, folder, given, before, environment):
    """Runs `before`, which is code from the test, and then trains with each configuration in
    turn."""
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv[1:] = [given]
    mx.set_default_device(mx.cpu)
    watch.PATIENCE, watch.SETTLE, watch.BEAT = 4.0, 0.4, 0.2
    exec(before, {**globals(), "rank": ranks.launched()})
    for own in json.loads(sys.argv[1]):
        try:
            result = train(TrainConfig(**own), lambda event: print(json.dumps(event), flush=True))
            print(json.dumps(["ended", result.steps, result.interrupted]), flush=True)
        except Exception as error:
            print(json.dumps(["failed", type(error).__name__, str(error)]), flush=True)


class Rank:
    """A rank's process, with the methods of subprocess.Popen that the tests need."""

    def __init__(self, *args):
        self._process = processes().Process(target=run, args=args)
        self._process.start()
        self.pid = self._process.pid

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self._process.kill()

    def wait(self, seconds=None):
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"process {self.pid} has not ended in time"


def free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [own.getsockname()[1] for own in sockets]
    for own in sockets:
        own.close()
    return ports


@contextmanager
def ranks_of(n, folder, *configs, before=""):
    """Starts n ranks that each run these configurations, and kills the ranks when the context
    ends."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(n)]))
    given = json.dumps([json.loads(own.model_dump_json(exclude_unset=True)) for own in configs])
    started = []
    for rank in range(n):
        for name in ("out", "err"):
            (folder / f"{name}{rank}").write_text("")
        environment = os.environ | {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
        started.append(Rank(rank, folder, given, before, dict(environment)))
    try:
        yield started
    finally:
        for own in started:
            own.kill()
            own.wait()


def said(folder, rank):
    """Returns the lines that a rank printed: events, and how each run ended."""
    lines = (folder / f"out{rank}").read_text().splitlines()
    return [json.loads(line) for line in lines]


def wait_for_step(folder, step, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for event in said(folder, 0)[:-1]:
            if isinstance(event, dict) and event.get("kind") == "train" and event["step"] >= step:
                return
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached: {(folder / 'err0').read_text()}")


def ends(folder, started, but=(), seconds=60):
    """Returns how each rank's last run ended, and the number of seconds until all had ended."""
    begin = time.monotonic()
    for rank, own in enumerate(started):
        if rank not in but:
            own.wait(max(0.1, seconds - (time.monotonic() - begin)))
    found = {r: said(folder, r)[-1] for r in range(len(started)) if r not in but}
    return found, time.monotonic() - begin
