"""Tests the files written by `doctor --report` and `bench --report`."""

import getpass
import json
import platform
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_segtrain.commands import main as cli
from mlx_segtrain.commands import reports
from mlx_segtrain.ops import bench, selfcheck

pytestmark = pytest.mark.acceptance

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, tmp_path):
    device = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_SEGTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reports, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(reports, "TOKENS_ON_CPU", 16)
    yield
    mx.set_default_device(device)


def read(kind, tmp_path):
    """Returns the report after checking that it contains no paths or names from this machine."""
    text = (tmp_path / f"mlx-segtrain-{kind}.json").read_text()
    for private in (str(tmp_path), str(Path.home()), platform.node(), str(Path(__file__).parent)):
        assert not private or private not in text
    assert f"/{getpass.getuser()}" not in text
    found = json.loads(text)
    assert found["mlx"] == selfcheck.MLX_VERSION and found["gpu"] is False
    assert found["device"] and found["system"] and found["interpreter"]
    return found


def test_doctor(monkeypatch, tmp_path, capsys):
    checks = [selfcheck.Check("rope", "halves", 1e-7, 1.0, 2.0)]
    monkeypatch.setattr(
        selfcheck, "examine", lambda: selfcheck.Report("M1", True, "0", "0", checks)
    )
    assert cli.main(["doctor", "--report", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["ok"] and "attach it to an issue" in said.err
    found = read("doctor", tmp_path)
    assert found["checks"] == [
        {"op": "rope", "case": "halves", "error": 1e-7, "ms": 1.0, "plain_ms": 2.0, "reason": ""}
    ]


def test_bench(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "measure_device", lambda: bench.Device(1.0, 2.0, 0.1))
    assert cli.main(["bench", "--only", "rms_norm", "--runs", "1", "--report"]) == 0
    assert "attach it to an issue" in capsys.readouterr().err
    found = read("bench", tmp_path)
    assert {x["op"] for x in found["ops"]} == {"rms_norm"}
    (step,) = found["steps"]
    assert step["model"] == "tiny" and step["tokens"] == 16
    assert 0 < step["ms"] < 1e5 and 0 < step["peak_gb"] < 10


def test_the_shapes_are_models():
    """The number of weights computed from each shape is close to the number in the model's name."""
    for name, millions in (("SmolLM2-135M", 135), ("MiniCPM5-1B", 1080)):
        made = REAL[name]
        width, heads = made["hidden_size"], made["num_attention_heads"]
        groups, d = made["num_key_value_heads"], made["head_dim"]
        layer = 2 * width * d * (heads + groups) + 3 * width * made["intermediate_size"]
        tables = made["vocab_size"] * width * (1 if made["tie_word_embeddings"] else 2)
        total = made["num_hidden_layers"] * layer + tables
        assert total == pytest.approx(millions * 1e6, rel=0.05)


REAL = dict(reports.MODELS)
