"""Starts servers: `mlx-segtrain serve` in a separate process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from lib import forks
from lib.folders import write_llama, write_rows
from mlx_segtrain.serving.jobs.queue import Jobs


class Server:
    """Runs a server while the context is active. `http` is a client, and `cache` contains the
    server's store.

    The server and its jobs are forks, which start sooner than new processes. With `fresh`, they are
    new processes, as on a user's machine.
    """

    def __init__(
        self,
        cwd: Path,
        *args: object,
        cache: Path | None = None,
        port: int = 0,
        fresh: bool = False,
        **env,
    ):
        self.cwd, self.port, self.fresh = cwd, port, fresh
        self.args = [str(arg) for arg in args]
        self.cache = cache or cwd / "cache"
        self.env = {**os.environ, "MLX_SEGTRAIN_CACHE": str(self.cache), **env}
        self.log = cwd / f"server-{time.monotonic_ns()}.log"

    def __enter__(self) -> "Server":
        start = start_fresh if self.fresh else forks.start_server
        with open(self.log, "w") as log:
            how = {"env": self.env, "cwd": self.cwd, "stderr": log.fileno()}
            self.process = start("--port", str(self.port), *self.args, **how)
        line = self.process.stdout.readline()
        assert line.startswith("http://"), self.said
        self.url = line.strip().removesuffix("/finetune")
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx.Client(base_url=self.url, timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)
        self.process.stdout.close()

    @property
    def said(self) -> str:
        """Returns the text that the server has written to standard error."""
        return self.log.read_text()

    @property
    def resident_mb(self) -> float:
        """Returns the resident memory of the server's process, in 10⁶ bytes."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def job(self, id: str) -> dict:
        return self.http.get(f"/api/jobs/{id}").json()["job"]

    def ended(self, id: str, seconds: float = 120) -> dict:
        """Waits until a job has ended, and returns the job."""
        end = time.monotonic() + seconds
        while (job := self.job(id))["status"] in ("queued", "running"):
            assert time.monotonic() < end, job
            time.sleep(0.05)
        return job

    def submit(self, **values: object) -> str:
        """Submits a run, by default with the tiny model and data in the server's folder."""
        paths = {"model_dir": self.cwd / "model", "data_dir": self.cwd / "data"}
        body = {key: str(path) for key, path in paths.items()} | {"max_seq_length": 64} | values
        answer = self.http.post("/api/finetune/submit", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["job_id"]

    def events(self, id: str) -> list[dict]:
        """Waits until a job has ended, and returns all of its events."""
        return [event for _, event in frames(self.http, id)]


def start_fresh(*args: str, **how) -> subprocess.Popen:
    """Runs `mlx-segtrain serve` with these arguments in a new process."""
    command = [sys.executable, "-m", "mlx_segtrain.commands.main", "serve", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **how)


def frames(http: httpx.Client, id: str, last_id: str = "") -> list[tuple[str, dict]]:
    """Returns the ids and contents of all events of a stream."""
    headers = {"last-event-id": last_id} if last_id else {}
    found, own = [], ""
    with http.stream("GET", f"/api/jobs/{id}/stream", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("id: "):
                own = line[4:]
            elif line.startswith("data: {") and own:
                found.append((own, json.loads(line[6:])))
                own = ""
            elif line == "event: end":
                break
    return found


def write_place(path: Path) -> Path:
    """Writes a folder with a tiny model and tiny data."""
    write_llama(path / "model", bits=4)
    write_rows(path / "data")
    write_rows(path / "data", 4, "valid.jsonl")
    return path


def ended(folder, kind, values=None, **environment):
    """Runs a job until it ends, and returns the job and its log."""

    async def run():
        jobs = Jobs(folder)
        jobs.environment.update(environment)
        await jobs.start()
        try:
            row = jobs.submit(kind, values or {})
            row = await asyncio.wait_for(jobs.ended(row.id), 60)
            return row, jobs.log(row.id).read_text()
        finally:
            await jobs.close()

    return asyncio.run(run())
