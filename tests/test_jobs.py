"""Tests the job queue: processes, logs, and recovery after a kill."""

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lib import forks
from lib.folders import write_llama, write_rows
from mlx_segtrain.errors import InputError
from mlx_segtrain.serving.jobs import eventlog, queue
from mlx_segtrain.serving.jobs import kinds as job_kinds
from mlx_segtrain.serving.jobs.queue import Conflict, Jobs
from mlx_segtrain.serving.jobs.row import ENDED

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("jobs")
    write_llama(place / "model", bits=4)
    write_rows(place / "data")
    write_rows(place / "data", 4, "valid.jsonl")
    return place


@pytest.fixture
def forked(monkeypatch):
    """Makes the queue start the processes of jobs as forks that have already imported the modules
    for a run."""
    monkeypatch.setattr(queue.processes, "start", forks.start)


def values(place, out, **more):
    paths = {"model_dir": place / "model", "data_dir": place / "data", "adapter_path": out}
    steps = {"iters": 6, "steps_per_report": 1, "max_seq_length": 64}
    return {key: str(path) for key, path in paths.items()} | steps | more


def submit(jobs, place, out, **more):
    return jobs.submit("finetune", values(place, out, **more), out)


def served(folder, use):
    """Starts a queue and returns the result of `use(jobs)`."""

    async def run():
        jobs = Jobs(folder)
        await jobs.start()
        try:
            return await asyncio.wait_for(use(jobs), 120)
        finally:
            await jobs.close()

    return asyncio.run(run())


async def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "the condition was never met"
        await asyncio.sleep(0.02)
    return found


def kinds(events):
    return [event["type"] for event in events]


async def events(jobs, id, after=0):
    """Yields a job's events one by one, as followers of the job read them."""
    async for found in jobs.follow(id, after):
        for event in found:
            yield event


def test_jobs_take_turns_and_tell_all_that_the_run_tells(place, tmp_path):
    async def use(jobs):
        one = submit(jobs, place, tmp_path / "one")
        two = submit(jobs, place, tmp_path / "two")
        assert (one.status, two.status) == ("running", "queued")
        with pytest.raises(Conflict, match="writes to"):
            submit(jobs, place, tmp_path / "two")
        seen = [json.loads(frame) async for _, frame in events(jobs, one.id)]
        one, two = await jobs.ended(one.id), await jobs.ended(two.id)
        return one, two, seen

    one, two, seen = served(tmp_path / "store", use)
    assert (one.status, two.status, one.progress) == ("done", "done", 1.0)
    assert one.ended_at <= two.ended_at and two.started_at >= one.ended_at
    assert kinds(seen)[:2] == ["queued", "started"] and kinds(seen)[-1] == "done"
    lines = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    metrics = [event for event in logged if event["type"] == "metric"]
    assert [event for event in seen if event["type"] == "metric"] == metrics
    assert [event["step"] for event in metrics if event["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert json.loads(one.result_json)["steps"] == 6
    assert (tmp_path / "one" / "adapters.safetensors").is_file()
    assert (tmp_path / "one" / "loss.png").is_file()


def test_a_run_says_where_it_is_between_two_reports(place, tmp_path, monkeypatch, capfd):
    """The page can show the current memory and step even if a long run logs rarely."""
    monkeypatch.setattr(job_kinds, "STEP_S", 0.0)
    # Every call advances this clock by 1 s, so no step is too short to be reported.
    clock = SimpleNamespace(monotonic=itertools.count().__next__)
    monkeypatch.setattr(job_kinds, "time", clock)
    run = values(place, tmp_path / "out", iters=6, steps_per_report=100)
    assert job_kinds.finetune(run)["type"] == "done"
    told = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    reported = [own["step"] for own in told if own.get("kind") == "train"]
    assert reported == [1, 6]
    between = {own["step"]: own for own in told if own["type"] == "step"}
    assert {2, 3, 4, 5} <= {*between}
    assert all(
        0 < own["active_gb"] <= own["peak_gb"] and own["left_s"] >= 0 for own in between.values()
    )
    assert {*between[3]} == {
        *("type", "step", "active_gb", "peak_gb", "left_s", "progress", "message")
    }


def test_followers_get_every_event_once_from_any_place(place, tmp_path, forked):
    async def use(jobs):
        row = submit(jobs, place, tmp_path / "out")

        async def follow_in_pieces():
            """Follows a job like a client that loses its connection after every third event."""
            seen, frames = 0, []
            while True:
                count = 0
                async for seen_now, frame in events(jobs, row.id, seen):
                    frames.append(frame)
                    seen, count = seen_now, count + 1
                    if count == 3:
                        break
                else:
                    return frames

        followers = [asyncio.create_task(follow_in_pieces()) for _ in range(40)]
        seen = await asyncio.gather(*followers)
        late = [frame async for _, frame in events(jobs, row.id)]
        return seen, late

    seen, late = served(tmp_path / "store", use)
    assert len(late) > 15
    assert all(frames == late for frames in seen)


def test_a_log_holds_whatever_a_process_prints(tmp_path):
    log = tmp_path / "log"
    lines = [
        *(b'{"type": "stage", "progress": 0.5}', b"plain text \xff", b"[1, 2]", b"{}", b""),
        *(b'{"type": 3}', b"x" * 400_000, b'{"type": "done"}'),
    ]
    log.write_bytes(b"\n".join(lines) + b"\nhalf a li")
    running, place = [], 0
    while True:
        found, place = eventlog.read(log, place, ended=False)
        if not found:
            break
        running += found
    assert kinds(json.loads(frame) for _, frame in running) == [
        *("stage", "log", "log", "log", "log", "log", "done"),
    ]
    assert json.loads(running[1][1])["line"] == "plain text \ufffd"
    assert len(running[5][1]) < 70_000
    assert eventlog.last(log, 0) == {"type": "done"}
    (rest,), end = eventlog.read(log, place, ended=True)
    assert json.loads(rest[1]) == {"type": "log", "line": "half a li"} and end == rest[0]
    eventlog.append(log, {"type": "failed"})  # starts a new line
    (more,), _ = eventlog.read(log, end, ended=True)
    assert json.loads(more[1]) == {"type": "failed"}
    # Reading from any position, even within a line, returns the same subsequent events.
    whole = eventlog.events(log)
    for i, (place, _) in enumerate(running[:-1]):
        assert eventlog.events(log, place) == whole[i + 1 :]
        assert eventlog.events(log, place - 2) == whole[i + 1 :]
    assert eventlog.events(log, 10**9) == whole


def test_cancelled_and_resumed_a_run_is_what_it_would_have_been(place, tmp_path, forked):
    async def use(jobs):
        whole = submit(jobs, place, tmp_path / "whole", iters=40)
        row = submit(jobs, place, tmp_path / "out", iters=40)
        waits = submit(jobs, place, tmp_path / "waits")
        assert jobs.cancel(waits.id).status == "cancelled"
        with pytest.raises(Conflict, match="cannot be cancelled"):
            jobs.cancel(waits.id)
        with pytest.raises(Conflict, match="cancel it first"):
            jobs.remove(row.id)
        await jobs.ended(whole.id)
        await until(lambda: '"step": 3' in jobs.log(row.id).read_text())
        jobs.cancel(row.id)
        stopped = await jobs.ended(row.id)
        assert (stopped.status, stopped.error) == ("cancelled", None)
        assert stopped.progress < 1
        assert (tmp_path / "out" / "adapters.safetensors").is_file()
        resumed = jobs.resume(row.id)
        assert resumed.status == "running" and resumed.place > stopped.place
        done = await jobs.ended(row.id)
        assert json.loads(done.result_json)["resumed_from"] >= 3
        events = eventlog.events(jobs.log(row.id))
        assert kinds(events).count("started") == 2
        assert "cancelled" in kinds(events) and events[-1]["type"] == "done"
        jobs.remove(row.id)
        with pytest.raises(InputError, match="job not found"):
            jobs.get(row.id)
        assert not jobs.log(row.id).exists()
        return done

    assert served(tmp_path / "store", use).status == "done"
    ours, whole = (tmp_path / name / "adapters.safetensors" for name in ("out", "whole"))
    assert ours.read_bytes() == whole.read_bytes()


def test_what_fails_says_why_in_a_sentence(place, tmp_path, forked):
    async def use(jobs):
        bad = submit(jobs, place, tmp_path / "bad", target_modules=["nothing"])
        killed = submit(jobs, place, tmp_path / "killed", iters=4000)
        merged = jobs.submit("merge", {"adapters": ["/nowhere"], "scales": None}, tmp_path / "m")
        await jobs.ended(bad.id)
        await until(lambda: '"step": 2' in jobs.log(killed.id).read_text())
        os.kill(jobs.live[killed.id].pid, signal.SIGKILL)
        return [await jobs.ended(row.id) for row in (bad, killed, merged)], jobs.log(killed.id)

    (bad, killed, merged), log = served(tmp_path / "store", use)
    assert {row.status for row in (bad, killed, merged)} == {"failed"}
    assert "nothing" in bad.error and "Traceback" not in bad.error
    assert "SIGKILL" in killed.error and "resume" in killed.error
    assert "/nowhere is not a folder" in merged.error
    assert eventlog.events(log)[-1]["error"] == killed.error


def test_resumed_before_it_began_a_job_is_its_own(place, tmp_path, forked):
    """A job that overwrites a run is cancelled in the queue and then resumed. It must still replace
    the run instead of continuing it."""

    async def use(jobs):
        one = submit(jobs, place, tmp_path / "out", iters=3, seed=1)
        await jobs.ended(one.id)
        before = (tmp_path / "out" / "adapters.safetensors").read_bytes()
        busy = submit(jobs, place, tmp_path / "busy", iters=100_000)
        two = submit(jobs, place, tmp_path / "out", iters=3, seed=2, overwrite=True)
        jobs.cancel(two.id)
        jobs.cancel(busy.id)
        await jobs.ended(busy.id)
        jobs.resume(two.id)
        row = await jobs.ended(two.id)
        return row, before

    row, before = served(tmp_path / "store", use)
    assert row.status == "done", row.error
    assert json.loads(row.result_json)["resumed_from"] is None
    assert (tmp_path / "out" / "adapters.safetensors").read_bytes() != before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_another_job_replaced_is_not_resumed(place, tmp_path, forked, overwrite):
    async def use(jobs):
        out = tmp_path / "out"
        one = submit(jobs, place, out, iters=100_000, steps_per_save=1, overwrite=overwrite)
        await until(lambda: '"step": 3' in jobs.log(one.id).read_text())
        jobs.cancel(one.id)
        await jobs.ended(one.id)
        two = submit(jobs, place, out, iters=3, overwrite=True)
        assert (await jobs.ended(two.id)).status == "done"
        made = (out / "adapters.safetensors").read_bytes()
        jobs.remove(two.id)  # what is known must not depend on the other job's row
        with pytest.raises(Conflict, match="now contains the run of another job"):
            jobs.resume(one.id)
        assert (out / "adapters.safetensors").read_bytes() == made

    served(tmp_path / "store", use)


def test_a_disk_without_room_is_waited_for(place, tmp_path, monkeypatch, forked):
    """Updates that the job store cannot write are written later, and the next job still runs."""

    async def use(jobs):
        one = submit(jobs, place, tmp_path / "one", iters=30)
        two = submit(jobs, place, tmp_path / "two", iters=2)
        update, faults = jobs.store.update, []

        def full(id, **values):
            if len(faults) < 3:
                faults.append(values)
                raise OSError(28, "No space left on device")
            update(id, **values)

        monkeypatch.setattr(jobs.store, "update", full)
        return await jobs.ended(one.id), await jobs.ended(two.id), faults

    one, two, faults = served(tmp_path / "store", use)
    assert (one.status, two.status, len(faults)) == ("done", "done", 3)


def test_what_a_process_leaves_behind_does_not_hold_its_job(tmp_path):
    """A library may start a process that outlives the job. This process inherits the job's output,
    but not its lock."""
    log = tmp_path / "x.log"
    lock, out = eventlog.claim(log), eventlog.open_end(log)
    script = "import os, subprocess, sys; os.set_inheritable(int(sys.argv[1]), False); "
    script += "subprocess.Popen(['sleep', '20']); print('up', flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdout=out, pass_fds=[lock]
    )
    for file in (lock, out):
        os.close(file)
    process.wait()
    assert log.read_text() == "up\n" and not eventlog.is_written(log)


def test_one_server_has_a_folder(place, tmp_path):
    async def use(jobs):
        with pytest.raises(InputError, match="another server is using the jobs"):
            Jobs(tmp_path / "store")

    served(tmp_path / "store", use)
    served(tmp_path / "store", lambda jobs: asyncio.sleep(0))


SERVER = """
import asyncio, sys
from pathlib import Path
from mlx_segtrain.serving.jobs.queue import Jobs

async def main():
    jobs = Jobs(Path(sys.argv[1]))
    await jobs.start()
    print("up", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_whatever_is_killed_no_job_is_lost_or_run_twice(place, tmp_path):
    """Kills the server at KILLS random moments, about half of the time after killing the running
    jobs' processes."""
    rng, store = random.Random(0), tmp_path / "store"
    iters = {}

    async def fill(jobs):
        for i in range(3):
            iters[submit(jobs, place, tmp_path / f"out{i}", iters=30).id] = 30
        await asyncio.sleep(0)

    served(store, fill)  # the first job continues after the queue has been closed
    killed_jobs = 0
    for _ in range(int(os.environ.get("KILLS", "5"))):
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(store)], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout.readline() == "up\n"
        time.sleep(rng.uniform(0, 1.5))
        if rng.random() < 0.5:
            running = [pid for pid in map(int, pids(store, iters))]
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                killed_jobs += 1
            time.sleep(rng.uniform(0, 0.3))
        server.kill()
        server.wait()

    async def finish(jobs):
        while any(jobs.get(id).status != "done" for id in iters):
            for id in iters:
                row = jobs.get(id)
                if row.status in ("failed", "cancelled"):
                    assert "killed" in row.error, row.error
                    jobs.resume(id)
            await asyncio.sleep(0.05)
        return [jobs.get(id) for id in iters]

    rows = served(store, finish)
    assert {row.status for row in rows} == {"done"} and len(rows) == 3
    for row in rows:
        events = eventlog.events(store / "jobs" / f"{row.id}.log")
        steps = [event["step"] for event in events if event.get("kind") == "train"]
        # Each attempt ended before the next one started, so no job ran twice at the same time.
        assert kinds(events).count("done") == 1 and steps[-1] == 30
        attempts, n = [], 0
        for event in events:
            if event["type"] == "started":
                assert n == 0, "an attempt began while another was running"
                attempts, n = [*attempts, []], 1
            elif event["type"] in eventlog.LAST:
                n = 0
            elif event.get("kind") == "train":
                attempts[-1].append(event["step"])
        assert all(own == sorted(set(own)) for own in attempts)
    assert os.environ.get("KILLS") is None or killed_jobs


def pids(store, ids):
    """Yields the process ids of running jobs."""
    for id in ids:
        log = store / "jobs" / f"{id}.log"
        if eventlog.is_written(log):
            begun = [event for event in eventlog.events(log) if event["type"] == "started"]
            if begun:
                yield begun[-1]["pid"]


def test_ended_is_what_the_table_calls_it():
    assert set(ENDED) == set(eventlog.LAST)
