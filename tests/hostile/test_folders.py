"""Tests which folders clients may name, which files are pushed to the hub, and which folders may be
overwritten."""

import asyncio
import json
import os
import threading

import mlx.core as mx
import pytest

from lib.attack import CANARY, write_canary
from mlx_segtrain.errors import InputError
from mlx_segtrain.serving import catalog
from mlx_segtrain.serving.confined.parent import Confined
from mlx_segtrain.serving.jobs import pushing
from mlx_segtrain.serving.jobs.queue import Jobs
from mlx_segtrain.serving.roots import Outside, Roots
from mlx_segtrain.serving.service import Service
from mlx_segtrain.serving.settings import Settings
from mlx_segtrain.training.contents import check_own


def write_adapter(folder):
    """Writes an adapter as a run does, and other files that a user's folder may contain."""
    (folder / "state" / "step-00001").mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"a": mx.zeros((2, 2))})
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    (folder / "README.md").write_text("An adapter.")
    for name in ("run.json", "metrics.jsonl", ".env", "token", "notes.txt", "train.jsonl"):
        (folder / name).write_text(CANARY)
    (folder / "state" / "step-00001" / "state.safetensors").write_text(CANARY)
    return folder


ADAPTER = ["README.md", "adapter_config.json", "adapters.safetensors"]


# Paths that clients may name


def test_the_token_of_the_hub_lies_outside(tmp_path, monkeypatch):
    """The default roots are the working directory and the Hugging Face cache. Clients must not
    reach the user's access token or hidden folders through either of them."""
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    hub = home / ".cache" / "huggingface"
    for name in ("hub/models--me--mine/snapshots/1", "hub/datasets--me--mine", "hub/.locks"):
        (hub / name).mkdir(parents=True)
    (hub / "token").write_text(CANARY)
    for name in (".ssh", ".config/gh", "work/.git", "work/data"):
        (home / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for start in (home, home / "work"):
        monkeypatch.chdir(start)
        settings = Settings(store=home / ".cache" / "mlx-segtrain")
        roots = Roots(settings.folders, settings.store)
        for path in (
            *(hub, hub / "token", hub / "hub" / "datasets--me--mine", hub / "hub" / ".locks"),
            *(home / ".ssh", home / ".config" / "gh", home / "work" / ".git" / "x"),
        ):
            with pytest.raises(Outside):
                roots.resolve(path)
        assert roots.resolve(home / "work" / "data")
        assert roots.resolve(hub / "hub" / "models--me--mine" / "snapshots" / "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "other"))
    assert tmp_path / "other" / "hub" in Settings().folders


def test_links_at_any_depth(tmp_path):
    outside = write_canary(tmp_path / "outside")
    root, model = tmp_path / "root", tmp_path / "root" / "model"
    (model / "additional_chat_templates").mkdir(parents=True)
    roots = Roots([root])
    assert roots.resolve(model) == model
    link = model / "additional_chat_templates" / "default.jinja"
    link.symlink_to(outside / "default.jinja")
    with pytest.raises(Outside, match=r"default\.jinja is not below a directory"):
        roots.resolve(model)
    link.unlink()
    # This link points to a folder below the root that itself contains a link.
    (root / "templates").mkdir()
    (root / "templates" / "default.jinja").symlink_to(outside / "default.jinja")
    (model / "additional_chat_templates").rmdir()
    (model / "additional_chat_templates").symlink_to(root / "templates")
    with pytest.raises(Outside):
        roots.resolve(model)
    (root / "templates" / "default.jinja").unlink()
    (root / "templates" / "round").symlink_to(model)  # a cycle
    assert roots.resolve(model) == model


def test_a_folder_of_very_many_files_is_not_looked_through(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_segtrain.serving.roots.MOST_BELOW", 50)
    for i in range(60):
        (tmp_path / f"{i}").mkdir()
    with pytest.raises(InputError, match="more than 50 files"):
        Roots([tmp_path]).resolve(tmp_path)


# Files that are pushed


def test_only_an_adapter_s_own_files_are_sent(tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    assert pushing.check(adapter) == ADAPTER
    with pushing.opened(adapter) as files:
        assert list(files) == ADAPTER
        assert not any(CANARY.encode() in file.read() for file in files.values())
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for name in ("tokenizer.json", "token", ".env", "train.jsonl"):
        (model / name).write_text("{}")
    with pytest.raises(InputError, match="neither an adapter nor a model"):
        pushing.check(model)
    mx.save_safetensors(str(model / "model.safetensors"), {"a": mx.zeros((2, 2))})
    assert pushing.check(model) == ["config.json", "model.safetensors", "tokenizer.json"]
    for other in (write_canary(tmp_path / "outside"), tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError):
            pushing.check(other)


@pytest.mark.parametrize("name", [*ADAPTER, "loss.png"])
@pytest.mark.parametrize("how", ["link", "hard link", "pipe", "folder"])
def test_what_is_sent_is_a_file_in_the_folder(tmp_path, name, how):
    adapter = write_adapter(tmp_path / "adapter")
    secret = write_canary(tmp_path / "outside") / "secret"
    (adapter / name).unlink(missing_ok=True)
    if how == "link":
        (adapter / name).symlink_to(secret)
    elif how == "hard link":
        (adapter / name).hardlink_to(secret)
    elif how == "pipe":
        os.mkfifo(adapter / name)
    else:
        (adapter / name).mkdir()
    with pytest.raises(InputError, match="link"), pushing.opened(adapter):
        raise AssertionError("it was opened")


def test_a_file_that_is_exchanged_while_it_is_sent(tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    secret = write_canary(tmp_path / "outside") / "secret"
    with pushing.opened(adapter) as files:
        (adapter / "README.md").unlink()
        (adapter / "README.md").symlink_to(secret)
        assert files["README.md"].read() == b"An adapter."
    (adapter / "README.md").unlink()
    adapter.rename(tmp_path / "moved")
    adapter.symlink_to(tmp_path / "moved")
    with pytest.raises(InputError, match="link"):
        pushing.check(adapter)


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
def test_a_secret_by_the_name_of_an_adapter_s_file(tmp_path, name):
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / name).write_text(CANARY)
    with pytest.raises(InputError, match=r"JSON|safetensors"), pushing.opened(adapter):
        raise AssertionError("it was opened")


def test_a_failed_push_that_is_resumed_sends_no_link(tmp_path, monkeypatch, hub):
    adapter = write_adapter(tmp_path / "adapter")
    secret = write_canary(tmp_path / "outside") / "secret"
    values = {"source": str(adapter), "repo_id": "me/mine", "private": True}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    async def run():
        jobs = Jobs(tmp_path / "store")
        jobs.environment.update({"HF_TOKEN": "hf_" + "s" * 20, "HF_ENDPOINT": hub.url})
        await jobs.start()
        try:
            (adapter / "adapters.safetensors").rename(tmp_path / "weights")
            id = jobs.submit("push", values).id
            first = await asyncio.wait_for(jobs.ended(id), 60)
            (tmp_path / "weights").rename(adapter / "adapters.safetensors")
            (adapter / "README.md").unlink()
            (adapter / "README.md").symlink_to(secret)
            jobs.resume(id)
            second = await asyncio.wait_for(jobs.ended(id), 60)
            (adapter / "README.md").unlink()
            jobs.resume(id)
            return first, second, await asyncio.wait_for(jobs.ended(id), 60)
        finally:
            await jobs.close()

    first, second, third = asyncio.run(run())
    assert first.status == "failed" and "neither an adapter" in first.error
    assert second.status == "failed" and "README.md" in second.error
    assert third.status == "done", third.error
    assert sorted(hub.pushed) == ["adapter_config.json", "adapters.safetensors"]
    assert CANARY not in str(hub)


# Folders that may be overwritten


@pytest.fixture
def service(tmp_path):
    store = tmp_path / "store"
    own = Service(Settings(store=store, roots=(tmp_path / "root", tmp_path)))
    yield own
    asyncio.run(own.close())


def names_of_the_store(store):
    return [
        *(store, store / "jobs", store / "jobs" / "x", store / "jobs.sqlite-journal"),
        *(store / "jobs.sqlite", store / "JOBS.sqlite-wal", store / "Jobs" / "x"),
        *(store / "x", store / "adapters", store / "references" / "x"),
    ]


def test_outputs_are_never_the_store_s_own(service, tmp_path):
    adapter = write_adapter(tmp_path / "root" / "adapter")
    for path in names_of_the_store(tmp_path / "store"):
        with pytest.raises(
            InputError, match=r"reserved by the store|belongs to the server|already exists"
        ):
            service.enqueue(
                "export", adapter_path=str(adapter), base_model=None, output_dir=str(path)
            )
        with pytest.raises(InputError):
            service.enqueue("merge", adapters=[str(adapter)] * 2, output_dir=str(path))
    assert service.jobs.store.newest(10) == []


@pytest.fixture
def run(tmp_path):
    """Returns the settings of a run that would overwrite an existing folder of the user, and the
    path of that folder."""
    model, data, out = (tmp_path / "root" / name for name in ("model", "data", "out"))
    for folder in (model, data, out):
        folder.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (data / "train.jsonl").write_text("{}")
    paths = {"model_dir": model, "data_dir": data, "adapter_path": out}
    return {**{name: str(path) for name, path in paths.items()}, "overwrite": True}, out


RECORD = {"id": "1"} | {
    part: {} for part in ("config", "folders", "inputs", "versions", "device", "settings")
}


def test_a_folder_is_a_run_s_by_its_content(service, tmp_path, run):
    values, out = run
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "thesis.txt").write_text(CANARY)
    for record in ("{}", "[]", "null", '{"id": "1"}', "not JSON"):
        (out / "run.json").write_text(record)
        with pytest.raises(InputError, match="does not contain a run"):
            service.submit(values)
    (out / "run.json").write_text(json.dumps(RECORD))
    with pytest.raises(
        InputError, match=r"checkpoints/thesis\.txt, which was not written by a run"
    ):
        service.submit(values)
    with pytest.raises(InputError, match=r"checkpoints/thesis\.txt"):
        check_own(out)  # the check at the start of a run
    assert (out / "checkpoints" / "thesis.txt").read_text() == CANARY


@pytest.mark.parametrize(
    "name",
    [
        *("state/step-1/other.bin", "state/x", "state/step-1/state.safetensors/x", "best/x.py"),
        *("checkpoints/step-1/sub/README.md", "checkpoints/step-x/README.md", "tensorboard/mine"),
        *("best/adapters.safetensors.bak", "state"),
    ],
)
def test_what_no_run_writes_is_not_removed(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="which was not written by a run"):
        check_own(tmp_path)


def test_what_a_run_writes_is(tmp_path):
    for name in (
        *("state/step-00010/state.safetensors", "state/step-00010/manifest.json"),
        *("checkpoints/step-00010/adapters.safetensors", "best/README.md"),
        *("checkpoints/step-00020-val2.3456/README.md", "checkpoints/step-00030-valnan/README.md"),
        *("best/optiq_lora_config.json", "tensorboard/events.out.tfevents.1.host.1.0", "notes"),
        *("state/.step-00020.123.tmp/state.safetensors", "best/.README.md.77.tmp"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    check_own(tmp_path)
    (tmp_path / "best" / "README.md").unlink()
    (tmp_path / "best" / "README.md").symlink_to(tmp_path / "notes")
    with pytest.raises(InputError, match="which was not written by a run"):
        check_own(tmp_path)


def test_a_size_of_a_file_that_lies_elsewhere_is_not_listed(tmp_path):
    outside = write_canary(tmp_path / "outside")
    root = tmp_path / "root"
    for name in ("models--a--b", "models--a--b/snapshots/1", "models--c--d/snapshots/1"):
        (root / name).mkdir(parents=True)
    (root / "models--a--b" / "train.jsonl").symlink_to(outside / "secret")
    (root / "models--a--b" / "snapshots" / "1" / "train.jsonl").symlink_to(outside / "secret")
    blob = root / "models--c--d" / "blobs" / "0"
    blob.parent.mkdir()
    blob.write_text("{}")
    (root / "models--c--d" / "snapshots" / "1" / "train.jsonl").symlink_to("../../blobs/0")
    found = [(own.path, own.size_bytes) for own in catalog.datasets([root])]
    assert found == [(str(root / "models--c--d" / "snapshots" / "1"), 2)]


@pytest.mark.parametrize(("chains", "length"), [(1, 20), (1500, 1)])
def test_very_many_links_are_not_followed(tmp_path, chains, length):
    """Long chains of links are refused, because resolving all links of a chain would take time
    quadratic in the length of the chain."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    for chain in range(chains):
        target = "file"
        for i in range(length):
            (tmp_path / "folder" / f"{chain}-{i}").symlink_to(target)
            target = f"{chain}-{i}"
    with pytest.raises(InputError, match=r"links|chain of links"):
        Roots([tmp_path]).resolve(tmp_path / "folder")


def test_a_tokenizer_that_loads_keeps_nobody_waiting(tmp_path, monkeypatch):
    """Other requests must not be blocked while the processes of an unused model are shut down."""
    closing, closed = threading.Event(), threading.Event()

    def close(self):
        closing.set()
        assert closed.wait(20)

    monkeypatch.setattr(Confined, "close", close)
    service = Service(Settings(store=tmp_path / "store", roots=(tmp_path,)))
    first = service._confined(tmp_path / "0")
    first.users = 1  # the process of a tokenizer in use is never ended
    for i in range(1, 5):
        service._confined(tmp_path / str(i))
    assert closing.wait(5) and not closed.is_set()
    assert service._confined(tmp_path / "0") is first and len(service.confined) <= 3
    closed.set()
