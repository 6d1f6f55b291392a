"""Cached tokens equal uncached ones, survive interruptions, and are computed only once."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace

import numpy as np
import psutil
import pytest

from lib import forks
from lib.endings import ended
from lib.folders import write_tokenizer
from mlx_segtrain import files as kept_files
from mlx_segtrain.commands.main import main
from mlx_segtrain.data import Options, cache, limits, load_dataset, workers
from mlx_segtrain.data.columns import Columns
from mlx_segtrain.data.encoding import Encoder, Pair, sequences
from mlx_segtrain.data.formats import checked, encode
from mlx_segtrain.data.sources import sources_of
from mlx_segtrain.errors import InputError, RunError
from mlx_segtrain.models import load_tokenizer


def says(n):
    return f"Answer {n}, with {'many ' * (n % 7)}words"


ROWS = {
    "messages": lambda n: {
        "messages": [
            {"role": "user", "content": f"Question {n}"},
            {"role": "assistant", "content": says(n) if n % 5 else "It ends in <|im_end|> here"},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "No", "weight": 0.5},
        ],
        "id": n,
    },
    "prompt-completion": lambda n: {"prompt": f"Question {n}", "completion": says(n)},
    "text": lambda n: {"text": says(n)},
    "kto": lambda n: {"prompt": f"Question {n}", "completion": says(n), "label": n % 3 > 0},
    "preference": lambda n: {"prompt": f"Question {n}", "chosen": says(n), "rejected": "No"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_tokenizer(path)
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Sets up an empty cache that stores even small data, in blocks of a few rows, and returns its
    folder."""
    monkeypatch.setenv("MLX_SEGTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALL", 0)
    monkeypatch.setattr(limits, "BLOCK", 1500)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def processes(monkeypatch):
    """Makes two processes tokenize even small data."""
    monkeypatch.setattr(cache, "LARGE", 0)
    monkeypatch.setattr(cache, "cores", lambda: 2)


@pytest.fixture
def forked(processes, monkeypatch):
    """Like `processes`, but forks the processes, so that they need not import the tokenizer's
    packages."""
    monkeypatch.setattr(workers.processes, "start_connected", forks.start_connected)


def write(folder, rows, name="train.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(form, count):
    return [ROWS[form](n) for n in range(count)]


def of(form, **how):
    return Options(method="dpo" if form == "preference" else "sft", val_split=0, **how)


def files(place):
    return {file.name: file.read_bytes() for file in place.glob("*/*.arrow")}


def assert_same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a.rows, b.rows, strict=True):
        assert one.source == other.source and type(one) is type(other)
        assert getattr(one, "shared", 0) == getattr(other, "shared", 0)
        for x, y in zip(sequences(one), sequences(other), strict=True):
            assert x.ids.tolist() == y.ids.tolist() and x.ids.dtype == y.ids.dtype
            assert x.weights.tolist() == y.weights.tolist()
            assert (x.source, x.findings) == (y.source, y.findings)
    for own in fields(Columns):
        assert np.array_equal(getattr(a.columns, own.name), getattr(b.columns, own.name)), own.name
    assert a.as_json() == b.as_json() and a.summary == b.summary


@pytest.mark.parametrize("part", [100, 50, 10])
@pytest.mark.parametrize("form", ROWS)
def test_the_same_data_from_the_cache_from_memory_and_row_by_row(
    tmp_path, tokenizer, model, kept, form, part
):
    """Cached data equals uncached data, even if rows are truncated to a length that only some rows
    exceed."""
    data = write(tmp_path / "data", rows_of(form, 90))
    plain, _ = load_dataset(data, tokenizer, of(form, max_seq_length=4096))
    how = of(form, max_seq_length=int(np.percentile(plain.columns.length, part)))
    plain, _ = load_dataset(data, tokenizer, how)
    for _ in range(2):  # the first pass writes the cache, the second reads it
        stored, _ = load_dataset(data, tokenizer, how, model)
        assert_same(stored, plain)
    assert len(files(kept)) > 2
    # Compare with an implementation that tokenizes, truncates and counts row by row, without
    # columns.
    encoder = Encoder(tokenizer, how)
    records = [checked(row, f"train.jsonl:{n}") for n, row in enumerate(rows_of(form, 90), 1)]
    whole = encode(encoder, records)
    from mlx_segtrain.data.dataset import shorten

    short = [shorten(row, encoder) for row in whole]
    short = [own for own in short if all(x.weights.any() for x in sequences(own[0]))]
    assert [row.source for row in plain.rows] == [own[0].source for own in short]
    assert plain.truncated == sum(own[1] for own in short)
    assert plain.prompts_cut == sum(own[2] for own in short)
    for row, (other, _, _) in zip(plain.rows, short, strict=True):
        for x, y in zip(sequences(row), sequences(other), strict=True):
            assert x.ids.tolist() == y.ids.tolist() and x.weights.tolist() == y.weights.tolist()
    expected = Columns.of([own[0] for own in short])
    for own in fields(Columns):
        found, wanted = getattr(plain.columns, own.name), getattr(expected, own.name)
        if own.name == "top":  # may be the id of a truncated token
            assert (found >= wanted).all()
        else:
            assert np.array_equal(found, wanted), own.name


@pytest.mark.acceptance
def test_processes_make_the_same_files(tmp_path, tokenizer, model, kept, processes, monkeypatch):
    data = write(tmp_path / "data", rows_of("messages", 200))
    told = []
    several, _ = load_dataset(data, tokenizer, of("messages"), model, told.append)
    made = files(kept)
    shares = [event["share"] for event in told]
    assert shares and shares == sorted(shares) and len(made) > 5
    for file in kept.glob("*/*"):
        file.unlink()
    monkeypatch.setattr(cache, "cores", lambda: 1)
    one, _ = load_dataset(data, tokenizer, of("messages"), model)
    assert files(kept) == made
    assert_same(several, one)


def test_what_the_key_depends_on(tmp_path, tokenizer, model, kept, monkeypatch):
    data = write(tmp_path / "data", rows_of("text", 3))
    source, _ = sources_of(data)

    def key(source=source, model=model, **how):
        return cache.key_of(source, tokenizer, Options(**how), model)

    first = key()
    # The key is independent of options that apply after tokenization, and of the files'
    # modification times and locations.
    os.utime(data / "train.jsonl", (1, 1))
    for other in (
        {"max_seq_length": 7},
        {"method": "dpo"},
        {"method": None},
        {"strict": True},
        {"val_split": 0.5},
        {"dedup": True},
        {"seed": 3},
        {"prompt_format": "chat"},  # auto selects this format here
    ):
        assert key(**other) == first, other
    moved = write(tmp_path / "moved", rows_of("text", 3))
    assert key(sources_of(moved)[0]) == first
    # The key depends on the other options, the rows, the name of their file, the tokenizer's files
    # and the versions of the code.
    found = [first]
    for other in (
        {"train_on": "last"},
        {"append_eos": False},
        {"prompt_format": "raw"},
        {"chat_template_kwargs": {"a": 1}},
        {"data_format": "text"},
        {"method": "grpo"},  # grpo reads only prompts
        {"columns": {"text": "body"}},
    ):
        found.append(key(**other))
    write(data, rows_of("text", 4))
    found.append(key(sources_of(data)[0]))
    write(data, rows_of("text", 3), "validation.jsonl")
    found.append(key(sources_of(data)[1]))  # row names contain the file name
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        other = tmp_path / f"model-{name}"
        other.mkdir()
        for file in model.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        with open(other / name, "a", encoding="utf-8") as file:
            file.write(" ")
        found.append(key(model=other))
    monkeypatch.setattr(cache, "_code", lambda: ["another version"])
    found.append(key())
    assert len(set(found)) == len(found)


def test_what_is_torn_is_made_again(tmp_path, tokenizer, model, kept):
    data = write(tmp_path / "data", rows_of("messages", 90))
    whole, _ = load_dataset(data, tokenizer, of("messages"), model)
    made = files(kept)
    victim = sorted(kept.glob("*/*.arrow"))[1]
    for harm in (
        lambda: victim.write_bytes(made[victim.name][:-100]),
        lambda: victim.write_bytes(made[victim.name][:-10] + b"0123456789"),
        lambda: victim.write_bytes(b""),
        lambda: victim.unlink(),
        lambda: (victim.parent / "about.json").write_text("{"),
        lambda: (victim.parent / "about.json").write_text('{"sizes": 3}'),
        lambda: (victim.parent / "about.json").unlink(),
    ):
        harm()
        again, _ = load_dataset(data, tokenizer, of("messages"), model)
        assert files(kept) == made
        assert_same(again, whole)


#: The script needs no `if __name__ == "__main__"`, because our worker processes do not import the
#: main program.
SCRIPT = """
import sys
from pathlib import Path
from mlx_segtrain.torchless import hide_torch
hide_torch()
from mlx_segtrain.data import Options, cache, limits, load_dataset
from mlx_segtrain.models import load_tokenizer
cache.SMALL = cache.LARGE = 0
cache.PACE_S = 0
cache.cores = lambda: 2
limits.BLOCK = 1500
load_dataset(Path(sys.argv[1]), load_tokenizer(sys.argv[2]), Options(val_split=0),
             Path(sys.argv[2]), lambda event: print(event["message"], flush=True))
print("done")
"""


def start(data, model):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(data), str(model)], stdout=subprocess.PIPE, text=True
    )
    return process, iter(process.stdout.readline, "")


@pytest.mark.acceptance
def test_what_is_interrupted_goes_on(tmp_path, tokenizer, model, kept):
    """Ctrl-C or a kill leaves no process running. The next run continues and creates the same files
    as an uninterrupted run."""
    data = write(tmp_path / "data", rows_of("messages", 2000))
    before = {}
    for how in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        process, lines = start(data, model)
        for _ in range(3):
            assert "tokenizing" in next(lines)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
        begun = time.monotonic()
        process.send_signal(how)
        process.wait(10)
        assert time.monotonic() - begun < 5  # bench/data.py measures this time on an idle machine
        assert ended(children, 2)
        last, before = before, {file: file.stat().st_ino for file in kept.glob("*/0*.arrow")}
        assert before.items() > last.items() and not list(kept.glob("*/about.json"))
    process, lines = start(data, model)
    assert [*lines][-1] == "done\n" and process.wait() == 0
    assert all(file.stat().st_ino == inode for file, inode in before.items())
    assert not list(kept.glob("*/.*"))  # no incomplete files
    continued = files(kept)
    for file in kept.glob("*/*"):
        file.unlink()
    load_dataset(data, tokenizer, Options(val_split=0), model)
    assert files(kept) == continued


@pytest.mark.acceptance
def test_a_process_that_is_killed_ends_the_run_in_a_sentence(
    tmp_path, tokenizer, model, kept, processes
):
    data = write(tmp_path / "data", rows_of("messages", 2000))

    def kill(event):
        for child in psutil.Process().children(recursive=True):
            if "mlx_segtrain.data.workers" in " ".join(child.cmdline()):
                child.kill()

    with pytest.raises(RunError, match=r"a tokenizing process was killed by SIGKILL: run the "):
        load_dataset(data, tokenizer, of("messages"), model, kill)
    load_dataset(data, tokenizer, of("messages"), model)


@pytest.mark.acceptance
def test_the_first_bad_row_is_told(tmp_path, tokenizer, model, kept, forked):
    rows = rows_of("messages", 200)
    rows[150], rows[60], rows[20] = {"messages": 3}, {"messages": 4}, {"other": 1}
    data = write(tmp_path / "data", rows)
    for line, message in ((21, "needs the keys"), (61, "must be a list"), (151, "must be a list")):
        with pytest.raises(InputError, match=rf"train\.jsonl:{line}: .*{message}"):
            load_dataset(data, tokenizer, of("messages"), model)
        assert not list(kept.glob("*/*.arrow"))  # rows are still invalid, so nothing is cached
        rows[line - 1] = ROWS["messages"](line)
        write(data, rows)
    rows[99] = ROWS["preference"](1)
    write(data, rows)
    with pytest.raises(InputError, match=r"train\.jsonl:100: the row has .* method sft does not"):
        load_dataset(data, tokenizer, of("messages"), model)
    with pytest.raises(
        InputError, match=r"train\.jsonl:100: preference pairs and other rows cannot be"
    ):
        load_dataset(data, tokenizer, replace(of("messages"), method=None), model)
    rows[99] = ROWS["messages"](1)
    (data / "train.jsonl").write_bytes(
        "".join(json.dumps(row) + "\n" for row in rows).encode() + b'{"text": "\xff"}\n'
    )
    with pytest.raises(
        InputError, match=r"train\.jsonl:201: byte 11 of the line is not valid UTF-8"
    ):
        load_dataset(data, tokenizer, of("messages"), model)


def test_tokens_are_of_no_method(tmp_path, tokenizer, model, kept):
    data = write(tmp_path / "data", rows_of("preference", 90))
    load_dataset(data, tokenizer, of("preference"), model)
    with pytest.raises(InputError, match=r"train\.jsonl:1: the row has .* method sft does not"):
        load_dataset(data, tokenizer, of("messages"), model)


def test_where_nothing_can_be_written_all_stays_in_memory(
    tmp_path, tokenizer, model, kept, monkeypatch
):
    data = write(tmp_path / "data", rows_of("messages", 90))
    plain, _ = load_dataset(data, tokenizer, of("messages"))
    told = []
    (tmp_path / "cache").write_text("a file in the place of the folder")
    stored, _ = load_dataset(data, tokenizer, of("messages"), model, told.append)
    assert_same(stored, plain)
    (tmp_path / "cache").unlink()

    class Full:  # simulates a full disk
        def __init__(self, *_):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers, "atomic", Full)
    stored, _ = load_dataset(data, tokenizer, of("messages"), model, told.append)
    assert_same(stored, plain)
    said = [event["message"] for event in told if event["type"] == "warning"]
    assert len(said) == 2 and "(No space left on device): they stay in memory" in said[1]


def test_two_at_once_make_one_folder(tmp_path, tokenizer, model, kept):
    data = write(tmp_path / "data", rows_of("messages", 400))
    plain, _ = load_dataset(data, tokenizer, of("messages"))
    got, told = [], []

    def load():
        got.append(load_dataset(data, tokenizer, of("messages"), model, told.append)[0])

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in got:
        assert_same(own, plain)
    assert any("another process" in event.get("message", "") for event in told)
    assert len(list(kept.glob("*/"))) == 1


def test_list_size_and_prune(tmp_path, tokenizer, model, kept, capsys):
    data = write(tmp_path / "data", rows_of("messages", 90))
    plain, _ = load_dataset(data, tokenizer, of("messages"))
    stored, _ = load_dataset(data, tokenizer, of("messages"), model)
    assert main(["cache"]) == main(["cache", "list", "--json"]) == main(["cache", "size"]) == 0
    said = capsys.readouterr().out
    (key,) = [place.name for place in kept.iterdir()]
    assert key in said and "train.jsonl" in said and model.name in said and "90" in said
    assert main(["cache", "prune", "--older", "1"]) == 0
    assert "removed 0 of 1" in capsys.readouterr().out
    assert main(["cache", "prune", "nothing"]) == 2
    # Hold the lock, as a process that is writing the cache does.
    with open(kept / key / "lock", "a", encoding="utf-8") as file:
        assert cache.lock(file)
        assert main(["cache", "prune", "--all"]) == 0
        assert f"{key} was not removed" in capsys.readouterr().out
    assert main(["cache", "prune", key]) == 0
    assert "removed 1 of 1" in capsys.readouterr().out
    assert not list(kept.iterdir())
    assert_same(stored, plain)  # the removed files are still memory-mapped
    assert isinstance(stored.rows[0], object) and not isinstance(stored.rows[0], Pair)
    assert main(["cache"]) == 0 and "no tokens are cached" in capsys.readouterr().out


def test_the_hash_of_a_large_file_is_remembered_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SEGTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_files, "REMEMBERED", 3)
    file = tmp_path / "rows"
    file.write_bytes(b"abcd")
    read = []
    plain = kept_files._sha256.__wrapped__
    monkeypatch.setattr(kept_files, "_sha256", lambda path, *_: read.append(path) or plain(path))
    right = hashlib.sha256(b"abcd").hexdigest()
    # The file was just written, so its hash is not cached.
    assert kept_files.known_sha256(file) == right
    now = time.time_ns()
    monkeypatch.setattr(kept_files.time, "time_ns", lambda: now + 10**10)
    assert [kept_files.known_sha256(file) for _ in range(3)] == [right] * 3
    assert len(read) == 2
    before = file.stat()
    file.write_bytes(b"abce")  # same size and, below, same modification time
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert kept_files.known_sha256(file) == hashlib.sha256(b"abce").hexdigest()
    for note in (tmp_path / "cache" / "hashes").iterdir():
        note.write_text("{}")
    assert kept_files.known_sha256(file) == hashlib.sha256(b"abce").hexdigest()
    file.write_bytes(b"ab")  # hashes of small files are not cached
    assert kept_files.known_sha256(file) == hashlib.sha256(b"ab").hexdigest()
