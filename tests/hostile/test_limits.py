"""Tests limits on request heads, on token guesses, on claimed client addresses, and on the log."""

import json
import logging
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from lib.attack import bystander, memory_mb, patience
from lib.served import Server, write_place
from mlx_segtrain.serving import catalog
from mlx_segtrain.serving.api import brake, pages
from mlx_segtrain.serving.jobs.store import Store

TOKEN = "correct-horse-é-battery"
GOOD = {"authorization": f"Bearer {TOKEN}".encode()}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("limits"))
    with Server(place, place / "model", MLX_SEGTRAIN_TOKEN=TOKEN, fresh=True) as server:
        server.http.headers.update(GOOD)
        assert server.http.get("/api/jobs").status_code == 200
        yield server


def raw(server, *parts, seconds=20):
    """Sends bytes on a new socket, and returns the response."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as wire:
        try:
            for part in parts:
                wire.sendall(part)
        except OSError:
            pass  # the server has closed the connection; the response is read below
        found = b""
        try:
            while part := wire.recv(65536):
                found += part
        except OSError:
            pass
        return found


LINE = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [LINE, b"a: ", *[b"x" * 1_000_000] * 190],
        [LINE, *[b"a: b\r\n" * 100_000] * 100],
        [b"GET /", *[b"x" * 1_000_000] * 50],
        [LINE + b"transfer-encoding: chunked\r\n\r\n0\r\n", *[b"a: b\r\n" * 100_000] * 100],
    ],
    ids=["one header", "many", "an address", "after the body"],
)
def test_a_head_of_190_mb(server, parts):
    with bystander(server, chats=False) as other:
        answer = raw(server, *parts)
    assert not answer or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 200", b"HTTP/1.1 40"))
    assert other.grown_mb < 60 and max(other.health) < patience()


def test_a_head_may_have_what_browsers_send(server):
    answer = raw(server, LINE + b"cookie: " + b"x" * 30_000 + b"\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


def guess(server, path="/api/jobs"):
    """Sends a wrong token, and returns the status and the duration of the request in seconds."""
    begun = time.monotonic()
    if path == "/login":
        answer = httpx.post(f"{server.url}/login", data={"token": "wrong-token"}, timeout=60)
    else:
        answer = httpx.get(
            f"{server.url}{path}", headers={"authorization": "Bearer wrong-token"}, timeout=60
        )
    return answer.status_code, time.monotonic() - begun


@pytest.mark.parametrize("path", ["/login", "/api/jobs"])
def test_guesses_are_slow_and_the_owner_is_not(server, path):
    """2,100 wrong logins on closed connections once blocked the owner for minutes, and wrong bearer
    tokens were not delayed."""
    form = b"token=wrong-token"
    lines = {
        "/login": b"POST /login HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
        b"application/x-www-form-urlencoded\r\ncontent-length: %d\r\n\r\n%s" % (len(form), form),
        "/api/jobs": b"GET /api/jobs HTTP/1.1\r\nhost: localhost\r\n"
        b"authorization: Bearer wrong-token\r\n\r\n",
    }
    for _ in range(600):
        with socket.create_connection(("127.0.0.1", server.port)) as wire:
            wire.sendall(lines[path])
    begun = time.monotonic()
    entered = httpx.post(f"{server.url}/login", data={"token": TOKEN}, timeout=60)
    assert entered.status_code == 303 and time.monotonic() - begun < 3 * patience()
    assert server.http.get("/api/jobs").status_code == 200
    time.sleep(1.5)
    assert guess(server, path)[0] == 401 and guess(server, path)[1] >= 0.9
    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda _: guess(server, path), range(40)))
    assert {status for status, _ in found} == {401, 429}
    assert all(took >= 0.9 for status, took in found if status == 401)


def test_a_token_that_is_not_ascii_is_one_everywhere(server):
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/api/jobs", headers=GOOD).status_code == 200
        assert http.post("/login", data={"token": TOKEN}).status_code == 303
        assert http.get("/api/jobs").status_code == 200  # uses the cookie


def test_nobody_says_to_be_another(server):
    claimed = {"x-forwarded-for": "6.6.6.6" * 2000, "host": "evil.example"}
    assert server.http.get("/healthz", headers=claimed).status_code == 403
    said = server.said
    assert "6.6.6.6" not in said and "from 127.0.0.1" in said


def test_the_log_is_short_whatever_is_sent(server):
    before = len(server.said)
    with httpx.Client(base_url=server.url) as http:
        for i in range(1500):
            http.get("/" + "x" * 5000, headers={"host": f"evil{i}.example"})
    assert len(server.said) - before < 150_000


def test_lines_that_were_left_out_are_counted(monkeypatch, caplog):
    monkeypatch.setattr(brake, "LINES", 2)
    monkeypatch.setattr(brake, "LINES_PER_S", 0)
    bounded = brake.Bounded()
    records = [logging.LogRecord("x", level, "", 0, "m%d", (1,), None) for level in (30, 40, 30)]
    assert [bounded.filter(record) for record in records] == [True, True, False]
    assert bounded.filter(logging.LogRecord("x", logging.INFO, "", 0, "m", (), None))
    bounded.left = 1.0
    assert bounded.filter(records[0]) and "m1 (1 earlier warnings" in records[0].getMessage()


def test_cached_tokens_are_for_those_who_have_the_token(server, tmp_path):
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    for _ in range(2):
        usage = server.http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0


def test_cookies_of_others_cost_nothing(server):
    """A long quoted cookie must not slow down the server. Python's cookie parser would take time
    quadratic in the cookie's length (CVE-2024-7592)."""
    slow = b'a="' + b"\\" * 40_000 + b'"; theme=dark'
    with (
        httpx.Client(base_url=server.url, timeout=60) as http,
        bystander(server, chats=False) as other,
    ):
        for path in ("/api/jobs", "/finetune", "/login"):
            http.get(path, headers={b"cookie": slow})
        http.post("/logout", headers={b"cookie": slow})
    assert max(other.health) < patience()


def test_a_long_path_is_none(server):
    """Very long paths are refused, because resolving a path takes time quadratic in its length."""
    with bystander(server, chats=False) as other:
        for path, field in (
            *(("/api/models/serve", "model_dir"), ("/api/finetune/submit", "model_dir")),
            *(("/v1/adapters", "path"), ("/api/finetune/inspect-dataset", "path")),
        ):
            body = (
                {field: "a/" * 100_000, "id": "a"}
                if path == "/v1/adapters"
                else {field: "a/" * 100_000}
            )
            answer = server.http.post(path, json=body)
            assert answer.status_code in (400, 422) and len(answer.text) < 1000, answer.text
    assert max(other.health) < patience()


def test_a_page_costs_no_memory(server):
    """Each load of the page once leaked 3 MB."""
    assert server.http.get("/finetune").status_code == 200
    rest = memory_mb(server.process.pid)
    for _ in range(120):
        assert server.http.get("/finetune").status_code == 200
    assert memory_mb(server.process.pid) - rest < 250, memory_mb(server.process.pid) - rest


def test_no_text_becomes_html_or_a_program():
    """The page shows text from files, models and clients. The browser must not interpret any of it
    as HTML or code."""
    sinks = r"(inner|outer)HTML|insertAdjacentHTML|srcdoc|document\.write|\b(eval|Function)\("
    index = (pages.FILES / "index.html").read_text()
    assert "require-trusted-types-for 'script'" in index
    for file in (own for own in pages.FILES.rglob("*") if own.is_file()):
        text = file.read_text(encoding="utf-8")
        assert not re.search(sinks, text), file
        assert not re.search(r"<script>|<style| style=| on\w+=\"", text), file
        assert not re.search(r"[\"'`(](https?:)?//(?!www\.w3\.org/)", text), file


# Lists


def test_one_bad_folder_hides_no_other(server):
    config = json.loads((server.cwd / "model" / "config.json").read_text())
    weights = (server.cwd / "model" / "model.safetensors").read_bytes()
    odd = [
        *[{"quantization": {"group_size": 0}}, {"quantization": {"group_size": "x"}}],
        *[{"quantization": []}, {"text_config": []}, {"num_attention_heads": 0, "head_dim": None}],
        *[{"model_type": "gemma3_text", "sliding_window_pattern": 0}, {"model_type": [{}]}],
        *[{"max_position_embeddings": {}}, {"tie_word_embeddings": {}}, {"layer_types": [[]]}],
        *[{"num_kv_shared_layers": -1}, {"max_position_embeddings": 10**400}],
    ]
    for i, change in enumerate(odd):
        folder = server.cwd / "odd" / str(i)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "config.json").write_text(json.dumps({**config, **change}))
    deep = server.cwd / "odd" / "deep"
    deep.mkdir()
    (deep / "tokenizer_config.json").write_text("{}")
    (deep / "config.json").write_text("[" * 100_000)
    answer = server.http.get("/api/models")
    assert answer.status_code == 200, answer.text
    paths = {model["path"] for model in answer.json()["models"]}
    faults = {fault["path"]: fault["error"] for fault in answer.json()["faults"]}
    assert str(server.cwd / "model") in paths and str(deep) in faults
    assert all(len(error) <= 500 and "\n" not in error for error in faults.values())


def test_a_fault_of_any_kind_is_the_folder_s_own(server, monkeypatch):
    plain = catalog.look

    def look(path):
        if path.name != "model":
            raise AssertionError("a bug\nof ours")
        return plain(path)

    monkeypatch.setattr(catalog, "look", look)
    faults = []
    assert [own.id for own in catalog.models([server.cwd], faults)] == ["model"]
    assert {fault.error for fault in faults} == {"AssertionError: a bug of ours"}


def test_lists_of_many_jobs_are_quick_and_have_pages(server):
    jobs = Store(server.cache / "jobs.sqlite")
    config = json.dumps({"sample_prompts": ["x" * 60_000]})
    jobs.connection.execute("BEGIN")
    for _ in range(10_000):
        jobs.add("finetune", config if _ % 10 == 0 else "{}", None)
    jobs.connection.execute("UPDATE jobs SET status = 'failed'")
    jobs.connection.execute("COMMIT")
    jobs.close()
    begun = time.monotonic()
    for path in ("/api/jobs?limit=1000", "/api/jobs?kind=merge", "/healthz", "/api/jobs"):
        assert server.http.get(path).status_code == 200
    assert time.monotonic() - begun < 2 * patience()
    seen, before, pages = [], {}, 0
    while True:
        page = server.http.get("/api/jobs", params={"limit": 1000, **before}).json()
        assert all(row["config_json"] is None for row in page["jobs"])
        seen += [row["id"] for row in page["jobs"]]
        pages += 1
        if page["next"] is None:
            break
        before = {"before": page["next"]}
    assert len(seen) == len(set(seen)) == 10_000 and pages <= 11
    assert server.http.get(f"/api/jobs/{seen[0]}").json()["job"]["config_json"] == "{}"
    assert server.http.get("/api/jobs", params={"before": "job_x"}).status_code == 422
    assert memory_mb(server.process.pid) < 2000
