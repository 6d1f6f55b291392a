"""Tests the list of adapters, their model cards, and the commands that convert them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.checks import needs_router_gradient
from lib.folders import write_llama, write_tiny
from lib.runs import config_of
from mlx_segtrain import InputError, train
from mlx_segtrain.adapters.conversion import export
from mlx_segtrain.adapters.discovery import adapters
from mlx_segtrain.training import curves


def run(*argv):
    command = [sys.executable, "-m", "mlx_segtrain.commands.main", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def root(llama_mixed, data, tmp_path_factory):
    """Returns a folder with a run, its best adapter and checkpoints, an export, and a damaged
    adapter."""
    root = tmp_path_factory.mktemp("adapters")
    options = {"iters": 4, "steps_per_eval": 2, "keep_best": True, "save_checkpoints": True}
    train(config_of(llama_mixed, data, root / "one", **options))
    export(root / "one", root / "more" / "peft", "peft", names="text")
    (root / "broken").mkdir()
    (root / "broken" / "adapters.safetensors").write_bytes(b"not one")
    (root / "nothing").mkdir()
    return root


def test_all_that_is_there(root, llama_mixed, tmp_path):
    found = {str(own.path.relative_to(root)): own for own in adapters([root], llama_mixed)}
    assert {name.split("-val")[0] for name in found} == {
        "one", "one/best", "one/checkpoints/step-00002", "one/checkpoints/step-00004",
        "more/peft", "broken",
    }  # fmt: skip
    one = found["one"]
    assert one.ranks == [4, 8] and one.linears == 21 and one.step == 4 and one.fits is True
    assert one.scale == found["more/peft"].scale == 1.0
    assert one.base == str(llama_mixed) and one.kind == "LoRA"
    vals = curves.points(curves.metrics(root / "one" / "metrics.jsonl"))["val"]
    assert one.best_loss == min(loss for _, loss in vals)
    assert found["more/peft"].fits is True and found["more/peft"].step is None
    assert "adapter_config.json" in found["broken"].fault and found["broken"].fits is None
    other = write_llama(tmp_path / "other", bits=4, hidden_size=96)
    assert {own.fits for own in adapters([root / "one"], other)} == {False}
    assert adapters([root / "nothing"]) == []
    with pytest.raises(InputError, match="is not a folder"):
        adapters([root / "nowhere"])


def test_embeddings_and_experts_fit_too(data, tmp_path):
    needs_router_gradient()
    moe = write_tiny(tmp_path / "moe", "qwen3_moe")
    train(config_of(moe, data, tmp_path / "a", target_modules=["up_proj", "q_proj"], iters=1))
    tied = write_llama(tmp_path / "tied", bits=4)
    train(config_of(tied, data, tmp_path / "b", target_modules=["embed_tokens"], iters=1))
    assert [own.fits for own in adapters([tmp_path / "a"], moe)] == [True]
    assert [own.fits for own in adapters([tmp_path / "b"], tied)] == [True]
    assert [own.fits for own in adapters([tmp_path / "a"], tied)] == [False]


def test_the_list(root, llama_mixed):
    done = run("adapters", root, "--model", llama_mixed)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (line,) = (line for line in lines if line.split()[:1] == [str(root / "one")])
    assert line.split()[1:4] == [llama_mixed.name, "LoRA", "4,"] and line.split()[-1] == "yes"
    assert any(line.startswith("left out: ") and "broken" in line for line in lines)
    listed = json.loads(run("adapters", "--json", root).stdout)
    assert len(listed) == 6 and listed[0]["path"].startswith(str(root))
    assert "no adapters found" in run("adapters", root / "nothing").stdout


def test_the_card(root, llama_mixed, data):
    text = (root / "one" / "README.md").read_text()
    assert text.startswith(f"---\nbase_model: {llama_mixed}\nlibrary_name: mlx\n")
    sha = json.loads((root / "one" / "run.json").read_text())["inputs"]["data/train.jsonl"]
    assert f"{data} (train.jsonl {sha[:16]})" in text
    vals = curves.points(curves.metrics(root / "one" / "metrics.jsonl"))["val"]
    assert f"| validation loss | {vals[0][1]:.4f} -> {vals[-1][1]:.4f} |" in text
    assert "| rank | 4 (18 layers), 8 (3 layers) |" in text and "| step | 4 |" in text
    assert "| learning rate | 0.01 |" in text and "--to peft" in text
    for folder in (root / "one" / "best", root / "more" / "peft"):
        assert (folder / "README.md").read_text().startswith("---\nbase_model: ")


def test_curves(root, tmp_path):
    log = shutil.copy(root / "one" / "metrics.jsonl", tmp_path / "metrics.jsonl")
    files = curves.draw(log, "a & b")
    assert [file.name for file in files] == ["loss.png", "loss.svg"]
    assert files[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "a &amp; b" in files[1].read_text() and "held out" in files[1].read_text()
    points = curves.points(curves.metrics(log))
    assert [step for step, _ in points["train"]] == [1, 2, 3, 4]
    assert [step for step, _ in points["val"]] == [0, 2, 4]
    line = json.dumps({"type": "sample", "prompt": "a\u2028b\x85c"}, ensure_ascii=False)
    log.write_text(f"{line}\n{log.read_text()}", encoding="utf-8")
    assert curves.points(curves.metrics(log)) == points
    (tmp_path / "metrics.jsonl").write_text("")
    curves.draw(log, "nothing yet")


def test_a_relative_base_is_recorded_with_its_folder(llama_mixed, data, tmp_path, monkeypatch):
    """Commands in the card work in every folder."""
    shutil.copytree(llama_mixed, tmp_path / "my models" / "m")
    monkeypatch.chdir(tmp_path)
    train(config_of(Path("my models/m"), data, tmp_path / "a", iters=1))
    text = (tmp_path / "a" / "README.md").read_text()
    base = tmp_path / "my models" / "m"
    assert f"base_model: {base}\n" in text and f"generate --model '{base}' --adapter-path ." in text


def test_the_commands(root, llama_mixed, data, tmp_path):
    """Exports a run to PEFT, re-imports it, and merges adapters with each other and into the base
    model."""
    done = run(
        "export", root / "one", "--to", "peft", "--names", "text", "--out", tmp_path / "peft"
    )
    assert done.returncode == 0 and "differs by at most" in done.stdout, done.stderr
    done = run("import", tmp_path / "peft", "--out", tmp_path / "back", "--json")
    assert json.loads(done.stdout)["linears"] == 21
    both = [root / "one", tmp_path / "back"]
    how = ["--model", llama_mixed, "--weights", "0.5", "0.5"]
    done = run("merge", *both, *how, "--out", tmp_path / "sum")
    assert done.returncode == 0 and "of rank 8, 16" in done.stdout, done.stderr
    done = run("merge", tmp_path / "sum", "--into", llama_mixed, "--out", tmp_path / "m", "--json")
    report = json.loads(done.stdout)
    assert len(report["linears"]) == 21 and {own["bits"] for own in report["linears"]} == {4, 8}
    done = run("eval", "--model", tmp_path / "m", "--data", data, "--max-seq-length", "100")
    assert done.returncode == 0
    done = run("export", root / "one", "--to", "peft", "--out", tmp_path / "peft")
    assert done.returncode == 2 and "already exists" in done.stderr
    done = run("merge", root / "one", "--bits", "4", "--out", tmp_path / "x")
    assert done.returncode == 2 and "no effect without --into MODEL" in done.stderr
    into = ["--into", llama_mixed, "--model", llama_mixed, "--out", tmp_path / "x"]
    done = run("merge", root / "one", *into)
    assert done.returncode == 2 and "--model has no effect with --into" in done.stderr
    done = run("merge", root / "broken", "--out", tmp_path / "x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_the_train_command_draws_its_curves(llama4, data, tmp_path):
    argv = ["--model", llama4, "--data", data, "--adapter-path", tmp_path / "a"]
    done = run("train", *argv, "--iters", "2", "--max-seq-length", "100")
    assert done.returncode == 0, done.stderr
    assert {"loss.png", "loss.svg", "metrics.json", "README.md"} <= {
        path.name for path in (tmp_path / "a").iterdir()
    }
