"""Tests data sets given by their hub names: the choice of a repository's files, interrupted
downloads, and offline use."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.runs import config_of
from mlx_segtrain import InputError, train
from mlx_segtrain import hub as hubs
from mlx_segtrain.commands.main import main
from mlx_segtrain.data.sources import rows_of, sources_of


@pytest.fixture
def home(tmp_path, monkeypatch, hub, cache):
    """Sets HF_ENDPOINT to the local hub and HF_HOME to a new folder. Returns this folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    return tmp_path / "hf"


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(*texts):
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), sink)
    return sink.getvalue()


def texts(source):
    return source and [row["text"] for _, row in rows_of(source)]


def found(name, **how):
    """Returns the texts of a data set's training and validation rows."""
    return tuple(map(texts, sources_of(name, **how)))


CARD = b"""---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: data/train_sft-*
  - split: test_sft
    path: "data/test_sft-*"
  - split: train_gen
    path: [data/train_gen-*]
- config_name: small
  data_files: {train: "small/*.jsonl", val: "small/dev/**"}
---
# A data set
"""
CHAT = {
    "README.md": CARD,
    "data/train_sft-00000-of-00002.parquet": parquet("a", "b"),
    "data/train_sft-00001-of-00002.parquet": parquet("c"),
    "data/test_sft-00000-of-00001.parquet": parquet("v"),
    "data/train_gen-00000-of-00001.parquet": parquet("g"),
    "small/one.jsonl": lines("s"),
    "small/dev/two.jsonl": lines("t"),
}


@pytest.fixture
def chat(hub, home):
    return hub.add("org/chat", CHAT, "datasets")


@pytest.mark.parametrize(
    ("name", "training", "validation"),
    [
        ("org/chat", ["a", "b", "c"], ["v"]),
        ("org/chat:train_gen", ["g"], None),
        ("org/chat/small", ["s"], ["t"]),
        ("org/chat@main/small:val", ["t"], None),
    ],
)
def test_the_card_says_which_files(chat, hub, name, training, validation):
    assert found(name) == (training, validation)
    asked = [file for file in hub.files_asked() if file != "README.md"]
    # No other files are requested.
    assert len(asked) == {"org/chat": 3, "org/chat/small": 2}.get(name, 1)


@pytest.mark.parametrize(
    ("files", "training", "validation"),
    [
        ({"train.jsonl": lines("a"), "test.jsonl": lines("b"), "dev.jsonl": lines("c")}, "a", "c"),
        ({"data/train-00000-of-00001.parquet": parquet("a")}, "a", None),
        ({"x/training/1.csv": b"text\na\n", "x/eval/1.csv": b"text\nb\n"}, "a", "b"),
        ({"my_rows.json": b'[{"text": "a"}]', "dataset_infos.json": b"{}"}, "a", None),
        ({"one.jsonl": lines("a"), "two.jsonl": lines("b"), "two.csv": b"text\nb\n"}, "ab", None),
        ({"README.md": b"---\n: [\n---\n", "train.jsonl.gz": None}, "a", None),
        ({"README.md": b"---\nconfigs: 3\n---\n", "train_v2.jsonl": lines("a")}, "a", None),
    ],
)
def test_their_names_say_which_files(hub, home, files, training, validation):
    import gzip

    files = {name: gzip.compress(lines("a")) if x is None else x for name, x in files.items()}
    hub.add("org/rows", files, "datasets")
    told = []
    train, valid = found("org/rows", tell=told.append)
    assert "".join(train) == training and valid == (validation and [validation])
    assert told[-1]["message"].startswith("org/rows: training rows come from its split train")


def test_the_hubs_own_copies_where_a_program_makes_the_rows(hub, home):
    hub.add("org/old", {"old.py": b"raise SystemExit", "README.md": b"x"}, "datasets")
    with pytest.raises(InputError, match="no files in a supported format"):
        sources_of("org/old")
    copies = {"en/train/0000.parquet": parquet("a"), "en/test/0000.parquet": parquet("b")}
    copies["de/partial-train/0000.parquet"] = parquet("c")
    hub.add("org/old", copies, "datasets", branch="refs/convert/parquet")
    assert found("org/old/en") == (["a"], ["b"]) and found("org/old/de") == (["c"], None)
    with pytest.raises(
        InputError, match=r"several configurations: pick one of de or en, as in org/old/"
    ):
        sources_of("org/old")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("org/none", "neither a path nor a dataset on the hub"),
        ("org/chat/huge", "has no configuration 'huge'; use default or small"),
        ("org/chat:dev", "has no split dev; use train_sft, test_sft or train_gen"),
        ("org/chat@v9", "has no revision v9"),
        ("org/odd", "no split called train: pick one of one or two, as in org/odd:one"),
    ],
)
def test_what_cannot_be_had(chat, hub, name, reason):
    odd = {f"{x}-00000-of-00001.parquet": parquet("a") for x in ("one", "two")}
    hub.add("org/odd", odd, "datasets")
    with pytest.raises(InputError, match=reason):
        sources_of(name)


def test_a_download_that_is_broken_off_is_continued_and_then_needs_no_hub(hub, home, monkeypatch):
    many = {"train.jsonl": lines(*(str(i) * 50 for i in range(2000))), "valid.jsonl": lines("v")}
    hub.add("org/rows", many, "datasets")

    class Stop(BaseException):
        pass

    def stop(event):
        if event.get("share", 0) > 0.4:
            raise Stop

    monkeypatch.setattr(hubs, "TELL_S", 0)
    with pytest.raises(Stop):
        sources_of("org/rows", tell=stop)
    assert len(found("org/rows")[0]) == 2000
    assert [given for _, _, given in hub.requests if given]
    hub.requests.clear()
    first = sources_of("org/rows")[0].fingerprint()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sources_of("org/rows")[0].fingerprint() == first and not hub.requests
    with pytest.raises(InputError, match="is incomplete"):
        sources_of("org/other")
    with pytest.raises(InputError, match="this command downloads nothing"):
        sources_of("org/other", ask=False)


def test_a_run_stays_with_its_revision(chat, hub, home, llama4, tmp_path, capsys):
    config = config_of(llama4, "org/chat", tmp_path / "a", iters=2)
    assert train(config).steps == 2
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["hub"] == {"data": f"org/chat@{chat.commit}"}
    other = hub.add("org/chat", {"README.md": b"", "train.jsonl": lines("other")}, "datasets")
    refs = home / "hub" / "datasets--org--chat" / "refs"
    (refs / "main").write_text(other.commit)
    hub.repositories["datasets", "org/chat"].branches["old"] = chat
    assert train(config.model_copy(update={"iters": 3, "resume": True})).steps == 3
    again = json.loads((tmp_path / "a" / "run.json").read_text())
    assert again["inputs"] == record["inputs"] and again["hub"] == record["hub"]
    # The newer commit lacks this configuration.
    assert main(["inspect", "org/chat/small", "--json"]) == 2
    assert main(["inspect", f"org/chat@{chat.commit}/small"]) == 0
    assert "rows     1 to train, 1 to validate" in capsys.readouterr().out


def test_patterns_of_strangers_take_no_time(hub, home):
    bad = b"---\nconfigs:\n- data_files: '" + b"*a" * 400 + b"b'\n---\n"
    hub.add("org/bad", {"README.md": bad, "a" * 200 + ".jsonl": lines("a")}, "datasets")
    with pytest.raises(InputError, match="no files in a supported format"):
        sources_of("org/bad")
