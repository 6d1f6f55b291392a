"""Tests server jobs on several ranks, which mlx.launch starts on this machine."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import psutil
import pytest

from lib.endings import ended
from lib.served import Server, write_place
from mlx_segtrain.errors import InputError
from mlx_segtrain.serving import hosts
from mlx_segtrain.serving.jobs.queue import Jobs
from mlx_segtrain.serving.service import Service
from mlx_segtrain.serving.settings import Settings


def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.05)
    return found


def running(id):
    """Returns the descendants of a process, and those of them that run the module of a rank. The
    module's name is the second-to-last word of the command."""
    found = psutil.Process(id).children(recursive=True)
    return found, [own for own in found if own.cmdline()[-2].rpartition(".")[2] == "rank"]


@pytest.mark.acceptance
def test_a_job_on_two_ranks_is_shown_stopped_resumed_and_survives_a_lost_one(tmp_path):
    place = write_place(tmp_path)
    with Server(place, "--ranks", 2, fresh=True) as server:
        assert server.http.get("/api/state").json()["ranks"] == 2
        refused = {"hostfile": "x", "hosts": ["x"], "backend": "x", "ranks": True}
        for name, value in refused.items():
            body = {"model_dir": str(place / "model"), "data_dir": str(place / "data"), name: value}
            answer = server.http.post("/api/finetune/submit", json=body)
            assert (answer.status_code, answer.json()["field"]) == (422, name)

        how = {"iters": 100_000, "steps_per_report": 5, "steps_per_eval": 100_000}
        id = server.submit(ranks=2, adapter_path=str(place / "out"), **how)
        found = until(lambda: server.job(id)["ranks"])
        busy = [own["busy_s"] for own in found["ranks"]]
        assert len(busy) == 2 and found["slowest"] == busy.index(max(busy))
        assert found["skew_s"] == pytest.approx(max(busy) - min(busy))
        for own in found["ranks"]:
            assert min(own["waited_s"], own["tokens_per_sec"], own["peak_gb"]) > 0
        # mlx.launch's own command ends with the ranks' command, so it is counted as a rank.
        every, of_ranks = running(server.process.pid)
        assert len(of_ranks) == 3
        (launcher,) = [own for own in of_ranks if "--hostfile" in own.cmdline()]
        assert launcher.cpu_percent(0.5) < 25  # by default, mlx.launch occupies a core per rank

        server.http.post(f"/api/jobs/{id}/cancel")
        job = server.ended(id)
        kept = re.fullmatch(r"step (\d+) is saved in .*/out", job["message"])
        assert job["status"] == "cancelled" and kept and ended(every), job
        metrics = [own for own in server.events(id) if own["type"] == "metric"]
        logged = (place / "out" / "metrics.jsonl").read_text().splitlines()
        assert metrics == [own for own in map(json.loads, logged) if own["type"] == "metric"]

        assert server.http.post(f"/api/jobs/{id}/resume").json()["job"]["ranks"] is None
        found = until(lambda: server.job(id)["ranks"])
        assert found["step"] > int(kept[1])
        every, _ = running(server.process.pid)
        pid = re.findall(r"rank 1 is process (\d+)", Path(job["log_path"]).read_text())[-1]
        os.kill(int(pid), signal.SIGKILL)
        job = server.ended(id)
        assert (job["status"], job["fault"]) == ("failed", "run")
        lost = (
            rf"step \d+: rank 1 \(process {pid} on .*\) has ended: the state of step \d+ is saved"
        )
        assert re.match(lost, job["error"]), job
        assert ended(every)


#: Runs a job whose ranks execute FAKE, and prints the job's last event.
RUN = """
import json, sys
from mlx_segtrain import processes
from mlx_segtrain.serving import hosts
from mlx_segtrain.serving.jobs import group
real = processes.command
processes.command = lambda module, *args: (
    [sys.executable, "-c", *sys.argv[1:], "rank", ""] if module.endswith(".rank")
    else real(module, *args)
)
given = {"hosts": hosts.local(2).model_dump(), "values": "é\\n" * 3000 + " " * 3000}
print(json.dumps(group.run("finetune", given)), flush=True)
"""
#: A stand-in for a rank. It prints its input and waits. If its argument is "missing", rank 1 ends
#: without an event, as after a failed SSH login.
FAKE = """
import json, os, sys, time
def tell(**event):
    os.write(1, json.dumps(event).encode() + b"\\n")
rank = int(os.environ["MLX_RANK"])
if sys.argv[1] == "missing" and rank == 1:
    time.sleep(1)  # by then, rank 0 has started
    sys.exit("no such host")
tell(type="rank", rank=rank, pid=os.getpid(), host="here")
text = "".join(own[1:] for own in iter(lambda: sys.stdin.readline().rstrip("\\n"), ""))
tell(type="warning", message=json.loads(text)["values"])
time.sleep(600)
"""


@contextmanager
def fakes(how):
    command = [sys.executable, "-c", RUN, FAKE, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ranks_end_with_the_process_of_their_job():
    with fakes("all") as process:
        events = (json.loads(line) for line in process.stdout if line.startswith("{"))
        assert [next(events)["message"] for _ in range(2)] == ["é\n" * 3000 + " " * 3000] * 2
        every, of_ranks = running(process.pid)
        assert len(of_ranks) == 3
        process.kill()
        assert ended(every)


def test_a_rank_that_does_not_start_is_named():
    with fakes("missing") as process:
        *_, last = process.stdout.read().splitlines()
    event = json.loads(last)
    assert (event["type"], event["fault"]) == ("failed", "killed")
    assert event["error"].startswith("rank 1 did not start (the last output was: no such host);")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.mark.parametrize(
    "most, ranks, more, status, field, words",
    [
        (1, 2, {}, 403, "ranks", "trains with one process: leave ranks out"),
        (4, 5, {}, 422, "ranks", "ranks = 5, but this server allows at most 4 per job"),
        (2, 2, {"method": "grpo", "batch_size": 1}, 422, "batch_size", "there are 2 ranks"),
        (2, 2, {"grad_accumulation_steps": 1}, 422, "grad_accumulation_steps", "there are 2 ranks"),
        (
            *(2, 2, {"parallel": "pipeline", "sample_prompts": ["a"]}, 422, "sample_prompts"),
            "requires the whole model",
        ),
    ],
)
def test_what_ranks_cannot_do_is_said_at_once(
    place, tmp_path, most, ranks, more, status, field, words
):
    service = Service(Settings(store=tmp_path / "store", roots=(place,), ranks=most))
    values = {"model_dir": str(place / "model"), "data_dir": str(place / "data"), **more}
    try:
        with pytest.raises(InputError, match=words) as found:
            service.submit(values, ranks)
        assert (found.value.status, found.value.field) == (status, field)
    finally:
        asyncio.run(service.close())


def test_the_plan_is_that_of_a_rank(place, tmp_path, monkeypatch):
    """Ranks on one host share its memory. In a pipeline, a rank has a part of the layers."""
    service = Service(Settings(store=tmp_path / "store", roots=(place,), ranks=2))
    values = {"model_dir": str(place / "model"), "max_seq_length": 128, "batch_size": 4}

    def plan(ranks, **more):
        return asyncio.run(service.plan({**values, **more}, ranks))

    try:
        alone, shared = plan(1, memory_budget_gb=1), plan(2, memory_budget_gb=1)
        assert alone.plan["budget"] == shared.plan["budget"] == 10**9
        assert shared.message == alone.message.replace(" GB,", " GB per process,")
        # With two micro-batches per step, a rank also keeps the sum of its gradients.
        twice = plan(1, memory_budget_gb=1, grad_accumulation_steps=2)
        assert alone.plan["peak"] < shared.plan["peak"] == twice.plan["peak"]

        monkeypatch.setattr(hosts, "budget_bytes", lambda: 8 * 10**9)
        for given in ({}, {"memory_budget_gb": None}, {"memory_budget_gb": "auto"}):
            assert plan(2, **given).plan["budget"] == 4 * 10**9
        pipeline = {"parallel": "pipeline", "segment_size": 1}
        whole, split = (plan(n, **pipeline, memory_budget_gb=1).plan for n in (1, 2))
        assert [own["rank"] for own in split["pipeline"]] == [0, 1]
        pipeline["memory_budget_gb"] = (whole["peak"] + split["peak"]) / 2 / 1e9
        assert not plan(1, **pipeline).fits and plan(2, **pipeline).fits

        grpo = {"method": "grpo", "prompt_format": "raw", "max_completion_tokens": 32}
        found = plan(2, **grpo, memory_budget_gb=1, batch_size=2).plan
        assert found["rollout_peak"] > 0 and found["rollout_batch"] > 0
        for ranks, more, status in ((3, {}, 422), (2, {**grpo, "batch_size": 1}, 422)):
            with pytest.raises(InputError) as error:
                plan(ranks, **more)
            assert error.value.status == status
    finally:
        asyncio.run(service.close())


def test_a_job_that_waited_for_a_server_with_fewer_ranks_fails(tmp_path):
    async def run():
        jobs = Jobs(tmp_path)
        await jobs.start()
        try:
            return jobs.submit("finetune", {"ranks": 2})
        finally:
            await jobs.close()

    row = asyncio.run(run())
    assert row.status == "failed" and "this server trains with one process" in row.error


HERE = {"ssh": "127.0.0.1", "ips": ["10.0.0.1"], "rdma": [None, "a", "b"]}
THERE = {"ssh": "box2", "ips": ["10.0.0.2"], "rdma": ["a", "b", None]}


def test_the_first_hosts_of_a_file_are_what_mlx_launch_reads(tmp_path):
    from mlx._distributed_utils.common import Hostfile

    file = tmp_path / "hosts.json"
    for given in ([HERE, HERE, THERE], {"hosts": [HERE, HERE, THERE], "backend": "jaccl"}):
        file.write_text(json.dumps(given))
        own = hosts.read(file)
        assert (own.repeats, own.ports) == (2, 3)
        file.write_text(own.first(2).model_dump_json())
        read = Hostfile.from_file(file)
        assert read.to_json()["hosts"] == [{**HERE, "rdma": [None, "a"]}] * 2
        assert read.backend == (given["backend"] if isinstance(given, dict) else "")


@pytest.mark.parametrize(
    "given, words",
    [
        (None, "cannot be read"),
        ("{", "is not valid JSON"),
        ({"hosts": 3}, r"is not a valid mlx.launch hostfile \(hosts: "),
        ([HERE, {"ips": []}], "hosts.1.ssh: "),
        ([HERE, {**THERE, "ssh": "-oProxyCommand=x"}], "hosts.1.ssh: "),
        ([HERE], "fewer than 2 hosts"),
        ({"hosts": [HERE, THERE], "backend": "mpi"}, "choose ring, nccl, jaccl or jaccl-ring"),
        ({"hosts": [HERE, THERE, THERE], "backend": "nccl"}, "lists some hosts more often"),
        ({"hosts": [HERE, THERE, HERE, THERE], "backend": "nccl"}, "or not consecutively"),
        ([THERE, HERE], "the first host must be this machine"),
        ([HERE, {**THERE, "ips": []}], "has a host without ips"),
    ],
)
def test_a_host_file_that_cannot_be_used(tmp_path, given, words):
    file = tmp_path / "hosts.json"
    if given is not None:
        file.write_text(given if isinstance(given, str) else json.dumps(given))
    with pytest.raises(InputError, match=words):
        Settings(hostfile=file).hosts()
    with pytest.raises(InputError, match="leave one of them out"):
        Settings(hostfile=file, ranks=2)


def test_no_gpu_of_others_is_taken(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert len(Settings(ranks=2).hosts().hosts) == 2  # on a CPU
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="unset the variable, or start the server without --ranks"):
        Settings(ranks=2).hosts()


def test_ranks_of_a_host_share_its_memory(monkeypatch):
    own = hosts.Hosts(hosts=[hosts.Host(ssh=name) for name in ("a", "b", "a")])
    assert own.ranks_here == [2, 1, 2]
    monkeypatch.setattr(hosts, "budget_bytes", lambda: 8 * 10**9)
    null, one = {"memory_budget_gb": None}, {"memory_budget_gb": 1}
    for count, given, budget in ((2, {}, 4), (2, null, 4), (1, {}, None), (2, one, 1)):
        hosts.share_memory(given, count)
        assert given.get("memory_budget_gb") == budget
