"""What attacks share: a client that only wants to be served, the memory of a server, and a file
outside of its roots, whose content nobody may see."""

import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

CANARY = "canary-8d1f4c-must-not-be-seen"


def patience():
    """Seconds that are one on a machine which does nothing else."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Bystander:
    """Asks for /healthz, and sometimes for a chat, while others attack; how long it waited."""

    def __init__(self, server, chats=True):
        self.server, self.chats = server, chats
        self.health, self.answers, self.failures = [0.0], [0.0], []
        self.rest = self.peak = memory_mb(server)
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._look, daemon=True)]
        if chats:
            self.threads.append(threading.Thread(target=self._chat, daemon=True))

    def _ask(self, times, method, path, **how):
        with httpx.Client(base_url=self.server.url, timeout=60) as http:
            while not self.stop.is_set():
                begun = time.monotonic()
                answer = http.request(method, path, **how)
                times.append(time.monotonic() - begun)
                if answer.status_code != 200:
                    self.failures.append((path, answer.status_code, answer.text[:200]))
                self.peak = max(self.peak, memory_mb(self.server))
                self.stop.wait(0.05)

    def _look(self):
        self._ask(self.health, "GET", "/healthz")

    def _chat(self):
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        self._ask(self.answers, "POST", "/v1/chat/completions", json=body)

    @property
    def grown_mb(self):
        return self.peak - self.rest


@contextmanager
def bystander(server, chats=True):
    own = Bystander(server, chats)
    for thread in own.threads:
        thread.start()
    end = time.monotonic() + 60
    while len(own.health) < 2 or (chats and len(own.answers) < 2):  # both are under way
        assert time.monotonic() < end, own.failures
        time.sleep(0.02)
    yield own
    time.sleep(0.2)
    own.stop.set()
    for thread in own.threads:
        thread.join(60)
    assert not own.failures, own.failures


def memory_mb(server):
    """Resident, of the server's process and its helpers, in 10⁶ bytes; what they share once."""
    total = 0
    for pid in [server.process.pid, *_children(server.process.pid)]:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
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
    """A folder that no server may use, with a secret in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "secret").write_text(CANARY)
    (folder / "train.jsonl").write_text(f'{{"text": "{CANARY}"}}\n' * 4)
    (folder / "default.jinja").write_text(CANARY)
    return folder
