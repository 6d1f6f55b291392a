"""Tests the HTTP API on a server that is started as a user would start it."""

import json
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from lib.kinds import of_each_kind
from lib.served import Server, frames, write_place
from mlx_segtrain.config import TrainConfig
from mlx_segtrain.serving.app import allow_open_files

pytestmark = pytest.mark.acceptance


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("server"))
    with Server(place, place / "model") as server:
        yield server


@pytest.fixture(scope="module")
def run(server):
    """Returns the job of a finished run."""
    return server.ended(server.submit(iters=4, steps_per_report=1, scale=20, learning_rate=0.01))


def test_the_curl_lines_of_users(server, tmp_path):
    """Request bodies may contain comments and line breaks, as in the documentation."""
    body = """{
      "model_dir": "/path/to/snapshot",
      "data_dir": "/path/to/dataset",      // dir with train.jsonl (+ optional valid.jsonl)
      "adapter_path": "/path/to/output-adapter",
      "method": "sft", "rank": 16, "iters": 300, "learning_rate": 2e-4, "max_seq_length": 2048
    }"""
    for theirs, ours in (
        ("/path/to/snapshot", server.cwd / "model"),
        ("/path/to/dataset", server.cwd / "data"),
        ("/path/to/output-adapter", server.cwd / "curled"),
        *(("300", 3), ("2048", 128)),  # the tiny model's context length is 128
    ):
        body = body.replace(theirs, str(ours))

    def curl(path, *args):
        command = ["curl", "-s", f"{server.url}{path}", *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    as_json = ("-X", "POST", "-H", "content-type: application/json", "-d")
    answer = json.loads(curl("/api/finetune/submit", *as_json, body))
    assert answer["ok"] is True and re.fullmatch(r"job_[0-9a-f]{16}", answer["jobId"])
    assert answer["job_id"] == answer["jobId"]
    assert answer["adapter_path"] == str(server.cwd / "curled")
    stream = curl(f"/api/jobs/{answer['jobId']}/stream", "-N")
    assert stream.startswith("retry: 1500\n\n") and stream.endswith("event: end\ndata: {}\n\n")
    events = [json.loads(x) for x in re.findall(r"^data: (\{.+\})$", stream, re.M)]
    assert events[-1]["type"] == "done"
    assert events[-1]["output_dir"] == str(server.cwd / "curled")
    path = json.dumps({"path": str(server.cwd / "data")})
    probe = json.loads(curl("/api/finetune/inspect-dataset", *as_json, path))
    assert {"ok": True, "n_train": 24, "n_valid": 4, "format": "messages"}.items() <= probe.items()
    adapter = {"model_dir": str(server.cwd / "model"), "adapter_path": str(server.cwd / "curled")}
    fold = json.loads(curl("/api/finetune/merge", *as_json, json.dumps(adapter)))
    done = server.ended(fold["job_id"])
    assert done["status"] == "done" and (Path(fold["output_dir"]) / "config.json").is_file()
    assert 0 <= done["result"]["lost"] <= 1


def test_a_run_leaves_all_that_it_should(server, run):
    assert run["status"] == "done" and run["progress"] == 1 and run["error"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", run["ended_at"])
    assert json.loads(run["config_json"])["scale"] == 20
    assert Path(run["log_path"]).is_file()
    events = server.events(run["id"])
    assert [x["type"] for x in events][:2] == ["queued", "started"]
    train = [x for x in events if x.get("kind") == "train"]
    assert [x["step"] for x in train] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_sec", "progress"} <= set(train[0])
    jobs = server.http.get("/api/jobs", params={"kind": "finetune", "limit": 1}).json()
    assert len(jobs["jobs"]) == 1
    assert server.http.get("/api/jobs", params={"kind": "fold", "limit": 9}).json()["ok"]


def test_merge_export_evaluate(server, run):
    out = run["output_path"]
    body = {"adapter_a": out, "adapter_b": out, "scales": [0.25, 0.75]}
    merged = server.http.post("/api/finetune/merge", json=body).json()
    assert merged["ok"] and merged["stats"] == {
        **{"layersMerged": 21, "layersOnlyInOne": 0, "totalKeysOut": 42},
        **{"sources": [out, out], "scales": [0.25, 0.75]},
    }
    assert (Path(merged["merged_path"]) / "adapters.safetensors").is_file()
    body = {"base_model": str(server.cwd / "model"), "adapter_path": out}
    exported = server.http.post("/api/finetune/export", json=body).json()
    assert (Path(exported["export_path"]) / "adapter_model.safetensors").is_file()
    assert exported["manifest"]["linears"] == 21
    losses = []
    for adapter in ({}, {"adapter_path": out}, {"adapter_path": merged["merged_path"]}):
        common = {key: str(server.cwd / key[:-4]) for key in ("model_dir", "data_dir")}
        common["max_seq_length"] = 64
        answer = server.http.post("/api/finetune/evaluate", json={**common, **adapter}).json()
        losses.append(server.ended(answer["job_id"])["result"]["loss"])
    assert abs(losses[1] - losses[2]) < 1e-4 < abs(losses[0] - losses[1])


def test_what_is_on_disk(server, run):
    models = {row["path"]: row for row in server.http.get("/api/models").json()["models"]}
    model = models[str(server.cwd / "model")]
    assert (model["id"], model["family"], model["bits"]) == ("model", "llama", 4)
    assert model["fast"] and model["parameters"] > 100_000
    (data,) = server.http.get("/api/datasets").json()["datasets"]
    assert data["path"] == str(server.cwd / "data") and data["has_valid"]
    rows = server.http.get("/v1/adapters/available").json()["adapters"]
    mine = next(row for row in rows if row["path"] == run["output_path"])
    assert (mine["scale"], mine["rank"], mine["mounted"]) == (20, 8, False)
    assert server.http.get("/healthz").json()["model"] == "model"


def test_inspect_shows_what_is_trained(server):
    body = {"path": str(server.cwd / "data"), "model_dir": str(server.cwd / "model")}
    found = server.http.post("/api/finetune/inspect-dataset", json={**body, "n_preview": 1}).json()
    (row,) = found["previews"]
    assert "".join(text for text, trained, _ in row["tokens"] if trained) == "1<|im_end|>"
    assert found["tokens"] > found["supervised_tokens"] > 0
    nothing = {"path": str(server.cwd / "model")}
    answer = server.http.post("/api/finetune/inspect-dataset", json=nothing)
    assert answer.status_code == 200
    assert {"ok": False, "format": "unknown", "n_train": 0}.items() <= answer.json().items()
    assert "train.jsonl" in answer.json()["error"]


def test_plan(server):
    body = {"model_dir": str(server.cwd / "model"), "max_seq_length": 128}
    found = server.http.post("/api/finetune/plan", json=body).json()
    assert found["fits"] and found["message"].startswith("fits: ")
    assert found["plan"]["peak"] < found["plan"]["budget"]
    small = server.http.post("/api/finetune/plan", json={**body, "memory_budget_gb": 0.0005})
    assert small.status_code == 200 and small.json()["fits"] is False
    assert "more than the budget" in small.json()["message"]


def test_the_schema_is_the_command_line_s(server):
    rows = server.http.get("/api/finetune/defaults").json()["fields"]
    # These fields execute code.
    refused = {"eval_command", "reward_command", "reward_functions", "environment"}
    assert {row["name"] for row in rows} == set(TrainConfig.model_fields) - refused
    rank = next(row for row in rows if row["name"] == "rank")
    assert (rank["default"], rank["allowed"]) == ("8", "an integer >= 2")
    spec = server.http.get("/openapi.json").json()
    assert "/api/finetune/submit" in spec["paths"] and "/v1/chat/completions" in spec["paths"]
    page = server.http.get("/docs")
    assert page.status_code == 200
    for address in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert address.startswith("/") and server.http.get(address).status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"rank": 1}, 422, ("rank", "an integer >= 2", "1")),
        ({"rank": "many"}, 422, ("rank", "many")),
        ({"rnak": 8}, 422, ("rnak", "Did you mean rank?")),
        ({"method": "magic"}, 422, ("method", "sft, dpo")),
        ({"dpo_beta": 0.5}, 422, ("dpo_beta has no effect",)),
        ({"eval_command": "touch /tmp/x"}, 422, ("eval_command",)),
        ({"reward_command": "touch /tmp/x", "method": "grpo"}, 422, ("reward_command",)),
        ({"reward_functions": ["os:system"], "method": "grpo"}, 422, ("reward_functions",)),
        ({"model_dir": None}, 422, ("model_dir",)),
        ({"model_dir": "/etc"}, 403, ("/etc", "--root")),
        ({"adapter_path": "/root/x"}, 403, ("--root",)),
        ({"data_dir": "nowhere"}, 400, ("does not exist: pass an existing file or folder",)),
    ],
)
def test_bad_runs_are_refused_in_a_sentence(server, change, status, words):
    body = {"model_dir": str(server.cwd / "model"), "data_dir": str(server.cwd / "data")}
    answer = server.http.post("/api/finetune/submit", json={**body, **change})
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert found["ok"] is False and all(word in found["error"] for word in words), found
    if status == 422:
        assert found["field"] == next(iter(change))


def test_other_mistakes(server, run):
    post, url = server.http.post, "/api/finetune/submit"
    json_type = {"content-type": "application/json"}
    answer = post(url, json={})
    assert (answer.status_code, answer.json()["error"]) == (400, "model_dir and data_dir required")
    assert "not valid JSON" in post(url, content=b'{"a": ', headers=json_type).json()["error"]
    assert "JSON object" in post(url, content=b"[]", headers=json_type).json()["error"]
    assert "JSON object" in post(url, content=b"a=b").json()["error"]
    assert post(url, content=b"[" * 100_000, headers=json_type).status_code == 400
    body = {"model_dir": str(server.cwd / "model"), "data_dir": str(server.cwd / "data")}
    again = post(url, json={**body, "adapter_path": run["output_path"]})
    assert again.status_code == 400 and "already contains a run" in again.json()["error"]
    for path in ("/api/jobs/job_0", "/api/nothing", "/v1/nothing"):
        answer = server.http.get(path)
        assert answer.status_code == 404 and "error" in answer.json()
    assert server.http.get("/api/jobs/job_0").json() == {"ok": False, "error": "job not found"}
    assert server.http.put("/api/jobs").status_code == 405
    assert post(f"/api/jobs/{run['id']}/cancel").status_code == 409
    assert post(f"/api/jobs/{run['id']}/resume").status_code == 409
    assert post("/api/finetune/merge", json={"adapter_a": "x"}).status_code == 422
    gone = server.http.get("/api/jobs/job_0/stream").text
    assert '"type": "failed"' in gone and gone.endswith("event: end\ndata: {}\n\n")


def test_fields_that_an_evaluation_does_not_have(server, run):
    body = {"model_dir": str(server.cwd / "model"), "data_dir": str(server.cwd / "data")}
    for name, value in {"iters": 7, "warm_start": run["output_path"], "segment_size": 1}.items():
        answer = server.http.post("/api/finetune/evaluate", json={**body, name: value})
        assert answer.status_code == 422 and answer.json()["field"] == name, answer.text


def test_a_plan_takes_what_a_run_takes(server):
    body = {"model_dir": str(server.cwd / "model"), "max_seq_length": 64}
    for own in ({"adapter_path": None}, {"adapter_path": ""}, {"warm_start": None, "epochs": None}):
        answer = server.http.post("/api/finetune/plan", json=body | own)
        assert answer.json()["ok"] and answer.json()["fits"], answer.text


def test_aliases_in_a_file(server):
    def read(*lines):
        answer = server.http.post("/api/finetune/read", json={"yaml": "\n".join(lines)}).json()
        return answer["values"], [(own["field"], own["message"]) for own in answer["faults"]]

    found = read("method: dpo", "dpo_lr_schedule: linear", "dpo_warmup_iters: 7")
    assert found == ({"method": "dpo", "lr_schedule": "linear", "warmup_iters": 7}, [])
    values, ((field, says),) = read("method: dpo", "dpo_lr_schedule: bad")
    assert values == {"method": "dpo", "lr_schedule": "bad"} and field == "lr_schedule"
    assert "got 'bad'" in says or 'got "bad"' in says or "got bad" in says
    values, ((field, says),) = read("iters: 9", "dpo_warmup_iters: 7")
    assert values == {"iters": 9} and field == "dpo_warmup_iters"
    assert says == "dpo_warmup_iters only applies to method dpo: use warmup_iters"


def test_a_command_leaves_out_lists_without_items(server):
    body = {"model_dir": "model", "report_to": [], "rewards": [], "rank": 4}
    command = server.http.post("/api/finetune/copy", json=body).json()["command"]
    assert "--rank 4" in command and "--report-to" not in command and "--reward" not in command


def test_a_push_has_one_source(server, run):
    body = {"repo_id": "a/b", "job_id": run["id"], "source_path": run["output_path"]}
    for own in (body, {"repo_id": "a/b"}):
        answer = server.http.post("/api/finetune/push", json=own)
        assert answer.status_code == 422 and "set either source_path, or job_id" in answer.text


def test_pages_of_jobs(server):
    """The next page does not depend on whether the jobs of this page still exist or were
    requeued."""
    http = server.http
    body = {"adapter_a": str(server.cwd / "model"), "adapter_b": str(server.cwd / "model")}
    for _ in range(6):
        http.post("/api/finetune/merge", json=body)  # fails, because these are no adapters
    ids = [own["id"] for own in http.get("/api/jobs", params={"limit": 6}).json()["jobs"]]
    page = http.get("/api/jobs", params={"limit": 2}).json()
    assert [own["id"] for own in page["jobs"]] == ids[:2]
    assert http.delete(f"/api/jobs/{ids[0]}").status_code == 200
    assert http.post(f"/api/jobs/{ids[1]}/resume").status_code == 200
    page = http.get(f"/api/jobs?limit=2&before={page['next']}").json()
    assert [own["id"] for own in page["jobs"]] == ids[2:4]
    page = http.get(f"/api/jobs?limit=2&before={page['next']}").json()
    assert [own["id"] for own in page["jobs"]] == ids[4:]
    for before in ("job_0", "-1", str(1 << 63)):
        assert http.get("/api/jobs", params={"before": before}).status_code == 422


@pytest.mark.parametrize("name", ["lr=1e-4,rank=8", "default"])
def test_an_adapter_whose_folder_has_no_valid_name(server, run, tmp_path, name):
    """The server starts, and the adapter gets another id."""
    shutil.copytree(run["output_path"], tmp_path / name)
    with Server(tmp_path, server.cwd / "model", "--adapter", tmp_path / name) as own:
        (mounted,) = own.http.get("/v1/adapters").json()["adapters"]
        assert mounted["id"] == {"default": "adapter-default"}.get(name, "lr=1e-4-rank=8")
        (found,) = own.http.get("/v1/adapters/available").json()["adapters"]
        assert (found["id"], found["mounted"]) == (mounted["id"], True)
        body = {"prompt": "Hi", "max_tokens": 1}
        assert own.http.post("/v1/completions", json=body).json()["adapter"] == mounted["id"]


def test_cancel_and_resume(server):
    id = server.submit(iters=100000, steps_per_report=1)
    with server.http.stream("GET", f"/api/jobs/{id}/stream") as stream:
        for line in stream.iter_lines():
            if '"step": 3,' in line:
                break
    assert server.http.delete(f"/api/jobs/{id}").status_code == 409
    assert server.http.post(f"/api/jobs/{id}/cancel").json()["job"]["status"] == "running"
    row = server.ended(id)
    assert row["status"] == "cancelled" and "is saved" in row["message"]
    assert server.http.post(f"/api/jobs/{id}/resume").json()["job"]["status"] == "running"
    while '"started"' not in Path(row["log_path"]).read_text().partition("cancelled")[2]:
        time.sleep(0.05)
    server.http.post(f"/api/jobs/{id}/cancel")
    assert server.ended(id)["status"] == "cancelled"
    assert server.http.delete(f"/api/jobs/{id}").json() == {"ok": True}
    assert server.http.get(f"/api/jobs/{id}").status_code == 404


def test_followers_lose_nothing_and_the_server_does_not_grow(server, monkeypatch):
    """FOLLOWERS clients follow one job over unreliable connections while 200 other requests are
    made."""
    import os

    n = int(os.environ.get("FOLLOWERS", "60"))
    id = server.submit(iters=60, steps_per_report=1)
    limits = httpx.Limits(max_connections=n + 20, max_keepalive_connections=n + 20)
    before = server.resident_mb
    with httpx.Client(base_url=server.url, timeout=120, limits=limits) as http:

        def follow(i):
            """Follows the job. Every third client sometimes drops its connection."""
            found, last_id = [], ""
            while True:
                headers = {"last-event-id": last_id} if last_id else {}
                with http.stream("GET", f"/api/jobs/{id}/stream", headers=headers) as stream:
                    own, count = "", 0
                    for line in stream.iter_lines():
                        if line.startswith("id: "):
                            own = line[4:]
                        elif line.startswith("data: ") and own:
                            found.append(line[6:])
                            last_id, own, count = own, "", count + 1
                            if i % 3 == 0 and count == 25:
                                break
                        elif line == "event: end":
                            return found

        def other(i):
            path = ("/api/jobs", "/healthz", "/v1/models", f"/api/jobs/{id}", "/api/finetune/x")
            return http.get(path[i % 5]).status_code

        with ThreadPoolExecutor(n + 10) as pool:
            followers = [pool.submit(follow, i) for i in range(n)]
            codes = list(pool.map(other, range(200)))
            during = server.resident_mb
            seen = [follower.result() for follower in followers]
    assert set(codes) == {200, 404}
    whole = [json.dumps(event) for _, event in frames(server.http, id)]
    assert len(whole) > 65 and json.loads(whole[-1])["type"] == "done"
    for found in seen:
        assert [json.loads(x) for x in found] == [json.loads(x) for x in whole]
    grown = server.resident_mb - before
    assert during - before < 40 + 0.2 * n and grown < 30 + 0.1 * n, (before, during, grown)


def test_the_client_of_the_examples(server):
    command = [sys.executable, str(ROOT / "examples" / "client.py"), "--url", server.url]
    command += ["--model", str(server.cwd / "model"), "--data", str(server.cwd / "data")]
    command += ["--iters", "5", "--max-seq-length", "64", "--drop-every", "3"]
    command += ["--max-tokens", "3", "--prompt", "Count to 3."]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line[:9] for line in lines if "train" in line.split()] == [
        f"step {i:4d}" for i in range(1, 6)
    ]
    assert lines[-5].startswith("trained") and lines[-4].endswith("21 linear layers")
    assert [line.split()[0] for line in lines[-3:]] == ["none", "mine", "merged"]
    assert lines[-2].split(maxsplit=1)[1] == lines[-1].split(maxsplit=1)[1]


def test_a_server_that_is_killed_finds_its_jobs_again(tmp_path):
    place = write_place(tmp_path)
    with Server(place) as server:
        id, next_id = server.submit(iters=5000, steps_per_report=1), server.submit(iters=2)
        while "step" not in (server.job(id)["message"] or ""):
            time.sleep(0.05)
        server.process.kill()
        server.process.wait()
    with Server(place) as server:
        assert server.job(next_id)["status"] == "queued"
        assert server.job(id)["status"] == "running"
        server.http.post(f"/api/jobs/{id}/cancel")
        assert server.ended(id)["status"] == "cancelled"
        assert server.ended(next_id)["status"] == "done"
        steps = [x["step"] for x in server.events(id) if x.get("kind") == "train"]
        assert steps == list(range(1, len(steps) + 1)) and 0 < len(steps) < 5000


def test_security_against_a_real_server(tmp_path):
    """Repeats some tests of tests/test_guard.py on a real server."""
    import socket

    place = write_place(tmp_path)
    secret = "correct-horse-battery"
    (place / "sly").mkdir()
    (place / "sly" / "train.jsonl").symlink_to("/etc/passwd")
    with Server(place, place / "model", "--token", secret) as server:
        http = server.http
        good = {"authorization": f"Bearer {secret}"}
        assert http.get("/api/jobs").status_code == 401
        assert http.get("/api/jobs", headers={"authorization": "Bearer no"}).status_code == 401
        assert http.get("/v1/models").status_code == 401
        assert http.get("/openapi.json").status_code == 401
        page = http.get("/finetune", headers={"accept": "text/html"})
        assert (page.status_code, page.headers["location"]) == (303, "/login")
        assert http.post("/login", data={"token": "wrong-token"}).status_code == 401
        entered = http.post("/login", data={"token": secret})
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        assert http.get("/api/jobs").status_code == 200  # authenticates with the cookie
        http.cookies.clear()
        http.headers.update(good)
        assert http.get("/api/jobs", headers={"host": "evil.example"}).status_code == 403
        foreign = {"origin": "https://evil.example"}
        assert http.post("/api/finetune/submit", json={}, headers=foreign).status_code == 403
        for path in (f"{place}/../../etc", "/etc", str(place / "sly"), "../" * 20 + "etc/passwd"):
            answer = http.post("/api/finetune/inspect-dataset", json={"path": path})
            assert answer.status_code == 403 and "root:" not in answer.text
            assert http.post("/v1/adapters", json={"id": "x", "path": path}).status_code == 403
        outside = server.said.count("refused (403) POST '/api/finetune/inspect-dataset'")
        assert outside == 4 == server.said.count("refused (403) POST '/v1/adapters'")
        torn = http.post(
            "/api/finetune/submit", content=b'{"a', headers={"content-type": "application/json"}
        )
        assert torn.status_code == 422 and "refused (422)" in server.said
        odd = http.get("/docs-files/..%2f..%2f..%2fetc/passwd")
        assert odd.status_code == 404
        assert http.get("/docs-files/../../../../etc/passwd").status_code == 404
        # First announce a body of 1 GB in content-length, then send 1 GB without a content-length.
        huge = {"content-length": str(10**9), "content-type": "application/json"}
        answer = _raw(server, good, "POST /api/finetune/submit", huge, b"x" * 1000)
        assert answer.startswith(b"HTTP/1.1 413")

        def gigabyte():
            for _ in range(1000):
                yield b" " * 10**6

        try:
            refused = http.post("/api/finetune/submit", content=gigabyte())
            assert refused.status_code == 413
        except httpx.TransportError:
            pass  # the server closed the connection before the end of the body
        # The next clients are slow, and never finish sending their headers or body.
        slow = socket.create_connection(("127.0.0.1", server.port))
        slow.sendall(b"GET /api/jobs HTTP/1.1\r\nhost: local")
        late = threading.Thread(target=_trickle, args=(slow,), daemon=True)
        late.start()
        begun = time.monotonic()
        body = {"content-length": "50", "content-type": "application/json"}
        answer = _raw(server, good, "POST /api/finetune/submit", body, b"{")
        assert answer.startswith(b"HTTP/1.1 408") and time.monotonic() - begun < 15
        late.join(15)
        assert not late.is_alive()
        missing = {"adapter_path": str(place / "none"), "base_model": str(place / "model")}
        assert http.post("/api/finetune/export", json=missing).status_code == 400
        assert http.get("/api/jobs").status_code == 200
        said = server.said
        for status in ("401", "403", "413", "408", "422"):
            assert f"refused ({status})" in said, said
        assert secret not in said and "Traceback" not in said


def _raw(server, more, request, headers, body):
    import socket

    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as wire:
        lines = [f"{request} HTTP/1.1", "host: localhost"]
        lines += [f"{name}: {value}" for name, value in {**more, **headers}.items()]
        wire.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        return wire.recv(65536)


def _trickle(wire):
    """Sends single bytes with pauses until the server closes the connection."""
    try:
        while True:
            time.sleep(0.5)
            wire.sendall(b"x")
    except OSError:
        wire.close()


def test_serving_without_its_packages_says_what_to_install(tmp_path):
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError(name='fastapi')")
    found = subprocess.run(
        [sys.executable, "-m", "mlx_segtrain.commands.main", "serve"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": shutil.os.environ["PATH"]},
    )
    assert found.returncode == 2 and 'pip install "mlx-segtrain[serve]"' in found.stderr


def test_a_run_gets_a_folder_of_its_own(server, run):
    """A run deletes files in its folder, so the folder must not contain a user's files."""
    body = {"model_dir": str(server.cwd / "model"), "data_dir": str(server.cwd / "data")}
    mine = server.cwd / "mine"
    (mine / "state").mkdir(parents=True)
    (mine / "state" / "notes.txt").write_text("years of work")
    (server.cwd / "model" / "below").mkdir(exist_ok=True)
    for path in (mine, server.cwd, server.cwd / "model", server.cwd / "data", server.cache):
        for how in ({}, {"overwrite": True}, {"resume": "auto"}):
            answer = server.http.post(
                "/api/finetune/submit", json={**body, "adapter_path": str(path), **how}
            )
            assert answer.status_code == 400, (path, how, answer.text)
            assert "choose" in answer.json()["error"]
    for path, status in ((server.cache / "jobs" / "x", 403), (server.cwd / "model" / "below", 400)):
        answer = server.http.post("/api/finetune/submit", json={**body, "adapter_path": str(path)})
        assert answer.status_code == status
    assert (mine / "state" / "notes.txt").read_text() == "years of work"
    folder = {"adapter_path": run["output_path"], "output_dir": str(mine)}
    assert server.http.post("/api/finetune/export", json=folder).status_code == 400


def test_an_answer_does_not_wait_for_the_client_to_acknowledge(server):
    """A response is sent in two writes. On a persistent connection, the second write must not wait
    40 ms for an acknowledgement."""

    def seconds() -> float:
        began = time.perf_counter()
        server.http.get("/healthz").raise_for_status()
        return time.perf_counter() - began

    took = [seconds() for _ in range(40)]
    assert min(took[20:]) < 0.03  # clients acknowledge the first responses immediately


def test_what_a_client_sends_keeps_nobody_waiting(server):
    """The server must handle unterminated strings, a configuration that is too large, and lone
    surrogates without delay and without internal errors."""
    http, as_json = server.http, {"content-type": "application/json"}
    begun = time.monotonic()
    for body in (b'"' + b'\\"' * 500_000, b'{"a": "' + b"//" * 1_000_000, b'"\\' * 300_000):
        answer = http.post("/api/finetune/plan", content=body, headers=as_json)
        assert answer.status_code == 422 and "not valid JSON" in answer.json()["error"]
    assert time.monotonic() - begun < 5
    body = {"model_dir": str(server.cwd / "model"), "data_dir": str(server.cwd / "data")}
    answer = http.post("/api/finetune/submit", json={**body, "sample_prompts": ["x" * 70_000]})
    assert answer.status_code == 422 and "larger than 65536 bytes" in answer.json()["error"]
    for field in ("rank", "method", "adapter_path", "model_dir", "sample_prompts"):
        value = '["\\ud800"]' if field == "sample_prompts" else '"\\ud800"'
        text = json.dumps(body)[:-1] + f', "{field}": {value}}}'
        answer = http.post("/api/finetune/submit", content=text.encode(), headers=as_json)
        assert answer.status_code in (200, 400, 422), (field, answer.text)
    for route, text in (
        (
            "chat/completions",
            '{"max_tokens": 2, "messages": [{"role": "user", "content": "\\ud800"}]}',
        ),
        ("completions", '{"max_tokens": 2, "prompt": "\\ud800"}'),
        ("chat/completions", '{"model": "\\ud800", "messages": [{"role": "user", "content": ""}]}'),
        ("adapters", '{"id": "\\ud800", "path": "\\ud800"}'),
    ):
        answer = http.post(f"/v1/{route}", content=text.encode(), headers=as_json)
        assert answer.status_code in (200, 400, 404), (route, answer.text)
    for token in ("hf_SECRET SECRET", "\\ud800hf_SECRET"):
        text = f'{{"token": "{token}"}}'.encode()
        answer = http.post("/api/settings/hf-token", content=text, headers=as_json)
        assert answer.status_code == 422 and "SECRET" not in answer.text
    assert "SECRET" not in server.said and "Traceback" not in server.said


def test_odd_things_on_disk_do_not_hide_the_others(server):
    odd = server.cwd / "odd"
    for name in ("nowhere", "elsewhere"):
        (odd / name).mkdir(parents=True)
    (odd / "nowhere" / "train.jsonl").symlink_to("/nowhere")
    (odd / "elsewhere" / "train.jsonl").symlink_to("/etc/passwd")
    strange = shutil.os.fsencode(odd) + b"/\xff"
    shutil.os.mkdir(strange)
    with open(strange + b"/train.jsonl", "w") as file:
        file.write("{}")
    answer = server.http.get("/api/datasets")
    assert answer.status_code == 200
    assert [row["path"] for row in answer.json()["datasets"]] == [str(server.cwd / "data")]
    assert server.http.get("/api/models").status_code == 200


def test_a_queued_job_obeys_the_roots_of_the_server_that_runs_it(tmp_path):
    place = write_place(tmp_path)
    with Server(place) as server:
        long, id = server.submit(iters=100_000), server.submit(iters=2)
        server.http.post(f"/api/jobs/{id}/cancel")
        server.http.post(f"/api/jobs/{long}/cancel")
        server.ended(long)
    (tmp_path / "other").mkdir()
    with Server(place, "--root", tmp_path / "other") as server:
        server.http.post(f"/api/jobs/{id}/resume")
        row = server.ended(id)
        assert row["status"] == "failed" and "is not below a directory" in row["error"]


def test_push_to_a_hub(tmp_path, hub):
    place = write_place(tmp_path)
    url = hub.url
    with Server(
        place, HF_ENDPOINT=url, HF_HOME=str(tmp_path / "home"), HF_TOKEN="", fresh=True
    ) as server:
        post = server.http.post
        id = server.submit(iters=2)
        done = server.ended(id)
        answer = post("/api/finetune/push", json={"repo_id": "me/mine", "job_id": id})
        assert answer.status_code == 400 and "/api/settings/hf-token" in answer.json()["error"]
        assert server.http.get("/api/settings/hf-token").json() == {"ok": True, "hasToken": False}
        secret = "hf_" + "s" * 20
        assert post("/api/settings/hf-token", json={"token": secret}).json() == {"ok": True}
        assert server.http.get("/api/settings/hf-token").json()["hasToken"] is True
        assert post("/api/finetune/push", json={"repo_id": "me/mine"}).status_code == 422
        assert post("/api/finetune/push", json={"repo_id": "../x", "job_id": id}).status_code == 422
        pushed = post("/api/finetune/push", json={"repo_id": "me/mine", "job_id": id})
        assert pushed.status_code == 200, pushed.text + server.said
        assert pushed.json()["url"] == f"{url}/me/mine"
        created = hub.told["/api/repos/create"]
        assert created.get("private") is True or created.get("visibility") == "private"
        assert hub.authorization == {f"Bearer {secret}"}
        (Path(done["output_path"]) / "sub").mkdir()
        (Path(done["output_path"]) / "sub" / "x").symlink_to("/etc/passwd")
        again = post("/api/finetune/push", json={"repo_id": "me/mine", "job_id": id})
        assert again.status_code == 403 and "is not below a directory" in again.json()["error"]
        mine = Path(done["output_path"])
        sent = hub.pushed
        assert sent["adapters.safetensors"] == (mine / "adapters.safetensors").read_bytes()
        assert "README.md" in sent and not any(name.startswith("state/") for name in sent)
        texts = [path.read_bytes() for path in server.cache.rglob("*") if path.is_file()]
        assert secret not in server.said and not any(secret.encode() in text for text in texts)


@pytest.mark.parametrize("infinity", [-1, 2**63 - 1])  # the values on Linux and on macOS
@pytest.mark.parametrize(
    ("soft", "hard", "allows", "then"),
    [
        (1024, 4096, 4096, 4096),  # the hard limit is below the desired limit
        (1024, 524288, 524288, 65536),
        (1024, None, 2**62, 65536),
        # On macOS, the hard limit is infinite, but the soft limit is at most kern.maxfilesperproc.
        (256, None, 24576, 24576),
        (256, None, 10240, 10240),
        (256, None, 256, 256),  # raising the limit is not allowed
        (100_000, None, 10240, 100_000),  # the limit is high enough already
        (None, None, 10240, None),
    ],
)
@pytest.mark.parametrize("error", [ValueError, OSError])
def test_as_many_open_files_as_are_allowed(monkeypatch, infinity, soft, hard, allows, then, error):
    limits = [infinity if x is None else x for x in (soft, hard)]

    def setrlimit(which, asked):
        assert which == resource.RLIMIT_NOFILE and asked[1] == limits[1]
        if not 0 <= asked[0] <= allows:
            raise error("not allowed to raise maximum limit")
        limits[0] = asked[0]

    monkeypatch.setattr(resource, "RLIM_INFINITY", infinity)
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    allow_open_files(65536)
    assert limits[0] == (infinity if then is None else then)


def test_lists_have_jobs_of_each_kind(server):
    """A job of an unknown kind must not break the list of all jobs, as it once did."""
    with of_each_kind(server.cache) as jobs:
        listed = {row["id"]: row for row in server.http.get("/api/jobs").json()["jobs"]}
        for id, (kind, title, name) in jobs.items():
            for row in (listed[id], server.job(id)):
                assert (row["kind"], row["title"], row["name"]) == (kind, title, name)


def test_metrics_and_the_log_tell_what_was_answered(server):
    """Each response has the request's id in a header. Unmounting an adapter removes its
    counters."""

    def values():
        answer = server.http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        rows = [line for line in answer.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (row.rsplit(" ", 1) for row in rows)}

    job = server.ended(server.submit(iters=1, scale=20, learning_rate=0.01))
    http = server.http
    assert http.post("/v1/adapters", json={"id": "m", "path": job["output_path"]}).is_success
    before = values()
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "adapter": "m"}
    body["logit_bias"] = {"259": -100}
    answers = [http.post("/v1/chat/completions", json=body) for _ in range(2)]
    refused = http.post("/v1/chat/completions", json=body | {"adapter": "nobody"})
    with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as stream:
        stream.read()
    ids = [own.headers["x-request-id"] for own in (*answers, stream, refused)]
    assert len(set(ids)) == 4 and all(re.fullmatch("req_[0-9a-f]{32}", id) for id in ids)
    usage = answers[0].json()["usage"]
    answered = 'segtrain_requests_total{adapter="m",finish="length"}'
    # A client may see the end of a stream before the server counts the request.
    end = time.monotonic() + 10
    while (after := values())[answered] < 3:
        assert time.monotonic() < end, after
        time.sleep(0.05)
    assert after[answered] == 3
    assert after['segtrain_generated_tokens_total{adapter="m"}'] == 15
    assert after['segtrain_prompt_tokens_total{adapter="m"}'] == 3 * usage["prompt_tokens"]
    assert after['segtrain_time_to_first_token_seconds_count{adapter="m"}'] == 3
    assert after["segtrain_requests_running"] == after["segtrain_requests_waiting"] == 0
    assert after["segtrain_adapters_mounted"] == before["segtrain_adapters_mounted"] > 0
    for id in ids[:3]:
        line = re.search(f"answered {id} m: (.*)", server.said)
        assert line and f"{usage['prompt_tokens']} + 5 tokens" in line[1] and "length" in line[1]
    assert ids[3] not in server.said
    assert http.delete("/v1/adapters/m").is_success
    assert not any('adapter="m"' in name for name in values())
