"""Helpers for tests that attack a server: ordinary clients, a process's memory use, and a secret
file."""

import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

CANARY = "canary-8d1f4c-must-not-be-seen"


def patience():
    """Returns the factor by which time limits must be extended under the machine's current load."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Watch:
    """Requests /healthz, the page and chat completions while other clients attack the server.

    Without a server, it only measures the memory of this process. `health` and `answers` are the
    durations of the health checks and chat completions, in seconds. `rest` is the memory before the
    attack and `peak` the maximum, in 10⁶ bytes.
    """

    def __init__(self, server=None, chats=False):
        self.server, self.pid = server, server.process.pid if server else os.getpid()
        self.health, self.answers, self.failures = [0.0], [0.0], []
        self.rest = self.peak = memory_mb(self.pid)
        self.stop = threading.Event()
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        works = [(self._measure,)]
        if server:
            works.append((self._ask, self.health, 0.05, "GET", "/healthz"))
            works.append((self._ask, [], 1.0, "GET", "/finetune"))
        if chats:
            works.append((self._ask, self.answers, 0.05, "POST", "/v1/chat/completions", chat))
        self.threads = [threading.Thread(target=f, args=a, daemon=True) for f, *a in works]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(60)

    @property
    def grown_mb(self):
        return self.peak - self.rest

    def _measure(self):
        while not self.stop.wait(0.1):
            self.peak = max(self.peak, memory_mb(self.pid))

    def _ask(self, times, pause, method, path, body=None):
        how = {"base_url": self.server.url, "timeout": 60, "headers": self.server.http.headers}
        with httpx.Client(**how) as http:
            while not self.stop.is_set():
                begun = time.monotonic()
                answer = http.request(method, path, json=body)
                times.append(time.monotonic() - begun)
                if answer.status_code not in (200, 401):  # the server may require a token
                    self.failures.append((path, answer.status_code, answer.text[:200]))
                self.stop.wait(pause)


@contextmanager
def bystander(server, chats=True):
    """Yields a client that has received responses from the server before the attack begins."""
    with Watch(server, chats) as own:
        end = time.monotonic() + 60
        while len(own.health) < 2 or (chats and len(own.answers) < 2):  # both threads have started
            assert time.monotonic() < end, own.failures
            time.sleep(0.02)
        yield own
        time.sleep(0.2)
    assert not own.failures, own.failures


def memory_mb(pid):
    """Returns the resident memory of a process and its children in 10⁶ bytes, counting shared pages
    once."""
    total = 0
    for own in [pid, *_children(pid)]:
        try:
            lines = Path(f"/proc/{own}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1e3


def _children(pid):
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_children(int(child))]
    except OSError:
        pass
    return found


def write_canary(folder):
    """Creates a folder with a secret, which no server may read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "secret").write_text(CANARY)
    (folder / "train.jsonl").write_text(f'{{"text": "{CANARY}"}}\n' * 4)
    (folder / "default.jinja").write_text(CANARY)
    return folder
