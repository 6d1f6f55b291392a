"""Tests that the server, `train` and `inspect` limit the memory and time that they spend on a
hostile file."""

import json
import os
import resource
import struct
import subprocess
import sys
import time

import pytest

from lib.folders import write_llama, write_rows
from mlx_segtrain import InputError
from mlx_segtrain.adapters.discovery import look
from mlx_segtrain.data.sources import rows_of, source_of
from mlx_segtrain.models import load_model, load_tokenizer
from mlx_segtrain.models.headers import read_shape
from mlx_segtrain.safetensors import read_header
from mlx_segtrain.serving import catalog

#: The maximum memory of a command in bytes, not counting its libraries.
ROOM = 3 << 30


def segtrain(*args, seconds=60):
    """Runs a command with limited memory, and returns its exit code and standard error."""

    def confined():
        resource.setrlimit(resource.RLIMIT_DATA, (ROOM, ROOM))

    command = [sys.executable, "-m", "mlx_segtrain.commands.main", *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, preexec_fn=confined
    )
    return done.returncode, done.stderr


def changed(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def model(tmp_path):
    return write_llama(tmp_path / "model")


def huge_row(path):
    """Writes a line of 400 MB as a sparse file."""
    path.mkdir()
    with open(path / "train.jsonl", "wb") as file:
        file.write(b'{"text": "')
        file.truncate(400 << 20)
    return path


def test_a_line_of_400_mb_and_one_without_an_end(tmp_path, model):
    data = huge_row(tmp_path / "data")
    for command in (["inspect", data], ["inspect", data, "--model", model]):
        code, said = segtrain(*command)
        assert code == 2 and "train.jsonl:1: the row is larger than 16 MiB" in said, said
    os.unlink(data / "train.jsonl")
    os.mkfifo(data / "train.jsonl")
    begun = time.monotonic()
    with pytest.raises(InputError, match="it is not a regular file"):
        next(rows_of(source_of(data / "train.jsonl")))
    assert time.monotonic() - begun < 1


def test_training_takes_no_such_line_either(tmp_path, model):
    data = huge_row(tmp_path / "data")
    args = ["--model", model, "--data", data, "--adapter-path", tmp_path / "out"]
    code, said = segtrain("train", *args)
    assert code == 2 and "the row is larger than 16 MiB" in said, said


def header(file, text):
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def test_600_000_names_of_tensors(tmp_path):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = ",".join(f'"a{i}":{entry}' for i in range(500_000))
    header(tmp_path / "x.safetensors", f"{{{names}}}".encode())
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"names more than 100,000 tensors|too long"):
        read_header(tmp_path / "x.safetensors")
    header(tmp_path / "x.safetensors", b'{"a":[' + b"0," * 4_000_000 + b"0]}")
    with pytest.raises(InputError, match="is too large for its number of tensors"):
        read_header(tmp_path / "x.safetensors")
    assert time.monotonic() - begun < 3


NUMBERS = ("num_hidden_layers", "n_layer", "num_local_experts", "num_loops", "hc_sinkhorn_iters")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("inner", [False, True])
def test_a_thousand_million_layers(name, inner, model):
    value = {name: 10**9}
    changed(model / "config.json", **({"text_config": value} if inner else value))
    begun = time.monotonic()
    with pytest.raises(InputError, match=f"{name} is 1,000,000,000, but"):
        load_model(model)
    assert time.monotonic() - begun < 2


def test_numbers_of_a_configuration_that_are_loops_of_the_planner(model):
    changed(model / "config.json", model_type="gemma3_text", num_kv_shared_layers=10**9)
    with pytest.raises(InputError, match="num_kv_shared_layers is 1000000000"):
        read_shape(model)
    changed(model / "config.json", num_kv_shared_layers=0, sliding_window_pattern=0)
    with pytest.raises(InputError, match="does not match the weights"):
        read_shape(model)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "special_tokens_map.json"]
)
def test_a_pipe_in_a_model_s_folder(name, model):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    begun = time.monotonic()
    with pytest.raises(InputError, match="is not a regular file"):
        load_tokenizer(model)
    assert time.monotonic() - begun < 1


def test_pipes_where_the_server_looks(tmp_path):
    for folder, names in (
        ("model", ("config.json", "tokenizer_config.json", "model.safetensors")),
        ("adapter", ("adapters.safetensors", "adapter_config.json", "metrics.jsonl")),
        ("data", ("train.jsonl",)),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            os.mkfifo(tmp_path / folder / name)
    good = write_llama(tmp_path / "good")
    write_rows(tmp_path / "rows")
    begun = time.monotonic()
    assert [x.path for x in catalog.models([tmp_path])] == [str(good)]
    assert [x.path for x in catalog.datasets([tmp_path])] == [str(tmp_path / "rows")]
    assert catalog.adapters([tmp_path], None) == []
    assert look(tmp_path / "adapter").fault is not None
    assert time.monotonic() - begun < 3


def test_a_configuration_that_is_too_large(model):
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text + " " * (5 << 20))
    for read in (load_model, load_tokenizer, read_shape):
        with pytest.raises(InputError, match="larger than 4 MiB"):
            read(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "BertTokenizer", "vocab": "SECRET"},
        {"tokenizer_class": "BartTokenizer", "vocab": "SECRET", "merges": "SECRET"},
        {"tokenizer_class": "LlamaTokenizer", "sp_model_kwargs": {"model_file": "SECRET"}},
        {"tokenizer_class": "BertTokenizer", "init_inputs": ["SECRET"]},
        {"tokenizer_class": "BertTokenizer", "vocab": "/proc/self/environ"},
    ],
    ids=["vocab", "merges", "nested", "by position", "environment"],
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_of_files_that_lie_elsewhere(settings, name, tmp_path):
    """A tokenizer must not use a secret file as its vocabulary. Each line of the file would become
    a token, so responses could contain the secret."""
    secret = tmp_path / "secret"
    secret.write_text("a\n,\nb\n[UNK]\n")
    model = write_llama(tmp_path / "model")
    load_tokenizer(model)
    (model / "tokenizer.json").unlink()
    text = json.dumps(settings).replace("SECRET", str(secret))
    (model / name).write_text(text)
    with pytest.raises(InputError, match=r"names a file outside the model|init_inputs"):
        load_tokenizer(model)


def test_a_tokenizer_may_name_files_of_its_maker(tmp_path):
    model = write_llama(tmp_path / "model")
    file = model / "tokenizer_config.json"
    more = {
        "tokenizer_file": "/home/maker/tokenizer.json",
        "vocab_file": str(model / "config.json"),
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **more, "cls_token": "/"}))
    assert load_tokenizer(model).encode("Hello")
