"""Ranks of a run as processes of this machine, which a ring over the loopback connects."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

#: Runs one configuration after the other. What a test wants otherwise it says in `before`.
WORKER = """
import json, sys, time
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_segtrain import TrainConfig, train
from mlx_segtrain.training import links, ranks, watch
watch.PATIENCE, watch.SETTLE, watch.BEAT = 4.0, 0.4, 0.2
rank = ranks.launched()
{before}
for given in json.loads(sys.argv[1]):
    try:
        result = train(TrainConfig(**given), lambda event: print(json.dumps(event), flush=True))
        print(json.dumps(["ended", result.steps, result.interrupted]), flush=True)
    except Exception as error:
        print(json.dumps(["failed", type(error).__name__, str(error)]), flush=True)
"""


def free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [own.getsockname()[1] for own in sockets]
    for own in sockets:
        own.close()
    return ports


@contextmanager
def ranks_of(n, folder, *configs, before=""):
    """Processes of n ranks, each of which takes these configurations; killed at the end."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(n)]))
    given = json.dumps([json.loads(own.model_dump_json(exclude_unset=True)) for own in configs])
    code = WORKER.replace("{before}", before)
    environment = os.environ | {"MLX_HOSTFILE": str(hosts), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(n):
        own = {"env": environment | {"MLX_RANK": str(rank)}}
        with open(folder / f"out{rank}", "w") as out, open(folder / f"err{rank}", "w") as err:
            command = [sys.executable, "-c", code, given]
            started.append(subprocess.Popen(command, stdout=out, stderr=err, **own))
    try:
        yield started
    finally:
        for own in started:
            own.kill()
            own.wait()


def said(folder, rank):
    """What a rank has printed: events, and how each run ended."""
    lines = (folder / f"out{rank}").read_text().splitlines()
    return [json.loads(line) for line in lines]


def wait_for_step(folder, step, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for event in said(folder, 0)[:-1]:
            if isinstance(event, dict) and event.get("kind") == "train" and event["step"] >= step:
                return
        time.sleep(0.02)
    raise TimeoutError(f"no step {step}: {(folder / 'err0').read_text()}")


def ends(folder, started, but=(), seconds=60):
    """How the last run of each rank ended, and seconds that this took."""
    begin = time.monotonic()
    for rank, own in enumerate(started):
        if rank not in but:
            own.wait(max(0.1, seconds - (time.monotonic() - begin)))
    found = {r: said(folder, r)[-1] for r in range(len(started)) if r not in but}
    return found, time.monotonic() - begin
