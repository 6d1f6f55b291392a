"""Tests models given by their hub names: downloads from a local hub, interrupted downloads, the
cache, and error messages."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import mlx.core as mx
import pytest

from lib.hub import etag
from lib.runs import config_of
from mlx_segtrain import InputError, files, load, train
from mlx_segtrain import hub as hubs
from mlx_segtrain.commands.main import main
from mlx_segtrain.lora.folder import open_folder
from mlx_segtrain.training import evaluate


@pytest.fixture
def home(tmp_path, monkeypatch, hub, cache):
    """Sets HF_ENDPOINT to the local hub and HF_HOME to a new folder. Returns this folder."""
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
    assert not hub.requests  # served from the cache


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
    assert first > 0 and not list(home.rglob("model.safetensors"))
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
    with pytest.raises(InputError, match=r"stopped after 0\.0 MB of 0\.1 MB .*to continue"):
        hubs.model("org/tiny-4bit")
    assert len(hub.files_asked()) == hubs.TRIES


def test_a_hub_that_says_another_size_than_it_sends(hub, tiny, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda s: None)
    for more, reason in ((-5, "more than the expected .* bytes"), (5, "416|no more data arrived")):
        hub.says_more = more
        with pytest.raises(InputError, match=reason):
            hubs.model("org/tiny-4bit")


def test_other_bytes_than_were_begun_are_seen(hub, tiny, home):
    blobs = home / "hub" / "models--org--tiny-4bit" / "blobs"
    blobs.mkdir(parents=True)
    begun = blobs / (etag(tiny.files["model.safetensors"]) + hubs.BEGUN)
    begun.write_bytes(b"wrong" * 100)
    with pytest.raises(InputError, match="did not match the hub's checksum"):
        hubs.model("org/tiny-4bit")
    folder = hubs.model("org/tiny-4bit")
    assert (folder / "model.safetensors").read_bytes() == tiny.files["model.safetensors"]


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline(name, hub, tiny, home, monkeypatch):
    monkeypatch.setenv(name, "1")
    with pytest.raises(InputError, match=f"{name} forbids"):
        hubs.model("org/tiny-4bit")
    monkeypatch.delenv(name)
    folder = hubs.model("org/tiny-4bit")
    monkeypatch.setenv(name, "1")
    hub.requests.clear()
    assert hubs.model("org/tiny-4bit") == folder and not hub.requests


def test_without_a_network(hub, tiny, home, monkeypatch, cache):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match=r"hub cannot be reached .*: check the network"):
        hubs.model("org/tiny-4bit")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    folder = hubs.model("org/tiny-4bit")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    # Simulate a model that another tool has downloaded.
    hubs._listing(hubs.Repository("org/tiny-4bit"), folder.name).unlink()
    assert hubs.model("org/tiny-4bit") == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="hub cannot be reached"):
        hubs.model("org/tiny-4bit")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("org/none", "is neither a path nor a model on the hub"),
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
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    hubs.model("org/tiny-4bit", weights=False)
    usage.free = 200_000_100
    with pytest.raises(InputError, match=r"needs another .*, but only 200\.0 MB is free on"):
        hubs.model("org/tiny-4bit")


def test_which_texts_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert hubs.named("org/here") is None
    for text in ("org/x", "org/x@main", "org/x.y-4bit@refs/pr/1"):
        assert str(hubs.named(text)) == text
    for text in ("x", "./org/x", "/org/x", "~/x", "../x/y", "a/b/c", "a/b@../x", "a/..", "a/b--c"):
        assert hubs.named(text) is None


def test_a_run_by_name(hub, tiny, home, data, tmp_path, capsys):
    argv = ["--data", data, "--adapter-path", tmp_path / "a", "--max-seq-length", "100"]
    argv = ["train", *map(str, argv), "--model", "org/tiny-4bit"]
    assert main([*argv, "--iters", "2"]) == 0
    assert "downloading org/tiny-4bit: 0.1 MB of 0.1 MB" in capsys.readouterr().out
    own = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert own["base_model_name_or_path"] == "org/tiny-4bit"
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["hub"] == {"model": f"org/tiny-4bit@{tiny.commit}"}
    assert open_folder(tmp_path / "a").base_folder == hubs.model("org/tiny-4bit")
    # The hub and the cache have a newer commit, but a resumed run keeps the commit it started with.
    other = hub.add("org/tiny-4bit", {**tiny.files, "config.json": b"{}"})
    (home / "hub" / "models--org--tiny-4bit" / "refs" / "main").write_text(other.commit)
    assert main([*argv, "--iters", "3", "--resume"]) == 0
    assert json.loads((tmp_path / "a" / "run.json").read_text())["hub"] == record["hub"]
    argv[-1] = "org/none"
    assert main([*argv, "--overwrite"]) == 2
    assert "org/none is neither a path nor a model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "--max-seq-length", "100", "--json"],
        ["generate", "--prompt", "x", "--max-tokens", "1"],
        ["inspect", "DATA", "--json"],
        ["adapters", "DATA", "--json"],
    ],
)
def test_commands_take_names(hub, tiny, home, data, capsys, command):
    command = [str(data) if word == "DATA" else word for word in command]
    assert main([*command, "--model", "org/tiny-4bit"]) == 0
    said = capsys.readouterr()
    assert "downloading org/tiny-4bit" in said.err and "downloading" not in said.out
    weights = list(home.rglob("model.safetensors"))
    # `plan` needs only the headers of the weight files, and `inspect` only the tokenizer.
    assert bool(weights) == (command[0] in ("generate", "adapters"))


def test_a_plan_needs_no_weights(hub, tiny, home, llama4, capsys, monkeypatch):
    argv = ["plan", "--max-seq-length", "100", "--json", "--model"]
    monkeypatch.setattr(hubs, "HEADER", 100)  # less than the header's length
    assert main([*argv, "org/tiny-4bit"]) == 0
    by_name = json.loads(capsys.readouterr().out)
    assert hub.sent < 30_000 < len(tiny.files["model.safetensors"])
    asked = len(hub.requests)
    assert main([*argv, "org/tiny-4bit"]) == 0 and len(hub.requests) == asked
    capsys.readouterr()
    assert main([*argv, str(llama4)]) == 0
    by_path = json.loads(capsys.readouterr().out)
    same = ("peak", "parts", "weights", "plan")
    assert [by_name[name] for name in same] == [by_path[name] for name in same]
    hubs.model("org/tiny-4bit")
    assert main([*argv, "org/tiny-4bit"]) == 0


def test_ctrl_c_ends_a_download_at_once_and_the_next_start_goes_on(hub, tiny, home):
    hub.pause_s = 0.5
    argv = ["generate", "--model", "org/tiny-4bit", "--prompt", "x", "--max-tokens", "1"]
    command = [sys.executable, "-m", "mlx_segtrain.commands.main", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while hub.sent < 40_000 and process.poll() is None:
        time.sleep(0.01)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, process.stderr.read()
    assert time.monotonic() - asked < 1
    hub.pause_s = 0
    assert (hubs.model("org/tiny-4bit") / "model.safetensors").is_file()
    assert hub.sent < sum(map(len, tiny.files.values())) + 20_000


def test_a_model_and_an_adapter_by_name_in_python(hub, tiny, home, llama4, data, tmp_path):
    out = tmp_path / "a"
    train(config_of("org/tiny-4bit", data, out, iters=1))
    hub.add("me/mine", {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()})
    told = []
    load("org/tiny-4bit", "me/mine", told.append)
    assert [event["message"] for event in told][-1].startswith("downloading me/mine: ")
    argv = ["export", "me/mine", "--to", "peft", "--out", str(tmp_path / "peft")]
    assert main(argv) == 0  # finds the adapter's base in the cache
    argv = ["generate", "--model", "org/tiny-4bit", "--adapter-path", "me/mine", "--prompt", "x"]
    assert main([*argv, "--max-tokens", "1"]) == 0
    warm = config_of("org/tiny-4bit", data, tmp_path / "b", warm_start="me/mine", iters=1)
    assert train(warm).steps == 1
    assert evaluate(config_of("org/tiny-4bit", data, out), "me/mine").rows == 6


def test_convert(hub, home, llama, data, tmp_path, capsys):
    hub.add("org/dense", llama)
    out = tmp_path / "made"
    argv = ["convert", "org/dense", "--bits", "8", "--group-size", "32", "--out", str(out)]
    assert main(argv) == 0
    assert f"model    {out}, 0.00 GB" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (8, 32)
    tokens = mx.array([[1, 5, 9, 200]])
    (made, _), (base, _) = load(out), load(llama)
    apart = mx.abs(made(tokens) - base(tokens)).max()
    assert 0 < apart < 0.05
    assert train(config_of(out, data, tmp_path / "a", iters=1)).steps == 1
    for again, reason in (
        (argv, "already exists"),
        (["convert", str(out), *argv[2:]], "already"),
    ):
        assert main(again) == 2 and reason in capsys.readouterr().err


def test_what_cannot_be_converted(hub, home, llama, tmp_path, capsys, monkeypatch):
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "unheard"}
    own = hub.add("org/odd", llama)
    own.files["config.json"] = json.dumps(config).encode()
    out = tmp_path / "made"
    argv = ["convert", "org/odd", "--out", str(out)]
    assert main(argv) == 2 and "Model type unheard not supported" in capsys.readouterr().err
    assert list(tmp_path.glob("made*")) == list(tmp_path.glob(".made*")) == []
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    assert main(argv) == 2 and "needs 0.1 MB, but only 0.0 MB is free" in capsys.readouterr().err


def test_serve_takes_a_name(hub, tiny, home, monkeypatch):
    from mlx_segtrain.serving import app

    seen = []
    monkeypatch.setattr(app, "run", lambda settings, level: seen.append(settings))
    assert main(["serve", "org/tiny-4bit", "--allow-downloads"]) == 0
    assert seen[0].downloads and seen[0].model_dir == hubs.model("org/tiny-4bit")


def test_search_lists_what_the_hub_has(hub, home, capsys, monkeypatch):
    hub.add("org/tiny-4bit", {})
    hub.add("org/notes", {}, "datasets")
    assert main(["search", "TINY", "4bit"]) == 0
    assert capsys.readouterr().out == "org/tiny-4bit         1,000 downloads\n"
    assert main(["search", "notes", "--datasets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": "org/notes", "downloads": 1000}]
    assert main(["search", "notes"]) == 0 and "nothing on the hub" in capsys.readouterr().out
    hub.searches_fail = True
    assert main(["search", "tiny"]) == 2
    assert "the hub answered a search with status 503: try again later." in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["search", "tiny"]) == 2 and "does not answer" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["search", "tiny"]) == 2 and "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_push_uploads_an_adapter_and_nothing_beside_it(hub, home, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "adapter"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"a": mx.zeros((2, 2))})
    (folder / "adapter_config.json").write_text("{}")
    (folder / "secret.txt").write_text("mine")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["push", str(folder), "me/mine"]) == 2
    assert "no hub token: log in with `hf auth login`" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_known")
    assert main(["push", str(folder), "me/mine"]) == 0
    assert capsys.readouterr().out == f"pushed to {hub.url}/me/mine\n"
    assert {*hub.pushed} == {"adapters.safetensors", "adapter_config.json"}
    assert hub.told["/api/repos/create"]["visibility"] == "private"
    assert main(["push", str(folder), "me/mine", "--public", "--quiet"]) == 0
    assert hub.told["/api/repos/create"]["visibility"] == "public"
    capsys.readouterr()
    for place, repo, said in (
        (folder, "no name at all", "is not a valid hub name"),
        (tmp_path / "none", "me/mine", "is not a directory"),
        (tmp_path, "me/mine", "contains neither an adapter nor a model"),
    ):
        assert main(["push", str(place), repo]) == 2
        assert said in capsys.readouterr().err


def test_a_card_that_the_hub_refuses_is_named(hub, home, tmp_path, capsys, monkeypatch):
    """The card of an adapter of a local model contains the model's path, which is no hub name."""

    def refuses(*args, **more):
        raise ValueError('Invalid metadata in README.md.\n- "base_model" of "/m" is not valid')

    folder = tmp_path / "adapter"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"a": mx.zeros((2, 2))})
    (folder / "adapter_config.json").write_text("{}")
    monkeypatch.setenv("HF_TOKEN", "hf_known")
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", refuses)
    assert main(["push", str(folder), "me/mine", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert f"the hub refuses README.md of {folder} (Invalid metadata" in said
    assert "set base_model" in said and said.count("\n") == 1
