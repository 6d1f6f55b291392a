"""The queue of jobs: starts them, follows their events, and records how they end.

Each job is a process (worker.py) in its own session. It writes its log, and holds the log's lock
while it runs (eventlog.py). Therefore, when a server starts, the logs show what happened to its
jobs: a job whose log is locked is running, a job whose log has a last event has ended, and any
other job was killed. Jobs that need the accelerator run one at a time, in the order of the queue.
"""

import asyncio
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ... import processes
from ...errors import InputError
from ...events import Event, failed, now
from ...files import make_private, private, write_text
from ..hosts import Hosts, local
from . import eventlog
from .row import Figures, Row
from .store import Store
from .store import now as clock

logger = logging.getLogger("mlx_segtrain.serving")

#: Maximum number of running jobs that do not need the accelerator.
OTHERS = 2
#: Maximum number of jobs that are running or waiting.
LONGEST_QUEUE = 200
#: Seconds between two checks of a running job.
POLL_S = 0.1
#: Maximum number of characters of a message or an error in the database.
LONGEST_TEXT = 4000
#: If a job is cancelled again at least this many seconds after the first time, it is killed.
KILLED_AFTER_S = 10.0
#: The states of a cancelled job: its process has not received a signal yet (ASKED), or it has
#: received one (SIGNALLED). A second signal would end the process immediately.
ASKED, SIGNALLED = 1, 2
#: The values of Row.opened: the output folder contains the job's run (OPENED), or another job's run
#: has replaced it (REPLACED).
OPENED, REPLACED = 1, 2


class Conflict(InputError):
    """The request conflicts with the state of a job."""

    status = 409


@dataclass
class Live:
    """A job that is waiting or running. At every change, the event `changed` is set and then
    replaced by a new one."""

    pid: int | None = None
    interrupted: float = 0.0  #: the time of the first signal
    process: subprocess.Popen[bytes] | None = None  #: None if an earlier server started the process
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Jobs:
    """All jobs in a folder. Only one server at a time can use the folder."""

    def __init__(
        self,
        folder: Path,
        check: Callable[[dict[str, Any]], None] = lambda values: None,
        roots: Sequence[Path] = (),
        hosts: Hosts | None = None,
    ):
        """`check` raises InputError for a configuration that must not run. `roots` are folders
        that jobs must not leave by following links. `hosts` are the hosts for a job's ranks."""
        self.check, self.roots, self.folder = check, roots, folder
        self.hosts = hosts or local(1)
        self.logs = folder / "jobs"
        for place in (folder, self.logs):
            make_private(place)
        for path in self.logs.iterdir():  # in an earlier version, other users could read the logs
            path.chmod(0o600)
        self.claim = eventlog.claim(self.logs / "server")
        if self.claim is None:
            raise InputError(
                f"another server is using the jobs in {folder}: stop it, or set "
                "MLX_SEGTRAIN_CACHE to another folder."
            )
        self.store = Store(folder / "jobs.sqlite")
        #: Environment variables for the kinds of jobs that need them. They are never written to a
        #: file.
        self.environment: dict[str, str] = {}
        self.live: dict[str, Live] = {}
        self.changed = asyncio.Event()  #: set whenever a job has started or ended
        #: Returns a job's name, inputs and method, for lists. The results are cached, because rows
        #: for lists lack the configuration from which they are computed.
        self.about = lru_cache(4096)(
            lambda id: ((row := self.get(id)).name, row.inputs, row.method)
        )
        self.monitors: set[asyncio.Task[None]] = set()

    # Called by the server

    async def start(self) -> None:
        """Follows the jobs that an earlier server started, and starts jobs that are waiting."""
        for row in self.store.with_status("queued"):
            self.live[row.id] = Live()
        for row in self.running():
            self.live[row.id] = Live()
            path = self.log(row.id)
            running = eventlog.is_written(path)
            if not running and not eventlog.read(path, row.begins, ended=True)[0]:
                # The previous server was killed before the job's process had written its first
                # event, so the job returns to the queue.
                self.store.update(row.id, status="queued", started_at=None)
            else:
                self._watch(row.id)
        self._run_next()

    async def close(self) -> None:
        """Closes the store. Running jobs continue, and the next server follows them."""
        for task in self.monitors:
            task.cancel()
        await asyncio.gather(*self.monitors, return_exceptions=True)
        self.store.close()
        if self.claim is not None:
            os.close(self.claim)

    @property
    def training(self) -> bool:
        """Whether a job is using the accelerator."""
        return any(row.job_kind.computes for row in self.running())

    # Called for clients

    def submit(self, kind: str, values: dict[str, Any], output: Path | None = None) -> Row:
        """Queues a new job. Raises Conflict if a job that has not ended writes to the same
        folder."""
        self._check_free(output)
        row = self.store.add(kind, json.dumps(values), None if output is None else str(output))
        eventlog.append(self.log(row.id), {"type": "queued", "ts": now()})
        self.live[row.id] = Live()
        self._run_next()
        return self.get(row.id)

    def get(self, id: str) -> Row:
        """Returns a job. Raises InputError if it does not exist."""
        row = self.store.get(id)
        if row is None:
            raise InputError("job not found", status=404)
        return row

    def running(self) -> list[Row]:
        """Returns the running jobs, without their configurations."""
        return self.store.with_status("running")

    def cancel(self, id: str) -> Row:
        """Cancels a job, which may take a while to end. A training run saves the state after its
        last completed step.

        If this method is called again at least two seconds later, the job ends without finishing
        its current step. If it is called again at least KILLED_AFTER_S seconds after the first
        call, the process is killed. Raises Conflict if the job has ended.
        """
        row = self.get(id)
        if row.ended:
            raise Conflict(f"{id} is {row.status}: it cannot be cancelled.")
        if row.status == "queued":
            self._say_end(id, {"type": "cancelled", "ts": now(), "message": "it had not started"})
            self._run_next()
        else:
            self.store.update(id, cancelling=ASKED, message="cancelling")
            self._interrupt(id)
        return self.get(id)

    def resume(self, id: str) -> Row:
        """Requeues a job that failed or was cancelled. A training run resumes from its
        checkpoint."""
        row = self.get(id)
        if row.status not in ("failed", "cancelled"):
            raise Conflict(f"{id} is {row.status}: only failed or cancelled jobs can be resumed.")
        if row.opened == REPLACED:
            raise Conflict(
                f"{row.output_path} now contains the run of another job: start a new run in "
                "another folder."
            )
        self._check_free(None if row.output_path is None else Path(row.output_path))
        values = row.values
        if row.opened == OPENED:  # otherwise, a run in the folder belongs to another job
            values |= {"resume": "auto", "overwrite": False}
        self.store.requeue(id, json.dumps(values))
        eventlog.append(self.log(id), {"type": "queued", "ts": now(), "resumed": True})
        self.live[id] = Live()
        self._run_next()
        return self.get(id)

    def describe(self, id: str, **given: Any) -> Row:
        """Sets a job's label, note or tags. Raises InputError if the job does not exist."""
        self.get(id)
        if "tags" in given:
            given["tags_json"] = json.dumps([*dict.fromkeys(given.pop("tags"))])
        if given:
            self.store.update(id, **given)
        return self.get(id)

    def remove(self, id: str) -> None:
        """Removes a job and its log, but not its outputs. Raises Conflict if the job has not
        ended."""
        row = self.get(id)
        if not row.ended:
            raise Conflict(f"{id} is {row.status}: cancel it first.")
        self.store.remove(id)
        for path in (self.log(id), eventlog.lock_of(self.log(id)), self._config(id)):
            path.unlink(missing_ok=True)

    async def follow(self, id: str, after: int = 0) -> AsyncIterator[list[tuple[int, str]]]:
        """Yields the events after an offset, in lists of (id, JSON) pairs, until the job has
        ended."""
        path = self.log(id)
        while True:
            live = self.live.get(id)
            changed = live.changed if live else None
            while True:
                found, after = eventlog.read(path, after, ended=live is None)
                if not found:
                    break
                yield found
                await asyncio.sleep(0)  # lets other requests run between parts of a long log
            if changed is None:
                return
            await changed.wait()

    async def ended(self, id: str) -> Row:
        """Waits until a job has ended, and returns it."""
        while live := self.live.get(id):
            await live.changed.wait()
        return self.get(id)

    def log(self, id: str) -> Path:
        return self.logs / f"{id}.log"

    def _config(self, id: str) -> Path:
        return self.logs / f"{id}.json"

    # Internal

    def _check_free(self, output: Path | None) -> None:
        """Raises InputError if the queue is full, and Conflict if a job that has not ended writes
        to `output`."""
        if len(self.live) >= LONGEST_QUEUE:
            raise InputError(
                f"{LONGEST_QUEUE} jobs are running or waiting: cancel some, or try again later.",
                status=429,
            )
        rows = (self.store.get(id) for id in self.live)
        if output is not None and any(row and row.output_path == str(output) for row in rows):
            raise Conflict(f"a job that has not ended writes to {output}: choose another folder.")

    def _run_next(self) -> None:
        running = [row.job_kind.computes for row in self.running()]
        busy, others = sum(running), len(running) - sum(running)
        for row in self.store.with_status("queued"):
            computes = row.job_kind.computes
            if computes and not busy:
                busy += self._run(row)
            elif not computes and others < OTHERS:
                others += self._run(row)

    def _run(self, row: Row) -> bool:
        """Starts a job's process, and returns whether it is running."""
        path, values = self.log(row.id), self.get(row.id).values
        try:
            self.check(values)
            given = {"values": values, "roots": [*map(str, self.roots)], "store": str(self.folder)}
            if (count := values.get("ranks", 1)) > 1:
                given["hosts"] = self.hosts.first(count).model_dump()
            write_text(self._config(row.id), json.dumps(given), private)
            with ExitStack() as opened:
                lock = eventlog.claim(path)
                if lock is None:
                    raise OSError(f"{path} is being written by another process")
                opened.callback(os.close, lock)
                log = eventlog.open_end(path)
                opened.callback(os.close, log)
                # The row is updated before the process starts, so that the store lists every
                # process.
                begins = os.fstat(log).st_size
                state = {"status": "running", "started_at": clock(), "message": None}
                self.store.update(row.id, **state, begins=begins)
                process = processes.start(
                    f"{__package__}.worker",
                    *(row.kind, str(self._config(row.id)), str(lock)),
                    files=[lock],
                    env=processes.environment(row.job_kind.variables, self.environment),
                    **{"cwd": self.logs, "stdout": log, "stderr": log},
                )
        except (OSError, InputError) as error:
            self._say_end(row.id, failed(error) | {"error": str(error)})
            return False
        live = self.live[row.id]
        live.process, live.pid = process, process.pid
        logger.info("%s (%s) runs as process %d", row.id, row.kind, process.pid)
        self._watch(row.id)
        self.changed.set()
        return True

    def _watch(self, id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._monitor(id))
        self.monitors.add(task)
        task.add_done_callback(self.monitors.discard)

    async def _monitor(self, id: str) -> None:
        """Follows a job until it ends, and then starts the next one. Retries after an error."""
        after = self.get(id).begins
        while id in self.live:
            try:
                after = await self._look(id, after)
            except Exception:
                logger.exception("monitoring %s failed; trying again", id)
                await asyncio.sleep(1)
        self._run_next()

    async def _look(self, id: str, after: int) -> int:
        """Updates a job's row from the events in its log after an offset, and records the end of
        the job. Returns the new offset."""
        path, live = self.log(id), self.live[id]
        running = eventlog.is_written(path)
        found, end = eventlog.read(path, after, ended=not running)
        if found:
            self._note(id, live, [json.loads(frame) for _, frame in found])
        if found or running:
            await asyncio.sleep(0 if found else POLL_S)
            return end
        code = await asyncio.to_thread(live.process.wait) if live.process else None
        row = self.get(id)
        last = eventlog.last(path, row.begins)
        if last is None:
            self._say_end(id, _killed(row, code))
        else:
            self._end(id, last)
        return end

    def _note(self, id: str, live: Live, events: list[Event]) -> None:
        news: dict[str, Any] = {}
        for event in events:
            if event["type"] == "started" and live.pid is None:
                live.pid = event.get("pid")
            progress = event.get("progress")
            if isinstance(progress, int | float) and 0 <= progress <= 1:  # false for NaN
                news["progress"] = float(progress)
            if event.get("stage") == "train":
                news["opened"] = OPENED
            if "ranks" in event:
                with suppress(ValidationError):  # not our event: a library printed the line
                    news["ranks_json"] = Figures.model_validate(event).model_dump_json()
            if event["type"] in ("stage", "step") or event.get("kind") == "train":
                news["message"] = _text(event.get("message"))
        row = self.get(id)
        if row.cancelling:
            news.pop("message", None)
            if row.cancelling == ASKED:
                self._interrupt(id)
        if "opened" in news and row.opened != OPENED and row.output_path is not None:
            self.store.replace_others(row, REPLACED)
        if news:
            self.store.update(id, **news)
        live.tell()

    def _interrupt(self, id: str) -> None:
        """Sends a signal to a job's process if the job's log is locked, because only then is the
        process id known to be valid."""
        live = self.live[id]
        if live.pid is not None and eventlog.is_written(self.log(id)):
            moment = time.monotonic()
            live.interrupted = live.interrupted or moment
            with suppress(ProcessLookupError):
                if moment - live.interrupted < KILLED_AFTER_S:
                    os.kill(live.pid, signal.SIGTERM)
                else:  # compiled code may ignore SIGTERM; ranks end with this group (launcher.py)
                    os.killpg(live.pid, signal.SIGKILL)
            self.store.update(id, cancelling=SIGNALLED)

    def _say_end(self, id: str, event: Event) -> None:
        """Appends the missing last event to the log of a job that did not start or was killed."""
        eventlog.append(self.log(id), event)
        self._end(id, event)

    def _end(self, id: str, event: Event) -> None:
        news: dict[str, Any] = {key: _text(event.get(key)) for key in ("error", "message")}
        news |= {"fault": _text(event.get("fault")), "fault_field": _text(event.get("field"))}
        if event["type"] == "done":
            news |= {"progress": 1.0, "result_json": json.dumps(event.get("result"))}
            output = _text(event.get("output_dir"))
            news |= {"output_path": output} if output is not None else {}
        self.store.update(id, status=event["type"], ended_at=clock(), cancelling=0, **news)
        logger.info("%s: %s %s", id, event["type"], event.get("error") or "")
        self.live.pop(id).tell()
        self.changed.set()


def _text(value: Any) -> str | None:
    """Returns a text from an event in a form that the database accepts: valid UTF-8 of limited
    length."""
    if not isinstance(value, str):
        return None
    return value.encode("utf-8", "replace").decode()[:LONGEST_TEXT]


def _killed(row: Row, code: int | None) -> Event:
    if row.cancelling:
        message = "its process was killed before it could finish"
        return {"type": "cancelled", "ts": now(), "message": message}
    if code is None:
        how = "its process was killed while no server was running"
    elif code < 0:
        how = f"its process was killed by signal {-code} ({signal.Signals(-code).name})"
    else:
        how = f"its process exited with code {code}"
    advice = "; resume the job to continue from its last checkpoint" if row.job_kind.trains else ""
    return {"type": "failed", "ts": now(), "error": how + advice, "fault": "killed"}
