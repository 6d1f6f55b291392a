"""For bad input, the command prints one sentence, exits with code 2, and writes nothing."""

import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_segtrain import InputError
from mlx_segtrain.adapters import read_adapter
from mlx_segtrain.commands import main as cli
from mlx_segtrain.config import flag
from mlx_segtrain.models import _reading, chain_of, load_base


@pytest.fixture
def world(tmp_path, llama4, data):
    """Returns a folder with valid inputs for a run. Each test breaks one of them."""
    shutil.copytree(llama4, tmp_path / "model")
    shutil.copytree(data, tmp_path / "data")
    return tmp_path


def flags(world, **changes):
    values = {
        "model_dir": world / "model",
        "data_dir": world / "data",
        "adapter_path": world / "out",
        "iters": 1,
        **changes,
    }
    argv = ["train"]
    for key, value in values.items():
        argv += [
            flag(key),
            *(value if isinstance(value, list) else [str(value)]),
        ]
    return argv


def exit_code(argv):
    """Returns the command's exit code, even if argparse raises SystemExit."""
    try:
        return cli.main(argv)
    except SystemExit as exit:
        return exit.code


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def spoil_row(text):
    return lambda world: (world / "data" / "train.jsonl").write_text(
        (world / "data" / "train.jsonl").read_text() + text + "\n"
    )


LINE = "train.jsonl:25"
CASES = {
    "model folder missing": (lambda w: shutil.rmtree(w / "model"), {}, "model is not a folder"),
    "model folder empty": (lambda w: empty(w / "model"), {}, "contains no config.json"),
    "no weights": (lambda w: (w / "model/model.safetensors").unlink(), {}, "no weights to load"),
    "torn weights": (
        lambda w: (w / "model/model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}"),
        {},
        "is not a readable safetensors file",
    ),
    "config is not JSON": (
        lambda w: (w / "model/config.json").write_text("{"),
        {},
        "cannot be loaded",
    ),
    "unknown architecture": (
        lambda w: (w / "model/config.json").write_text('{"model_type": "nothing"}'),
        {},
        "nothing",
    ),
    "a model that brings a program": (
        lambda w: (w / "model/config.json").write_text('{"model_file": "mine.py"}'),
        {},
        "specifies its own model code",
    ),
    "data folder missing": (lambda w: shutil.rmtree(w / "data"), {}, "data"),
    "data folder empty": (lambda w: empty(w / "data"), {}, "train.jsonl"),
    "data file empty": (lambda w: (w / "data/train.jsonl").write_text(""), {}, "train.jsonl"),
    "row is not JSON": (spoil_row("{'messages': 1"), {}, LINE),
    "row has no known keys": (spoil_row('{"question": "?"}'), {}, LINE),
    "no supervised token": (
        lambda w: (w / "data/train.jsonl").write_text(
            json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n"
        ),
        {},
        "train",
    ),
    "unknown target": (None, {"target_modules": ["k_proj", "kk_proj"]}, "kk_proj"),
    "rank out of range": (None, {"rank": 1}, "rank"),
    "learning rate out of range": (None, {"learning_rate": 0}, "learning_rate"),
    "not a number": (None, {"iters": "many"}, "iters"),
    "sequence over the model's": (None, {"max_seq_length": 129}, "context length of 128 tokens"),
    "more layers than there are": (None, {"num_layers": 4}, "the model has 3"),
    "batch larger than the data": (None, {"batch_size": 25}, "batch_size"),
    "adapter path is a file": (lambda w: (w / "out").write_text("x"), {}, "is a file"),
}


@pytest.mark.parametrize("spoil,changes,says", CASES.values(), ids=CASES)
def test_one_sentence_exit_code_2_nothing_written(world, capsys, spoil, changes, says):
    if spoil:
        spoil(world)
    before = sorted(world.rglob("*"))
    changes = {"max_seq_length": 100, **changes}
    code = exit_code(flags(world, **changes))
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1, printed
    assert says in lines[0] and "Traceback" not in printed.err
    assert sorted(world.rglob("*")) == before


def test_an_unknown_field_in_yaml(world, capsys):
    (world / "run.yaml").write_text("iters: 1\nlearningrate: 0.1\n")
    assert exit_code([*flags(world), "--config", str(world / "run.yaml")]) == 2
    assert "learning_rate" in capsys.readouterr().err
    assert not (world / "out").exists()


def test_a_finished_run_is_not_overwritten(world, capsys):
    argv = flags(world, max_seq_length=100)
    assert cli.main(argv) == 0
    files = {p: p.read_bytes() for p in (world / "out").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert cli.main(argv) == 2
    assert "already contains a run" in capsys.readouterr().err
    assert files == {p: p.read_bytes() for p in (world / "out").rglob("*") if p.is_file()}
    assert cli.main([*argv, "--overwrite", "--seed", "1"]) == 0
    weights = world / "out" / "adapters.safetensors"
    assert weights.read_bytes() != files[weights]


def test_adapters_that_do_not_fit(world, llama):
    assert cli.main(flags(world, max_seq_length=100)) == 0
    model, _, _ = load_base(llama)
    chain = chain_of(model)
    out = world / "out"
    read_adapter(out, chain)
    weights = out / "adapters.safetensors"
    good = mx.load(str(weights))
    name = "model.layers.0.self_attn.q_proj"

    def says(tensors, message):
        mx.save_safetensors(str(weights), tensors)
        with pytest.raises(InputError, match=message):
            read_adapter(out, chain)

    says({**good, "model.layers.9.x.lora_a": mx.ones((2, 2))}, "x' has lora_a but no lora_b")
    says({**good, f"{name}.lora_a": mx.ones((9, 8))}, r"lora_a of shape \(9, 8\) .*another model")
    says({k: v for k, v in good.items() if k != f"{name}.lora_b"}, "no lora_b")
    says({k: v for k, v in good.items() if k != f"{name}.lora_a"}, "but no lora_a")
    weights.write_bytes(b"not a file of tensors")
    with pytest.raises(InputError, match="not a readable safetensors"):
        read_adapter(out, chain)
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"lora_parameters\.scale"):
        read_adapter(out, chain)


@pytest.mark.parametrize(
    "stub,says",
    [
        (
            "raise ImportError('libmlx.so: cannot open shared object file')",
            "its backend for this machine is missing",
        ),
        (None, "was built for mlx 0.32.4, but mlx 0.1.0 is installed"),
    ],
)
def test_import_without_the_right_mlx_is_one_sentence(tmp_path, stub, says):
    """A fake mlx package shadows the real one. The fake package either lacks its native library
    or has the wrong version."""
    dist = tmp_path / "mlx-0.1.0.dist-info"
    if stub:
        (tmp_path / "mlx").mkdir()
        (tmp_path / "mlx" / "core.py").write_text(stub)
    else:
        dist.mkdir()
        (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx\nVersion: 0.1.0\n")
    done = subprocess.run(
        [sys.executable, "-c", "import mlx_segtrain"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and says in last and 'pip install "mlx-segtrain[cpu]"' in last


def test_a_signal_while_a_file_is_opened_is_no_fault_of_the_file(tmp_path):
    """If Ctrl-C arrives inside contextlib's code, Python closes the generator. Closing it must not
    raise InputError."""
    reading = _reading(tmp_path)
    reading.__enter__()
    reading.gen.close()
