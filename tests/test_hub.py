"""Models by name: from a hub on this machine, broken off and continued, from the cache, and what
cannot be had, in a sentence each."""

import pytest

from lib.folders import write_llama
from mlx_segtrain import InputError, hub as hubs


@pytest.fixture
def home(tmp_path, monkeypatch, hub, cache):
    """A user's hub cache that is empty, and the hub that is asked."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    return tmp_path / "hf"


@pytest.fixture
def tiny(hub, home, llama4):
    own = hub.add("org/tiny-4bit", llama4)
    own.files |= {"pytorch_model.bin": b"x" * 10, "original/params.json": b"{}", "README.md": b""}
    return own


def test_a_model_by_its_name(hub, tiny, llama4):
    folder = hubs.model("org/tiny-4bit")
    assert folder.name == tiny.commit and hubs.title(folder) == "org/tiny-4bit"
    assert {path.name for path in folder.iterdir()} == {path.name for path in llama4.iterdir()}
    for path in llama4.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert hubs.origin(folder) == hubs.Repository("org/tiny-4bit", tiny.commit)
    hub.requests.clear()
    assert hubs.model("org/tiny-4bit") == folder
    assert hubs.model(f"org/tiny-4bit@{tiny.commit}") == folder
    assert not hub.requests  # the cache has it


def test_what_the_hubs_own_client_has_fetched_is_taken(hub, tiny, home, monkeypatch):
    from huggingface_hub import snapshot_download

    place = snapshot_download("org/tiny-4bit", endpoint=hub.url, cache_dir=home / "hub")
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert str(hubs.model("org/tiny-4bit")) == place and not hub.requests


def test_a_download_that_is_broken_off_is_continued(hub, tiny, home, monkeypatch):
    weights = tiny.files["model.safetensors"]

    class Stop(BaseException):
        pass

    def stop(event):
        if event["share"] > 0.4:
            raise Stop

    monkeypatch.setattr(hubs, "TELL_S", 0)
    with pytest.raises(Stop):
        hubs.model("org/tiny-4bit", stop)
    first = hub.sent
    assert 0 < first and not list(home.rglob("model.safetensors"))
    told = []
    folder = hubs.model("org/tiny-4bit", told.append)
    assert (folder / "model.safetensors").read_bytes() == weights
    ranges = [given for method, path, given in hub.requests if method == "GET" and given]
    assert len(ranges) == 1 and int(ranges[0].removeprefix("bytes=").rstrip("-")) > 0
    assert not list(home.rglob("*.incomplete"))
    assert told[-1]["share"] == 1 and told[-1]["message"].startswith("downloading org/tiny-4bit: ")


def test_a_connection_that_ends_again_and_again(hub, tiny, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda s: None)
    hub.breaks_after = 40_000
    folder = hubs.model("org/tiny-4bit")
    assert (folder / "model.safetensors").read_bytes() == tiny.files["model.safetensors"]
    assert hub.files_asked().count("model.safetensors") > 2


def test_a_connection_that_brings_nothing(hub, tiny, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda s: None)
    hub.breaks_after = 0
    with pytest.raises(InputError, match="was broken off after 0.0 MB of 0.1 MB .*goes on from"):
        hubs.model("org/tiny-4bit")
    assert len(hub.files_asked()) == hubs.TRIES


def test_other_bytes_than_were_begun_are_seen(hub, tiny, home):
    blobs = home / "hub" / "models--org--tiny-4bit" / "blobs"
    blobs.mkdir(parents=True)
    from lib.hub import etag

    begun = blobs / (etag(tiny.files["model.safetensors"]) + hubs.BEGUN)
    begun.write_bytes(b"wrong" * 100)
    with pytest.raises(InputError, match="is not the file that the hub describes"):
        hubs.model("org/tiny-4bit")
    folder = hubs.model("org/tiny-4bit")
    assert (folder / "model.safetensors").read_bytes() == tiny.files["model.safetensors"]


def test_offline(hub, tiny, home, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE forbids"):
        hubs.model("org/tiny-4bit")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = hubs.model("org/tiny-4bit")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    assert hubs.model("org/tiny-4bit") == folder and not hub.requests


def test_without_a_network(hub, tiny, home, monkeypatch, cache):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match="hub cannot be reached .*: look at the network"):
        hubs.model("org/tiny-4bit")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    folder = hubs.model("org/tiny-4bit")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    hubs._listing(hubs.Repository("org/tiny-4bit"), folder.name).unlink()  # another tool's
    assert hubs.model("org/tiny-4bit") == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="hub cannot be reached"):
        hubs.model("org/tiny-4bit")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("org/none", "is neither a path here nor a model of the hub"),
        ("org/tiny-4bit@v9", "org/tiny-4bit has no revision v9"),
        ("org/gated", "is gated: accept its licence on http.*/org/gated"),
        ("org/gguf", "has only .bin and .gguf files.*`mlx-segtrain convert"),
        ("org/nothing", "has no weights"),
    ],
)
def test_what_cannot_be_had(hub, tiny, llama4, text, reason):
    hub.add("org/gated", llama4, readers={"hf_known"})
    hub.add("org/gguf", {"a.gguf": b"", "pytorch_model.bin": b"", "config.json": b"{}"})
    hub.add("org/nothing", {"README.md": b""})
    with pytest.raises(InputError, match=reason):
        hubs.model(text)


def test_a_token_opens_what_is_gated(hub, home, llama4, monkeypatch):
    hub.add("org/gated", llama4, readers={"hf_known"})
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(InputError, match="is gated"):
        hubs.model("org/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_known")
    assert (hubs.model("org/gated") / "model.safetensors").is_file()


def test_a_revision(hub, tiny):
    tiny.refs["v1"] = tiny.commit
    folder = hubs.model("org/tiny-4bit@v1")
    assert folder.name == tiny.commit
    hub.requests.clear()
    assert hubs.model("org/tiny-4bit@v1") == folder and not hub.requests


def test_a_newer_commit_is_taken_where_the_cached_one_is_not_whole(hub, tiny, llama4):
    first = hubs.model("org/tiny-4bit", weights=False)
    assert not (first / "model.safetensors").exists() and (first / "tokenizer.json").exists()
    changed = {**tiny.files, "generation_config.json": b'{"x": 1}'}
    assert hub.add("org/tiny-4bit", changed).commit != tiny.commit
    asked = len(hub.files_asked())
    second = hubs.model("org/tiny-4bit")
    assert second != first and (second / "tokenizer.json").exists()
    assert set(hub.files_asked()[asked:]) == {"model.safetensors", "generation_config.json"}


def test_a_disk_without_room(hub, tiny, home, monkeypatch):
    usage = type("Usage", (), {"free": 250_000_000})
    monkeypatch.setattr(hubs.shutil, "disk_usage", lambda path: usage)
    hubs.model("org/tiny-4bit", weights=False)
    usage.free = 200_000_100
    with pytest.raises(InputError, match="needs .* more, and 200.0 MB are free where"):
        hubs.model("org/tiny-4bit")


def test_which_texts_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert hubs.named("org/here") is None
    for text in ("org/x", "org/x@main", "org/x.y-4bit@refs/pr/1"):
        assert str(hubs.named(text)) == text
    for text in ("x", "./org/x", "/org/x", "~/x", "../x/y", "a/b/c", "a/b@../x", "a/..", "a/b--c"):
        assert hubs.named(text) is None
