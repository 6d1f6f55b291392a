"""The recipes run as described in their comments."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from lib.folders import write_llama, write_tiny
from mlx_segtrain.commands.demo import snapshot
from mlx_segtrain.commands.demo.sums import write_sums
from mlx_segtrain.files import cache_dir

pytestmark = pytest.mark.acceptance

RECIPES = Path(__file__).parents[1] / "recipes"
_spec = importlib.util.spec_from_file_location("tasks", RECIPES / "tasks.py")
tasks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tasks)


def run(script, *args, **knobs):
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLX_")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return subprocess.run(
        [RECIPES / script, *args],
        env={**env, **{key: str(value) for key, value in knobs.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def e4b(tmp_path_factory):
    """Writes a tiny multimodal Gemma 4 with 4-bit and 8-bit layers and an OptiQ metadata file."""
    eight = ("down_proj", "v_proj", "embed_tokens")
    path = write_tiny(
        tmp_path_factory.mktemp("e4b"), "gemma4", lambda name: 8 if name.endswith(eight) else 4
    )
    layers = json.loads((path / "config.json").read_text())["quantization"]
    kl = {name: {**spec, "kl": 0.1} for name, spec in layers.items() if isinstance(spec, dict)}
    (path / "optiq").mkdir()
    (path / "optiq" / "metadata.json").write_text(json.dumps({"per_layer": kl}))
    return path


@pytest.fixture(scope="module")
def llama_long(tmp_path_factory):
    """Writes a tiny Llama with a context length of 8192 tokens."""
    path = tmp_path_factory.mktemp("long") / "llama"
    return write_llama(path, layers=2, max_position_embeddings=8192)


def test_chunk_finetune_of_smollm2(tmp_path, data):
    knobs = {
        "MODEL": snapshot.smollm2_snapshot(cache_dir()),
        "DATA": data,
        "ADAPTER": tmp_path / "a",
    }
    done = run("chunk.sh", SEQ=64, SEG=4, RANK=4, EVAL_EVERY=1, **knobs)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "a" / "metrics.json").read_text())["config"]
    wanted = {"iters": 2, "learning_rate": 1e-5, "scale": 20.0, "batch_size": 1, "method": "sft"}
    wanted |= {"steps_per_report": 1, "save_checkpoints": True, "grad_checkpoint": False}
    wanted |= {"max_seq_length": 64, "segment_size": 4, "rank": 4, "steps_per_eval": 1}
    assert {key: config[key] for key in wanted} == wanted
    assert len(list((tmp_path / "a" / "checkpoints").iterdir())) == 2
    again = run("chunk.sh", **knobs)
    assert again.returncode == 2 and "already contains a run" in again.stderr


@pytest.mark.parametrize("task", ["chunk", "tools", "persona"])
def test_the_right_answers_have_the_full_score(task, tmp_path):
    tasks.main(task, tmp_path)
    prompts = {}
    for name, count in tasks.ROWS.items():
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
        assert len(rows) == count
        prompts[name] = {row["prompt"] for row in rows}
        answers = [row["completion"] for row in rows]
        given = {} if task == "persona" else {"completion": answers}
        assert getattr(tasks, task)(answers, **given) == [100.0] * count
        assert max(getattr(tasks, task)(["[]"] * count, **given)) <= 20
    assert not prompts["train"] & prompts["valid"]


def test_a_task_is_scored_before_and_after(llama_long, tmp_path):
    tasks.main("persona", tmp_path / "data")
    for name in tasks.ROWS:  # a few rows suffice
        file = tmp_path / "data" / f"{name}.jsonl"
        file.write_text("".join(file.read_text().splitlines(True)[:2]))
    knobs = {"MODEL": llama_long, "ADAPTER": tmp_path / "a", "DATA": tmp_path / "data"}
    few = ("--batch-size", "1", "--warmup-iters", "0")
    done = run("task.sh", "persona", *few, ITERS=1, RANK=2, **knobs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 completions of each of 2 prompts") == 2
    assert "Before training:" in done.stdout and "After training:" in done.stdout


def test_scores_have_their_parts():
    wanted = [json.dumps([{"topic": "trip", "anchor": "a b c d"}, {"topic": "x", "anchor": "e"}])]
    half = json.dumps([{"topic": "trip", "anchor": "a b c d"}])
    assert tasks.chunk([half], wanted) == [50 + 50 * 2 / 3]
    assert tasks.chunk(['[{"topic": 1}]', "no JSON"], wanted * 2) == [20.0, 0.0]
    call = ['{"name": "alarm", "arguments": {"hour": 7}}']
    assert tasks.tools(['{"name": "alarm", "arguments": {"hour": 8}}'], call) == [60.0]
    assert tasks.persona(["Ahoy! " + "a " * 40]) == [40.0]


def test_feedback_becomes_pairs_and_labels(tmp_path):
    (tmp_path / "feedback.csv").write_text(
        "prompt,answer,good\nA,right,true\nA,wrong,false\nA,bad,no\nB,fine,yes\nC,so-so,1\nC,so-so,0\n"
    )
    write = [sys.executable, RECIPES / "feedback.py", tmp_path / "feedback.csv", tmp_path / "out"]
    said = subprocess.run(write, check=True, capture_output=True, text=True).stdout
    assert "left out: 1 pairs of equal answers" in said
    read = {
        name: [json.loads(line) for line in (tmp_path / "out" / name / "train.jsonl").open()]
        for name in ("pairs", "labels")
    }
    assert read["pairs"] == [
        {"prompt": "A", "chosen": "right", "rejected": text} for text in ("wrong", "bad")
    ]
    assert read["labels"] == [{"prompt": "B", "completion": "fine", "label": True}]
    (tmp_path / "feedback.csv").write_text("prompt,answer,good\nA,right,perhaps\n")
    done = subprocess.run(write, capture_output=True, text=True)
    assert done.returncode == 1 and "row 1: prompt and answer must not be empty" in done.stderr


def test_a_length_has_a_plan_at_each_budget(llama_long):
    done = run("long.sh", MODEL=llama_long, SEQ=4096, BUDGETS="10 0.001")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("GB:\n") == 2 and "predicted" in done.stdout
    assert "more than the budget" in done.stderr


def test_grpo_of_smollm2(tmp_path):
    data = tmp_path / "data"
    write_sums(data)
    for name in ("train", "valid"):  # a few rows suffice
        file = data / f"{name}.jsonl"
        file.write_text("".join(file.read_text().splitlines(True)[:2]))
    knobs = {"MODEL": snapshot.smollm2_snapshot(cache_dir()), "DATA": data}
    few = ("--batch-size", "1", "--group-size", "2", "--warmup-iters", "0")
    done = run("grpo.sh", *few, ITERS=1, ADAPTER=tmp_path / "a", **knobs)
    assert done.returncode == 0, done.stderr
    assert "held-out reward" in done.stdout
    assert len((tmp_path / "a" / "completions.jsonl").read_text().splitlines()) == 2
    assert all(json.loads(line)["answer"] > 1 for line in (data / "train.jsonl").open())


def test_e4b_probe_then_train(e4b, tmp_path, data):
    knobs = {"MODEL": e4b, "DATA": data, "ADAPTER": tmp_path / "a", "SEQ": 64}
    done = run("e4b.sh", "probe", **knobs)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "a").exists()
    done = run("e4b.sh", "train", ITERS=6, SEG=0, CKPT=0, GRAD_CKPT=1, **knobs)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    ranks = config["optiq"]["applied_ranks"]
    assert all(name.startswith("language_model.model.layers.") for name in ranks)
    by_bits = {name: rank for name, rank in ranks.items() if name.endswith(("v_proj", "q_proj"))}
    assert set(by_bits.values()) == {16, 32}
    assert config["segtrain"]["iters"] == 6 and config["segtrain"]["steps_per_eval"] == 1
    assert not (tmp_path / "a" / "checkpoints").exists()
    model, _ = mlx_lm.load(str(e4b), adapter_path=str(tmp_path / "a"))
    assert mx.isfinite(model(mx.arange(20)[None])).all()


@pytest.mark.parametrize(
    ("script", "args", "knobs", "says"),
    [
        ("chunk.sh", [], {"MODEL": "/"}, "DATA is not set"),
        ("chunk.sh", [], {"HF_HOME": "/none", "DATA": "/"}, "MODEL is not set, and no MiniCPM5"),
        ("task.sh", ["sums"], {}, "usage: recipes/task.sh chunk|tools|persona"),
        ("e4b.sh", [], {}, "usage: recipes/e4b.sh probe|train"),
        ("e4b.sh", ["train"], {"MODEL": "/", "DATA": "/", "ITERS": "many"}, "iters"),
    ],
)
def test_what_is_missing_is_said(script, args, knobs, says):
    done = run(script, *args, **knobs)
    assert done.returncode == 2 and says in done.stderr
