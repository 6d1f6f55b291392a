"""Runs a job on several ranks: the job's process starts them through mlx.launch and forwards their
events.

The processes are this one (worker.py), mlx.launch (launcher.py) and the ranks (rank.py). Rank 0 is
on this machine. A signal to this process is forwarded to rank 0, and all ranks end after the same
step. If this process or mlx.launch ends, so do all ranks.
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ... import events, processes
from ...errors import RunError
from ...files import to_json
from ..hosts import HERE, Hosts
from .kinds import tell

#: mlx.launch's first port, and the maximum number of characters in a line of the configuration. The
#: lines are short because a terminal such as the one that SSH opens limits a line to 4096 bytes
#: (Linux) or 1024 bytes (macOS).
FIRST_PORT, LINE = 32323, 1000
#: The prefix of each line of the configuration. Without it, SSH would interpret a `~` at the start
#: of a line. An empty line ends the configuration.
FIRST = "+"


def run(kind: str, given: dict[str, Any]) -> events.Event:
    """Runs a job of this kind on the hosts in `given`. Returns the job's last event."""
    hosts = Hosts.model_validate(given.pop("hosts"))
    watched, held = os.pipe()
    # mlx.launch leaves its temporary files in this folder, too.
    with tempfile.TemporaryDirectory(prefix="mlx-segtrain-") as folder:
        file = Path(folder) / "hosts.json"
        file.write_text(hosts.model_dump_json(), encoding="utf-8")
        port = str(_free_port(hosts.ports))
        options = ["--hostfile", str(file), "--repeat-hosts", str(hosts.repeats)]
        options += ["--starting-port", port, "--nccl-port", port]
        process = processes.start(
            f"{__package__}.launcher",
            *(str(watched), *options, "--", *processes.command(f"{__package__}.rank", kind)),
            files=[watched],
            env={**os.environ, "TMPDIR": folder},
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        )
        os.close(watched)
        given["ranks_here"] = hosts.ranks_here
        group = Group(process, [own.ssh for own in hosts.hosts], to_json(given, ascii=True))
        signal.signal(signal.SIGTERM, group.stop)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                group.hear(line)
        finally:
            with suppress(ProcessLookupError, PermissionError):  # macOS: only zombies are left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(held)
    return group.end


def _free_port(count: int) -> int:
    """Returns the first port of `count` consecutive ports that are free on this machine."""
    for port in range(FIRST_PORT, (1 << 16) - count, count):
        with ExitStack() as opened, suppress(OSError):
            for own in range(port, port + count):
                opened.enter_context(socket.socket()).bind(("", own))
            return port
    raise RunError(
        f"this machine does not have {count} consecutive free ports: stop programs that listen on "
        "ports."
    )


class Group:
    """The state of a job's ranks, derived from their output."""

    def __init__(self, process: "subprocess.Popen[bytes]", hosts: list[str], given: str):
        self.process, self.hosts, self.given = process, hosts, given
        self.size = len(hosts)
        self.pids: dict[int, int] = {}
        self.ends: dict[int, events.Event] = {}
        self.stopped = False
        self.printed = ""  # the last line that is not an event

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal by forwarding it to rank 0, which ends all ranks after the current step
        (interrupts.py). A second signal ends rank 0, and therefore all other ranks, immediately."""
        self.stopped = True
        self._signal()

    def _signal(self) -> None:
        if 0 in self.pids and 0 not in self.ends:
            with suppress(ProcessLookupError):
                os.kill(self.pids[0], signal.SIGTERM)

    def hear(self, line: bytes) -> None:
        """Handles a line that mlx.launch or a rank has printed."""
        try:
            self._take(json.loads(line))
        except (ValueError, TypeError, KeyError):  # not an event
            text = line.decode("utf-8", "replace").strip()
            if text and "[WARN]" not in text:  # these lines only report that ranks have ended
                self.printed = text
            print(text)

    def _take(self, event: events.Event) -> None:
        kind = event["type"]
        if kind == "rank":
            self._meet(event["rank"], event["pid"], event["host"])
        elif kind == "end":
            self.ends[event["rank"]] = event["event"]
        elif kind == "log":
            print(event["line"])  # the log's limit is per job, not per rank
        else:
            tell(event)

    def _meet(self, rank: int, pid: int, host: str) -> None:
        # Once all ranks have started, ignore further "rank" events: a line that looks like one is
        # text that a rank has printed.
        if len(self.pids) == self.size:
            return
        self.pids[rank] = pid
        print(f"rank {rank} is process {pid} on {host}")
        if rank == 0 and self.stopped:
            self._signal()
        if len(self.pids) == self.size:  # earlier, a terminal could still echo the input
            lines = [self.given[i : i + LINE] for i in range(0, len(self.given), LINE)]
            text = "".join(f"{FIRST}{own}\n" for own in lines) + "\n"
            assert self.process.stdin is not None
            with suppress(OSError):  # mlx.launch has ended
                self.process.stdin.write(text.encode())
                self.process.stdin.flush()

    @property
    def end(self) -> events.Event:
        """The last event of the job, available once all ranks have ended. It is the last event of
        the lowest-numbered rank that sent one. If a rank was lost, each remaining rank reports
        which one."""
        if self.stopped and 0 not in self.ends:
            message = "its processes were killed before they could finish"
            return {"type": "cancelled", "ts": events.now(), "message": message}
        if self.ends:
            return self.ends[min(self.ends)]
        missing = [rank for rank in range(self.size) if rank not in self.pids]
        error = "all ranks were killed"
        if missing:
            host = self.hosts[missing[0]]
            noun = "rank" if len(missing) == 1 else "ranks"
            error = f"{noun} {' and '.join(map(str, missing))} did not start"
            if host != HERE:
                error += f" on {host}: `ssh {host} true` must print nothing"
        if self.printed:
            error += f" (the last output was: {self.printed[:200]})"
        error += "; resume the job when this is fixed"
        return {"type": "failed", "ts": events.now(), "error": error, "fault": "killed"}
