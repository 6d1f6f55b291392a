"""Tests a server with models and data sets that are given by their hub names: which names clients
may use, and downloads as jobs."""

import asyncio
import shutil
import time

import httpx
import pytest

from lib.folders import write_llama, write_rows
from lib.served import Server
from mlx_segtrain import hub as hubs
from mlx_segtrain.commands import main as cli
from mlx_segtrain.data.sources import sources_of
from mlx_segtrain.errors import InputError
from mlx_segtrain.serving import app
from mlx_segtrain.serving.app import create
from mlx_segtrain.serving.service import Service
from mlx_segtrain.serving.settings import Settings

pytestmark = pytest.mark.acceptance


@pytest.fixture
def place(tmp_path, hub, monkeypatch, cache):
    """Returns a working folder with data for a server. The hub cache next to it is empty."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.add("org/tiny", write_llama(tmp_path / "made", bits=4))
    shutil.rmtree(tmp_path / "made")
    (tmp_path / "work").mkdir()
    write_rows(write_rows(tmp_path / "work" / "data"), 4, "valid.jsonl")
    return tmp_path / "work"


@pytest.fixture
def posted(place, monkeypatch):
    """Returns a function that sends a POST request to the application that `mlx-segtrain serve`
    creates for the given flags.

    The application runs in this process, which suffices for requests that do not start a job.
    """

    def post(flags, path, body):
        settings = []
        monkeypatch.setattr(app, "run", lambda own, _: settings.append(own))
        assert cli.main(["serve", *map(str, flags)]) == 0
        service = Service(*settings)

        async def asked():
            transport = httpx.ASGITransport(create(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                answer = await http.post(path, json=body)
            await service.close()
            return answer

        return asyncio.run(asked())

    monkeypatch.chdir(place)
    return post


def test_names_of_what_is_there(place, hub, posted):
    path = hubs.model("org/tiny")
    hub.requests.clear()
    with Server(place, fresh=True) as server:
        id = server.submit(model_dir="org/tiny", iters=1, adapter_path="a/b")
        job = server.ended(id)
        assert job["status"] == "done" and job["name"] == "org/tiny on data"
        body = {"model_dir": "org/tiny"}
        asked = server.http.post("/api/finetune/plan", json=body | {"max_seq_length": 64})
        assert asked.json()["fits"], asked.text
        served = server.http.post("/api/models/serve", json=body).json()
        assert (served["id"], served["path"]) == ("org/tiny", str(path))
        found = server.http.get("/api/adapters", params=body).json()["adapters"]
        assert [own["path"] for own in found] == [str(place / "a" / "b")]
        again = server.http.post("/api/models/serve", json={"model_dir": "org/other"})
        assert again.status_code == 400
        assert "org/other is neither a path nor in this machine's Hugging Face cache" in again.text
        refused = server.http.post("/api/hub/download", json={"name": "org/tiny"})
        assert refused.status_code == 403 and "--allow-downloads" in refused.json()["error"]
    # The hub cache is outside this root.
    refused = posted(["--root", place], "/api/finetune/plan", body)
    assert refused.status_code == 403 and "is not below a directory" in refused.json()["error"]
    assert not hub.requests


def test_a_download_is_a_job(place, hub, posted):
    with Server(place, "--allow-downloads", fresh=True) as server:
        post = server.http.post
        assert server.http.get("/api/state").json()["downloads"] is True
        assert post("/api/hub/download", json={"name": "/etc"}).status_code == 422
        hub.pause_s = 0.3
        id = post("/api/hub/download", json={"name": "org/tiny"}).json()["job_id"]
        while hub.sent < 50_000:
            assert server.job(id)["status"] in ("queued", "running"), server.job(id)
            time.sleep(0.05)
        post(f"/api/jobs/{id}/cancel")
        job = server.ended(id)
        assert job["status"] == "cancelled" and "continues from there" in job["message"]
        hub.pause_s = 0
        post(f"/api/jobs/{id}/resume")
        job = server.ended(id)
        assert (job["status"], job["name"], job["title"]) == ("done", "org/tiny", "Download")
        assert any(given for _, _, given in hub.requests)  # the download was resumed
        shares = [event["progress"] for event in server.events(id) if "share" in event]
        assert shares[-1] == 1
        assert server.ended(server.submit(model_dir="org/tiny", iters=1))["status"] == "done"
        id = post("/api/hub/download", json={"name": "org/none"}).json()["job_id"]
        assert "neither a path nor a model on the hub" in server.ended(id)["error"]
    flags = ["--allow-downloads", "--root", place]
    with pytest.raises(InputError, match=r"--allow-downloads needs .* add --root"):
        posted(flags, "/api/hub/download", {"name": "org/tiny"})
    assert posted([*flags, "--root", hubs.cache()], "/api/hub/download", {}).status_code == 422


def test_a_token_given_to_the_server_opens_what_is_gated(place, hub):
    hub.repositories["models", "org/tiny"].readers = {"hf_known"}
    with Server(place, "--allow-downloads", fresh=True) as server:
        post = server.http.post
        id = post("/api/hub/download", json={"name": "org/tiny"}).json()["job_id"]
        assert "is gated" in server.ended(id)["error"]
        post("/api/settings/hf-token", json={"token": "hf_known"})
        post(f"/api/jobs/{id}/resume")
        assert server.ended(id)["status"] == "done"


def test_a_link_out_of_the_cache_is_refused(place, hub, tmp_path, posted):
    path = hubs.model("org/tiny")
    (tmp_path / "secret.json").write_text("{}")
    (path / "extra.json").symlink_to(tmp_path / "secret.json")
    refused = posted([], "/api/finetune/plan", {"model_dir": "org/tiny"})
    assert refused.status_code == 403 and "is not below a directory" in refused.json()["error"]


def test_data_sets_by_name(place, hub, posted):
    rows = {path.name: path.read_bytes() for path in (place / "data").iterdir()}
    own = hub.add("org/notes", {f"data/{name}": x for name, x in rows.items()}, "datasets")
    hub.add("org/own", rows, "datasets")
    sources_of("org/own")  # as if the user had downloaded it
    hubs.model("org/tiny")
    run = {"model_dir": "org/tiny", "iters": 1, "max_seq_length": 64}
    refused = posted([], "/api/finetune/submit", run | {"data_dir": "org/own"})
    assert refused.status_code == 403 and "--allow-downloads" in refused.json()["error"]
    path = str(next((place.parent / "hf").rglob("train.jsonl")).parent)
    refused = posted([], "/api/finetune/submit", run | {"data_dir": path})
    assert refused.status_code == 403 and "is not below a directory" in refused.json()["error"]
    with Server(place, "--allow-downloads", fresh=True) as server:
        post = server.http.post
        inspect = {"path": "org/notes", "model_dir": "org/tiny", "max_seq_length": 64}
        asked = post("/api/finetune/inspect-dataset", json=inspect)
        assert asked.status_code == 400 and "download the repository first" in asked.json()["error"]
        body = {"name": "org/notes", "kind": "dataset"}
        job = server.ended(post("/api/hub/download", json=body).json()["job_id"])
        assert job["status"] == "done" and job["result"]["path"].endswith(own.commit)
        found = post("/api/finetune/inspect-dataset", json=inspect).json()
        assert found["ok"] and found["n_valid"] == 4, found
        hub.requests.clear()
        job = server.ended(server.submit(**run, data_dir="org/notes"))
        assert (job["status"], job["name"]) == ("done", "org/tiny on org/notes"), job
        assert f"org/notes@{own.commit}" in job["config_json"] and not hub.requests
        body = {"model_dir": "org/tiny", "data_dir": "org/notes", "max_seq_length": 64}
        job = server.ended(post("/api/finetune/evaluate", json=body).json()["job_id"])
        assert job["result"]["rows"] == 4, job


def test_a_search_asks_the_hub_once_and_says_what_is_wrong(tmp_path, hub, monkeypatch):
    """Calls the application directly, without a server process."""
    home, work = tmp_path / "hf", tmp_path / "work"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    (home / "hub").mkdir(parents=True)
    hub.add("org/tiny", {})
    hub.add("org/notes", {}, "datasets")
    services = []

    def ask(*words, **more):
        """Searches for each of `words`. Returns the status and body of each response."""

        async def asked():
            transport = httpx.ASGITransport(create(services[-1]), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                path, own = "/api/hub/search", [{"words": own, **more} for own in words]
                found = [await http.get(path, params=params) for params in own]
                return [(answer.status_code, answer.json()) for answer in found]

        return asyncio.run(asked())

    def begin(name, **how):
        services.append(Service(Settings(store=tmp_path / name, roots=(work, home), **how)))

    begin("closed")
    ((status, said),) = ask("tiny")
    assert status == 403 and "--allow-downloads" in said["error"]
    begin("open", downloads=True)
    tiny = {"ok": True, "found": [{"name": "org/tiny", "downloads": 1000}]}
    assert ask("tiny", " TINY  ", "org tiny") == 3 * [(200, tiny)]
    assert [path for _, path, _ in hub.requests].count("/api/models") == 2
    assert ask("notes", kind="dataset")[0][1]["found"][0]["name"] == "org/notes"
    assert ask("t")[0][0] == 422
    hub.searches_fail = True
    ((status, said),) = ask("other")
    assert status == 400 and "the hub answered a search with status 503" in said["error"]
    hub.searches_fail = False
    many = ask(*(f"words {n}" for n in range(60)), "tiny")
    # The last result comes from the cache.
    assert many[0][0] == 200 and many[-2][0] == 429 and many[-1] == (200, tiny)
    begin("offline", downloads=True)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    ((status, said),) = ask("tiny")
    assert status == 400 and "the hub does not answer" in said["error"]
    for service in services:
        asyncio.run(service.close())
