"""Tests uploads and downloads of files by calling the application directly, without a server."""

import asyncio
import json
import os
from contextlib import ExitStack, contextmanager

import httpx
import mlx.core as mx
import pytest

from mlx_segtrain import files
from mlx_segtrain.serving.api import transfers
from mlx_segtrain.serving.app import create
from mlx_segtrain.serving.jobs import pushing
from mlx_segtrain.serving.jobs.queue import Live
from mlx_segtrain.serving.service import Service
from mlx_segtrain.serving.settings import Settings

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 3
CONFIG = b'{"fine_tune_type": "lora"}'


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    place = tmp_path_factory.mktemp("uploads")
    own = Service(Settings(store=place / "store", roots=(place,)))
    yield own
    asyncio.run(own.close())


async def asked(service, method, path, content=None, /, **query):
    """Sends a request, and returns the response's status and body."""
    transport = httpx.ASGITransport(create(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        answer = await http.request(method, f"/api/{path}", content=content, params=query)
        return answer.status_code, answer.text


@pytest.fixture
def ask(service):
    def ask(*args, **query):
        return asyncio.run(asked(service, *args, **query))

    return ask


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "adapters.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((2, 2))})
    return path.read_bytes()


@contextmanager
def waiting(service, **values):
    """Provides an unfinished job that is never started."""
    row = service.jobs.store.add("finetune", json.dumps(values), None)
    service.jobs.live[row.id] = Live()
    try:
        yield row.id
    finally:
        del service.jobs.live[row.id]
        service.jobs.store.remove(row.id)


def left(service, pattern):
    return sorted(str(own.relative_to(service.uploads)) for own in service.uploads.glob(pattern))


def test_a_configuration_ends_where_nobody_would_read_on(service, ask):
    status, said = ask("PUT", "adapters/big/adapter_config.json", b" " * (4 << 20) + b"{}")
    assert status == 413 and "larger than 4 MiB" in said
    status, said = ask("PUT", "adapters/big/adapter_config.json", b"[1]")
    assert status == 400 and "expected a JSON object" in said and ".tmp" not in said
    assert left(service, "*/big*") == []
    assert ask("PUT", "adapters/small/adapter_config.json", CONFIG)[0] == 200


def test_a_model_is_no_adapter_to_take(service, ask):
    model = service.uploads.parent.parent / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    mx.save_safetensors(str(model / "model.safetensors"), {"a": mx.zeros((2, 2))})
    assert pushing.check(model) == ["config.json", "model.safetensors"]
    status, said = ask("GET", "adapters/archive", path=model)
    assert status == 400 and "contains no adapter" in said


def test_as_many_archives_are_taken_at_once_as_the_limit_says(service, ask):
    assert ask("PUT", "datasets/many/train.jsonl", ROWS)[0] == 200
    path = service.uploads / "datasets" / "many"
    with service.transfers.place(), service.transfers.place(), service.transfers.place():
        assert ask("GET", "datasets/archive", path=path)[0] == 200
        with service.transfers.place():
            status, said = ask("GET", "datasets/archive", path=path)
            assert status == 429 and "4 transfers are running" in said


def test_a_client_that_is_let_go_gives_its_place_back(service, ask, monkeypatch):
    """The transfer slot is freed immediately, even if a reference to the response remains."""
    assert ask("PUT", "datasets/slow/train.jsonl", ROWS)[0] == 200
    monkeypatch.setattr(transfers, "PATIENCE_S", 0.001)

    async def take():
        scope = {"type": "http", "method": "GET", "path": "/api/datasets/archive"}
        scope |= {"headers": [(b"host", b"localhost")], "asgi": {"spec_version": "2.4"}}
        path = service.uploads / "datasets" / "slow"
        scope["query_string"] = f"path={path}".encode()
        begun = []

        async def send(message):
            begun.append(message)
            if message.get("body"):
                await asyncio.Event().wait()

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        try:
            await create(service)(scope, receive, send)
        except Exception as error:  # keeps the exception's frames alive
            return error, begun[0]["status"], list(service.transfers.places)
        raise AssertionError("the whole response was sent")

    _, status, places = asyncio.run(take())
    assert (status, places) == (200, [])


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("datasets", "train.jsonl", "train.csv"),
        ("datasets", "valid.jsonl", "valid.jsonl.gz"),
        ("adapters", "adapters.safetensors", "adapter_model.safetensors"),
        ("adapters", "adapter_model.safetensors", "adapters_unpadded.safetensors"),
        ("adapters", "adapter_config.json", "adapter_config.json"),
    ],
)
def test_what_is_there_gets_nothing_of_another_upload(service, ask, weights, kind, first, second):
    content = CONFIG if first.endswith("json") else weights if kind == "adapters" else ROWS
    name = first.replace(".", "-")
    assert ask("PUT", f"{kind}/{name}/{first}", content)[0] == 200
    status, said = ask("PUT", f"{kind}/{name}/{second}", content)
    assert status == 409 and f"already has a file {first}" in said
    assert left(service, f"{kind}/{name}/*") == [f"{kind}/{name}/{first}"]


def test_both_weights_of_one_adapter_are_taken(ask, weights):
    for file in ("adapters.safetensors", "adapters_unpadded.safetensors"):
        assert ask("PUT", f"adapters/both/{file}", weights)[0] == 200


@pytest.mark.parametrize("named", ["", "train.jsonl"])
def test_what_a_job_uses_stays_as_it_is(service, ask, named):
    name = f"used-{len(named)}"
    assert ask("PUT", f"datasets/{name}/train.jsonl", ROWS)[0] == 200
    folder = service.uploads / "datasets" / name
    with waiting(service, model_dir="org/name", data_dir=str(folder / named)) as id:
        for method, path in (("PUT", f"{name}/valid.jsonl"), ("DELETE", name)):
            status, said = ask(method, f"datasets/{path}", ROWS if method == "PUT" else None)
            assert status == 409 and id in said, said
        assert ask("PUT", f"datasets/{name}-2/train.jsonl", ROWS)[0] == 200
    assert left(service, f"datasets/{name}/*") == [f"datasets/{name}/train.jsonl"]
    assert ask("PUT", f"datasets/{name}/valid.jsonl", ROWS)[0] == 200


def test_what_a_job_comes_to_use_meanwhile_stays_as_it_is(service, ask):
    assert ask("PUT", "datasets/late/train.jsonl", ROWS)[0] == 200
    with ExitStack() as jobs:

        async def parts():
            yield ROWS
            folder = service.uploads / "datasets" / "late"
            jobs.enter_context(waiting(service, data_dir=str(folder)))
            yield ROWS

        status, said = ask("PUT", "datasets/late/valid.jsonl", parts())
    assert status == 409 and "has not ended and uses late" in said, said
    assert left(service, "datasets/late/*") == ["datasets/late/train.jsonl"]


def test_a_folder_that_files_come_into_is_not_deleted(service, ask):
    said = []

    async def parts():
        yield ROWS
        said.append(await asked(service, "DELETE", "datasets/coming"))
        said.append(await asked(service, "PUT", "datasets/coming/train.csv", ROWS))
        yield ROWS

    assert ask("PUT", "datasets/coming/train.jsonl", parts())[0] == 200
    assert [(status, "sent" in own) for status, own in said] == [(429, True)] * 2, said
    assert left(service, "datasets/coming/*") == ["datasets/coming/train.jsonl"]


def test_the_disk_and_the_checks_are_waited_for_elsewhere(service, ask, weights, monkeypatch):
    """Writing and checking run in other threads, so the server answers other requests meanwhile."""
    loops, seen = set(), set()

    def noted(name, own):
        def call(*args, **kwargs):
            seen.add(name)
            loops.add(asyncio._get_running_loop())
            return own(*args, **kwargs)

        return call

    for name in ("sync", "make_folder"):
        monkeypatch.setattr(files, name, noted(name, getattr(files, name)))
    for module, name in ((pushing, "check_content"), (files, "open_regular")):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    assert ask("PUT", "adapters/apart/adapter_config.json", CONFIG)[0] == 200
    assert ask("PUT", "adapters/apart/adapters.safetensors", weights)[0] == 200
    assert ask("GET", "adapters/archive", path=service.uploads / "adapters" / "apart")[0] == 200
    assert ask("PUT", "datasets/apart/train.jsonl", ROWS)[0] == 200
    assert ask("GET", "datasets/archive", path=service.uploads / "datasets" / "apart")[0] == 200
    assert seen == {"sync", "make_folder", "check_content", "open_regular"}
    assert loops == {None}


@pytest.mark.parametrize(
    "path",
    [
        *("datasets/x/train.%00.jsonl", "datasets/x/train.backup.jsonl", "datasets/x/TRAIN.jsonl"),
        *("datasets/x/train.jsonl%20", "datasets/x/validation.jsonl"),
        *(f"datasets/x/train.{'a' * 300}.jsonl", f"datasets/{'a' * 65}/train.jsonl"),
        *("datasets/x%C3%A9/train.jsonl", "adapters/x%C3%A9/adapter_config.json"),
    ],
)
def test_names_are_those_that_are_known(service, ask, path):
    status, said = ask("PUT", path, ROWS)
    assert status == 422 and ("called train or valid" in said or "name" in said), said
    assert left(service, "*/x*") == []


@pytest.mark.parametrize(
    "name", ["train.jsonl.gz", "valid.parquet", "train.JSONL", "train.ndjson.zst"]
)
def test_a_split_may_have_any_ending_of_rows(ask, name):
    assert ask("PUT", f"datasets/{name.replace('.', '-')}/{name}", ROWS)[0] == 200


def test_what_the_disk_refuses_is_one_sentence(service, ask, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        status, said = ask("PUT", "datasets/full/train.jsonl", ROWS)
    assert status == 400 and "train.jsonl cannot be written: No space left on device." in said
    assert left(service, "*/full*") == []
    rows = service.uploads.parent.parent / "rows"
    rows.mkdir()
    os.mkfifo(rows / "train.jsonl")
    status, said = ask("GET", "datasets/archive", path=rows)
    assert status == 400 and "cannot be read: it is not a regular file" in said


def test_a_refusal_says_what_was_not_done(ask, service, weights):
    for file, content in (("adapter_config.json", CONFIG), ("adapters.safetensors", weights)):
        assert ask("PUT", f"adapters/said/{file}", content)[0] == 200
    folder = service.uploads / "adapters" / "said"
    (folder / "README.md").symlink_to(folder / "adapter_config.json")
    status, said = ask("GET", "adapters/archive", path=folder)
    assert status == 400 and "README.md" in said and "downloaded" in said and "pushed" not in said
    (folder / "README.md").unlink()
    os.link(folder / "adapter_config.json", folder / "LICENSE")
    status, said = ask("GET", "adapters/archive", path=folder)
    assert status == 400 and "nothing was downloaded" in said


def test_one_file_of_what_was_sent_is_deleted(ask, service, weights):
    """One file of an upload can be deleted. If the second file is refused, the page deletes the
    first, which is useless alone."""
    for file, content in (("adapter_config.json", CONFIG), ("adapters.safetensors", weights)):
        assert ask("PUT", f"adapters/part/{file}", content)[0] == 200
    assert ask("DELETE", "adapters/part/adapters.safetensors")[0] == 200
    assert left(service, "adapters/part/*") == ["adapters/part/adapter_config.json"]
    status, said = ask("DELETE", "adapters/part/adapters.safetensors")
    assert status == 404 and "part/adapters.safetensors was not uploaded" in said
    assert ask("DELETE", "adapters/part/..%2Fadapter_config.json")[0] in (404, 422)
    with waiting(service, warm_start=str(service.uploads / "adapters" / "part")):
        assert ask("DELETE", "adapters/part/adapter_config.json")[0] == 409
    assert ask("DELETE", "adapters/part/adapter_config.json")[0] == 200
    assert left(service, "adapters/part*") == []  # the folder is deleted, too, so its name is free
