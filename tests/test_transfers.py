"""Tests uploads and downloads of data sets and adapters, and jobs' labels and tags."""

import io
import os
import socket
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from lib.served import Server, write_place
from mlx_segtrain.commands.main import main
from mlx_segtrain.config import load_config
from mlx_segtrain.errors import InputError, NoMemory, NoRoom, RunError, fault_of
from mlx_segtrain.serving.api import copies, transfers
from mlx_segtrain.serving.jobs import store
from mlx_segtrain.serving.pools import Busy, Transfers

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(write_place(tmp_path_factory.mktemp("transfers"))) as server:
        yield server


@pytest.fixture
def uploads(server):
    return server.cache.resolve() / "uploads"


@pytest.mark.acceptance
def test_a_data_set_comes_is_used_and_goes(server, uploads):
    put, get = server.http.put, server.http.get
    sent = put("/api/datasets/mine/train.jsonl", content=ROWS).json()
    assert sent == {"ok": True, "path": str(uploads / "datasets" / "mine"), "size_bytes": len(ROWS)}
    file = uploads / "datasets" / "mine" / "train.jsonl"
    assert file.read_bytes() == ROWS and file.stat().st_mode & 0o77 == 0
    again = put("/api/datasets/mine/train.jsonl", content=b"other")
    assert again.status_code == 409 and file.read_bytes() == ROWS
    assert put("/api/datasets/mine/valid.csv", content=b"prompt,completion\na,b\n").is_success
    assert sent["path"] in [own["path"] for own in get("/api/datasets").json()["datasets"]]
    found = server.http.post("/api/finetune/inspect-dataset", json={"path": sent["path"]}).json()
    assert (found["ok"], found["n_train"], found["n_valid"]) == (True, 3, 1)
    archive = get("/api/datasets/archive", params={"path": sent["path"]})
    with zipfile.ZipFile(io.BytesIO(archive.content)) as own:
        assert own.testzip() is None
        assert own.namelist() == ["train.jsonl", "valid.csv"] and own.read("train.jsonl") == ROWS
    id = server.submit(data_dir=sent["path"], iters=2000)
    held = server.http.delete("/api/datasets/mine")
    assert held.status_code == 409 and id in held.json()["error"] and file.is_file()
    server.http.post(f"/api/jobs/{id}/cancel")
    server.ended(id)
    assert server.http.delete("/api/datasets/mine").json() == {"ok": True}
    assert not file.parent.exists()
    assert server.http.delete("/api/datasets/mine").status_code == 404


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("path", "content", "status", "words"),
    [
        ("datasets/x/notes.jsonl", ROWS, 422, "called train or valid"),
        ("datasets/x/train.txt", ROWS, 422, "called train or valid"),
        ("datasets/x/train.jsonl", b"", 422, "is empty"),
        ("datasets/.ssh/train.jsonl", ROWS, 422, "name"),
        ("datasets/%2e%2e/train.jsonl", ROWS, 422, "name"),
        ("adapters/x/README.md", b"#", 422, "a file of an adapter must be one of"),
        ("adapters/x/adapters.safetensors", b"no weights", 400, "adapters.safetensors"),
        ("adapters/x/adapter_config.json", b"{", 400, "cannot be read as JSON"),
    ],
)
def test_what_is_sent_must_be_what_it_is_called(server, uploads, path, content, status, words):
    answer = server.http.put(f"/api/{path}", content=content)
    assert answer.status_code == status and words in answer.json()["error"], answer.text
    assert not list(uploads.glob("*/x*")) and not list(uploads.rglob("*.tmp"))


@pytest.mark.acceptance
def test_an_adapter_comes_and_goes(server, uploads):
    made = Path(server.ended(server.submit(iters=2))["output_path"])
    archive = server.http.get("/api/adapters/archive", params={"path": str(made)})
    assert archive.headers["content-disposition"] == f'attachment; filename="{made.name}.zip"'
    with zipfile.ZipFile(io.BytesIO(archive.content)) as own:
        assert not any(
            "/" in name or name.endswith((".jsonl", "run.json")) for name in own.namelist()
        )
        for name in ("adapters.safetensors", "adapter_config.json"):
            assert own.read(name) == (made / name).read_bytes()
            assert server.http.put(f"/api/adapters/mine/{name}", content=own.read(name)).is_success
    found = {x["path"]: x for x in server.http.get("/api/adapters").json()["adapters"]}
    assert found[str(uploads / "adapters" / "mine")]["rank"] == found[str(made)]["rank"]
    assert server.http.delete("/api/adapters/mine").is_success
    for path, status in ((str(server.cwd / "data"), 400), ("/etc", 403)):
        answer = server.http.get("/api/adapters/archive", params={"path": path})
        assert answer.status_code == status, answer.text
        answer = server.http.get("/api/datasets/archive", params={"path": "/etc"})
        assert answer.status_code == 403


@pytest.mark.acceptance
def test_large_files_are_streamed_and_broken_ones_leave_nothing(server, uploads):
    """The file is larger than the memory limit for all request bodies combined."""
    part, n = ROWS * 10_000, 60
    before = server.resident_mb
    sent = server.http.put("/api/datasets/large/train.jsonl", content=(part for _ in range(n)))
    assert sent.json()["size_bytes"] == n * len(part) > 48 << 20, sent.text
    assert server.resident_mb < before + 24
    server.http.delete("/api/datasets/large")
    with socket.create_connection(("127.0.0.1", server.port)) as broken:
        head = "PUT /api/datasets/broken/train.jsonl HTTP/1.1\r\nhost: localhost\r\n"
        broken.sendall(f"{head}content-length: 1000000\r\n\r\n".encode() + ROWS)
        end = time.monotonic() + 10
        while not (uploads / "datasets" / "broken").is_dir():
            assert time.monotonic() < end
            time.sleep(0.02)
    while (uploads / "datasets" / "broken").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    with socket.create_connection(("127.0.0.1", server.port)) as huge:
        head = "PUT /api/datasets/huge/train.jsonl HTTP/1.1\r\nhost: localhost\r\n"
        huge.sendall(f"{head}content-length: {5 << 30}\r\n\r\n".encode())
        huge.settimeout(20)
        assert huge.recv(100).startswith(b"HTTP/1.1 413 ")
    assert not (uploads / "datasets" / "huge").exists()


def test_what_a_server_that_was_killed_left_is_removed(tmp_path):
    for name in ("datasets/a/.train.jsonl.1.tmp", "datasets/b/.x.1.tmp", "datasets/b/train.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(ROWS)
    transfers.clean(tmp_path)
    assert [str(own.relative_to(tmp_path)) for own in tmp_path.glob("*/*/*")] == [
        "datasets/b/train.jsonl"
    ]
    assert not (tmp_path / "datasets" / "a").exists()


def test_so_many_transfers_are_taken_at_once():
    transfers = Transfers(2)
    with transfers.place("a"):
        with pytest.raises(Busy, match="already being sent"), transfers.place("a"):
            pass
        with transfers.place(), pytest.raises(Busy, match="2 transfers"), transfers.place():
            pass
    with transfers.place("a"), transfers.place():
        pass


@pytest.mark.acceptance
def test_jobs_have_a_label_a_note_and_tags(server):
    id = server.submit(iters=1)
    patch = server.http.patch
    said = {"label": " my run ", "note": "why\nnot", "tags": ["long", "b", "long"]}
    job = patch(f"/api/jobs/{id}", json=said).json()["job"]
    assert (job["name"], job["label"], job["note"], job["tags"]) == (
        *("my run", "my run", "why\nnot", ["long", "b"]),
    )
    assert patch(f"/api/jobs/{id}", json={"note": ""}).json()["job"]["tags"] == ["long", "b"]
    (row,) = [x for x in server.http.get("/api/jobs").json()["jobs"] if x["id"] == id]
    assert row["name"] == "my run" and row["note"] == ""
    assert patch(f"/api/jobs/{id}", json={"label": ""}).json()["job"]["name"] == "model on data"
    for wrong in ({"tags": ["a,b"]}, {"tags": ["x"] * 11}, {"label": "x" * 121}, {"name": "x"}):
        assert patch(f"/api/jobs/{id}", json=wrong).status_code == 422
    assert patch("/api/jobs/job_none", json={}).status_code == 404
    server.ended(id)


@pytest.mark.acceptance
def test_a_fault_names_its_field_and_its_kind(server):
    def refused(**values):
        body = {"model_dir": str(server.cwd / "model"), "data_dir": str(server.cwd / "data")}
        return server.http.post("/api/finetune/submit", json=body | values).json()["field"]

    assert refused(model_dir="/nowhere") == "model_dir"
    assert refused(data_dir="/nowhere") == "data_dir"
    assert refused(data_dir=str(server.cwd / "model")) == "data_dir"
    assert refused(rank=1) == "rank"
    job = server.ended(server.submit(memory_budget_gb=0.0001))
    assert (job["status"], job["fault"]) == ("failed", "memory")
    job = server.ended(server.submit(target_modules=["nothing"]))
    assert (job["status"], job["fault"]) == ("failed", "input")


def test_kinds_of_faults():
    faults = [NoRoom("x"), NoMemory("x"), MemoryError(), RuntimeError("CUDA out of memory")]
    assert [fault_of(own) for own in faults] == ["memory"] * 4
    others = [InputError("x"), RunError("x"), ValueError("x")]
    assert [fault_of(own) for own in others] == ["input", "run", "bug"]


def test_a_store_of_an_earlier_version_gets_the_columns_that_it_lacks(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store, "ADDED", {})
        patch.setattr(store, "_ALL", "*")
        earlier = store.Store(tmp_path / "jobs.sqlite")
        earlier.connection.execute(
            "INSERT INTO jobs (id, place, kind, status, config_json, created_at)"
            " VALUES ('job_a', 1, 'export', 'failed', '{}', '')"
        )
        earlier.close()
    own = store.Store(tmp_path / "jobs.sqlite")
    row = own.get("job_a")
    assert row is not None and (row.label, row.note, row.tags, row.fault) == ("", "", [], None)
    own.close()


#: Settings with values of every kind.
VALUES = {
    **{"model_dir": "/m/it's one", "data_dir": "/d", "adapter_path": "a", "iters": 7},
    **{
        "use_dora": True,
        "append_eos": False,
        "packing": True,
        "learning_rate": 1e-3,
        "sample_prompts": ["a b", "c"],
    },
    **{"columns": {"prompt": "query"}, "segment_size": "auto", "target_modules": ["q_proj"]},
}


def test_a_run_as_a_command_a_file_and_a_program_is_the_same_run(tmp_path, monkeypatch):
    config = load_config(None, VALUES)
    file = tmp_path / "run.yaml"
    file.write_text(copies.as_yaml(VALUES))
    assert load_config(file, {}) == config and yaml.safe_load(file.read_text()) == VALUES
    taken = []
    monkeypatch.setattr("mlx_segtrain.train", lambda own: taken.append(own), raising=False)
    exec(copies.as_python(VALUES), {})
    assert taken == [config]
    script = tmp_path / "run.sh"
    script.write_text(copies.command(VALUES))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    seen = tmp_path / "seen"
    fake = tmp_path / "mlx-segtrain"
    fake.write_text(f'#!/bin/sh\nfor x in "$@"; do printf "%s\\0" "$x"; done > {seen}\n')
    fake.chmod(0o755)
    os.system(f"sh {script}")
    words = seen.read_text().split("\0")[:-1]
    monkeypatch.setattr("mlx_segtrain.commands.runs._train", lambda args: taken.append(args) or 0)
    main(words)
    given = {key: value for key, value in vars(taken[1]).items() if key in VALUES}
    assert load_config(None, given) == config
